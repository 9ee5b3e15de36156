#include "checkpoint/manifest.h"

#include <algorithm>
#include <charconv>
#include <nlohmann/json.hpp>
#include <optional>

#include "core/errors.h"
#include "storage/digest.h"

namespace tforge {
namespace {

using nlohmann::json;

constexpr int kManifestFormat = 1;
constexpr int kMaxDepth = 4;  // of nested JSON

/// No manifest of a file of this length is longer: 19 bytes a block, and 64 MiB for the tensors.
std::uint64_t manifest_limit(std::uint64_t file_bytes) { return (64U << 20) + 32 * Manifest::blocks_of(file_bytes); }

std::string base_name(const std::string& path) { return path.substr(path.rfind('/') + 1); }

std::uint64_t parse_hex(const std::string& text) {
  std::uint64_t value = 0;
  const auto result = std::from_chars(text.data(), text.data() + text.size(), value, 16);
  if (result.ec != std::errc() || result.ptr != text.data() + text.size()) throw std::invalid_argument(text);
  return value;
}

template <class T>
T integer(const json& value) {
  if (!value.is_number_integer()) throw std::invalid_argument("no integer");
  return value.get<T>();
}

/// Parses text that may be anything: what follows walks the result by recursion, so its depth is bounded here.
json parse(const std::string& text) {
  return json::parse(text, [](int depth, json::parse_event_t, json&) {
    if (depth > kMaxDepth) throw std::invalid_argument("nested too deep");
    return true;
  });
}

json to_json(const Manifest& m) {
  json blocks = json::array();
  for (const std::uint64_t block : m.blocks) blocks.push_back(hex(block));
  json tensors = json::array();
  for (const ManifestRegion& r : m.regions) tensors.push_back({r.path, r.offset, r.rows, r.row_bytes, r.digests});
  return {{"format", kManifestFormat},
          {"file", m.file},
          {"uuid", m.uuid},
          {"step", m.step},
          {"retention", m.retention == Retention::stage_end ? "stage_end" : "rolling"},
          {"bytes", m.bytes},
          {"block_bytes", Manifest::kBlockBytes},
          {"blocks", std::move(blocks)},
          {"tensors", std::move(tensors)}};
}

Manifest from_json(const json& j) {
  Manifest m;
  j.at("file").get_to(m.file);
  j.at("uuid").get_to(m.uuid);
  m.step = integer<std::int64_t>(j.at("step"));
  m.retention = j.at("retention") == "stage_end" ? Retention::stage_end : Retention::rolling;
  m.bytes = integer<std::uint64_t>(j.at("bytes"));
  for (const json& block : j.at("blocks")) m.blocks.push_back(parse_hex(block.get<std::string>()));
  for (const json& t : j.at("tensors")) {
    m.regions.push_back({t.at(0).get<std::string>(), integer<std::uint64_t>(t.at(1)), integer<std::uint64_t>(t.at(2)),
                         integer<std::uint64_t>(t.at(3)), integer<std::uint64_t>(t.at(4))});
  }
  return m;
}

/// [offset, offset + count * size) lies inside `bytes`.
bool inside(std::uint64_t offset, std::uint64_t count, std::uint64_t size, std::uint64_t bytes) {
  return offset <= bytes && (size == 0 || count <= (bytes - offset) / size);
}

/// Names the rows of `region` that lie in [begin, end) and do not match their digests; empty when all match.
std::string damaged_rows(const PlainFile& file, const ManifestRegion& region, std::uint64_t begin, std::uint64_t end) {
  const std::uint64_t region_end = region.offset + region.rows * region.row_bytes;
  if (region.row_bytes == 0 || begin >= region_end || end <= region.offset) return {};
  const std::uint64_t first = begin <= region.offset ? 0 : (begin - region.offset) / region.row_bytes;
  const std::uint64_t last =
      end >= region_end ? region.rows : (end - region.offset + region.row_bytes - 1) / region.row_bytes;
  std::string row(region.row_bytes, '\0');
  std::optional<std::uint64_t> first_bad;
  std::uint64_t last_bad = 0;
  for (std::uint64_t r = first; r < last; ++r) {
    std::uint64_t digest = 0;
    file.read_at(region.digests + r * sizeof digest, &digest, sizeof digest);
    file.read_at(region.offset + r * region.row_bytes, row.data(), row.size());
    if (digest64(row.data(), row.size()) == digest) continue;
    if (!first_bad) first_bad = r;
    last_bad = r;
  }
  if (!first_bad) return {};
  return *first_bad == last_bad ? fmt::format("{} row {}", region.path, last_bad)
                                : fmt::format("{} rows {} to {}", region.path, *first_bad, last_bad);
}

}  // namespace

std::string manifest_path(const std::string& checkpoint) { return checkpoint + ".manifest"; }

std::string manifest_text(Manifest& manifest) {
  json j = to_json(manifest);
  manifest.digest = digest128(j.dump());
  j["digest"] = manifest.digest;
  return j.dump() + "\n";
}

Manifest read_manifest(const std::string& checkpoint) {
  const std::uint64_t file_bytes = PlainFile(checkpoint, PlainFile::Access::read).size();
  const std::string path = manifest_path(checkpoint);
  std::string text;
  try {
    text = read_file(path, manifest_limit(file_bytes));
  } catch (const DataError& error) {
    throw CheckpointError(
        "{}: no readable manifest beside it, so its save did not finish or the manifest was lost ({})", checkpoint,
        error.what());
  }
  Manifest manifest;
  try {
    json j = parse(text);
    const auto format = integer<std::int64_t>(j.at("format"));
    if (format > kManifestFormat) {
      throw DataError("{}: checkpoint format {} is newer than this program reads ({}); use a newer TokenForge", path,
                      format, kManifestFormat);
    }
    const std::string digest = j.at("digest").get<std::string>();
    const bool as_written = j.dump() + "\n" == text;
    j.erase("digest");
    if (!as_written || digest128(j.dump()) != digest)
      throw CheckpointError("{}: damaged: its own digest does not match", path);
    if (j.at("block_bytes") != Manifest::kBlockBytes) throw CheckpointError("{}: blocks of another size", path);
    manifest = from_json(j);
    manifest.digest = digest;
  } catch (const json::exception&) {
    throw CheckpointError("{}: damaged: not the manifest of a checkpoint", path);
  } catch (const std::invalid_argument&) {
    throw CheckpointError("{}: damaged: a value is not what it should be", path);
  }
  if (manifest.file != base_name(checkpoint)) {
    throw CheckpointError("{}: its manifest is that of {}; rename both files back", checkpoint, manifest.file);
  }
  if (manifest.bytes != file_bytes) {
    throw CheckpointError("{}: damaged: {} bytes, its manifest says {}", checkpoint, file_bytes, manifest.bytes);
  }
  bool consistent = manifest.blocks.size() == Manifest::blocks_of(manifest.bytes);
  for (const ManifestRegion& r : manifest.regions) {
    consistent = consistent && inside(r.offset, r.rows, r.row_bytes, manifest.bytes) &&
                 inside(r.digests, r.rows, sizeof(std::uint64_t), manifest.bytes) && r.row_bytes <= manifest.bytes;
  }
  if (!consistent) throw CheckpointError("{}: damaged: it contradicts itself", path);
  return manifest;
}

BlockRange block_share(std::uint64_t blocks, int part, int parts) {
  const auto p = static_cast<std::uint64_t>(part);
  const auto n = static_cast<std::uint64_t>(parts);
  return {blocks * p / n, blocks * (p + 1) / n};
}

std::vector<std::uint64_t> digest_blocks(const PlainFile& file, std::uint64_t bytes, BlockRange range) {
  std::vector<std::uint64_t> digests;
  std::string block(std::min(bytes, Manifest::kBlockBytes), '\0');
  for (std::uint64_t i = range.first; i < range.last; ++i) {
    const std::uint64_t begin = i * Manifest::kBlockBytes;
    const std::uint64_t count = std::min(Manifest::kBlockBytes, bytes - begin);
    file.read_at(begin, block.data(), count);
    digests.push_back(digest64(block.data(), count));
  }
  return digests;
}

void verify_blocks(const PlainFile& file, const Manifest& manifest, BlockRange range) {
  const std::vector<std::uint64_t> found = digest_blocks(file, manifest.bytes, range);
  for (std::uint64_t i = range.first; i < range.last; ++i) {
    if (found[i - range.first] == manifest.blocks[i]) continue;
    const std::uint64_t begin = i * Manifest::kBlockBytes;
    const std::uint64_t end = std::min(begin + Manifest::kBlockBytes, manifest.bytes);
    std::string where;
    for (const ManifestRegion& region : manifest.regions) {
      const std::string rows = damaged_rows(file, region, begin, end);
      if (!rows.empty()) where += (where.empty() ? "" : ", ") + rows;
    }
    throw CheckpointError("{}: damaged between bytes {} and {}: {}", file.path(), begin, end,
                          where.empty() ? "outside the tensors' rows" : where);
  }
}

}  // namespace tforge
