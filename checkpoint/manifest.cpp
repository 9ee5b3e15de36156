#include "checkpoint/manifest.h"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>

#include "core/errors.h"
#include "storage/digest.h"

namespace tforge {
namespace {

using nlohmann::json;

constexpr int kManifestFormat = 1;
constexpr int kMaxDepth = 4;  // of nested JSON
constexpr std::uint64_t kDigestBytes = sizeof(std::uint64_t);
constexpr std::uint64_t kMaxRowBytes = 1U << 30;  // a row is held in memory when it is checked

/// No manifest of a file of this length is longer: 19 bytes a block, and for a tensor less than its two objects take in
/// the file.
std::uint64_t manifest_limit(std::uint64_t file_bytes) {
  constexpr std::uint64_t kHead = 2U << 20, kMostTensors = 64U << 20;
  return kHead + std::min(file_bytes, kMostTensors) + 32 * Manifest::blocks_of(file_bytes);
}

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
  json j = {{"format", kManifestFormat},
            {"file", m.file},
            {"uuid", m.uuid},
            {"step", m.step},
            {"retention", name_of(m.retention)},
            {"bytes", m.bytes},
            {"block_bytes", Manifest::kBlockBytes},
            {"blocks", std::move(blocks)},
            {"tensors", std::move(tensors)}};
  if (!m.rest.empty()) j["rest"] = m.rest;
  return j;
}

Manifest from_json(const json& j) {
  Manifest m;
  j.at("file").get_to(m.file);
  j.at("uuid").get_to(m.uuid);
  m.step = integer<std::int64_t>(j.at("step"));
  const auto retention = retention_from_name(j.at("retention").get<std::string>());
  if (!retention) throw std::invalid_argument("retention");
  m.retention = *retention;
  m.bytes = integer<std::uint64_t>(j.at("bytes"));
  for (const json& block : j.at("blocks")) m.blocks.push_back(parse_hex(block.get<std::string>()));
  for (const json& t : j.at("tensors")) {
    m.regions.push_back({t.at(0).get<std::string>(), integer<std::uint64_t>(t.at(1)), integer<std::uint64_t>(t.at(2)),
                         integer<std::uint64_t>(t.at(3)), integer<std::uint64_t>(t.at(4))});
  }
  if (j.contains("rest")) j.at("rest").get_to(m.rest);
  return m;
}

/// [offset, offset + count * size) lies inside `bytes`.
bool inside(std::uint64_t offset, std::uint64_t count, std::uint64_t size, std::uint64_t bytes) {
  return offset <= bytes && (size == 0 || count <= (bytes - offset) / size);
}

/// The run of rows of `region` that lie in [begin, end) and do not match their digests; nothing when all match.
std::optional<DamagedRows> damaged_rows(const PlainFile& file, const ManifestRegion& region, std::uint64_t begin,
                                        std::uint64_t end) {
  const std::uint64_t region_end = region.offset + region.rows * region.row_bytes;
  const std::uint64_t digests_end = region.digests + region.rows * kDigestBytes;
  if (region.row_bytes == 0) return std::nullopt;
  // The block may hold rows, their digests, or some of both.
  std::uint64_t first = region.rows, last = 0;
  const auto touch = [&](std::uint64_t offset, std::uint64_t stop, std::uint64_t size) {
    if (begin >= stop || end <= offset) return;
    first = std::min(first, begin <= offset ? 0 : (begin - offset) / size);
    last = std::max(last, end >= stop ? region.rows : (end - offset + size - 1) / size);
  };
  touch(region.offset, region_end, region.row_bytes);
  touch(region.digests, digests_end, kDigestBytes);
  std::string row(region.row_bytes, '\0');
  std::optional<DamagedRows> found;
  for (std::uint64_t r = first; r < last; ++r) {
    std::uint64_t digest = 0;
    file.read_at(region.digests + r * kDigestBytes, &digest, sizeof digest);
    file.read_at(region.offset + r * region.row_bytes, row.data(), row.size());
    if (digest64(row.data(), row.size()) == digest) continue;
    if (!found) found = DamagedRows{&region, r, r};
    found->last = r;
  }
  return found;
}

}  // namespace

std::string_view name_of(Retention retention) { return retention == Retention::stage_end ? "stage_end" : "rolling"; }

std::optional<Retention> retention_from_name(std::string_view name) {
  for (const Retention retention : {Retention::rolling, Retention::stage_end}) {
    if (name == name_of(retention)) return retention;
  }
  return std::nullopt;
}

std::string manifest_path(const std::string& checkpoint) { return checkpoint + ".manifest"; }

std::string manifest_text(Manifest& manifest) {
  json j = to_json(manifest);
  manifest.digest = digest128(j.dump());
  j["digest"] = manifest.digest;
  return j.dump() + "\n";
}

Manifest read_manifest(const std::string& checkpoint) {
  return read_manifest(checkpoint, manifest_path(checkpoint), base_name(checkpoint));
}

Manifest read_manifest(const std::string& checkpoint, const std::string& path, const std::string& name) {
  const std::uint64_t file_bytes = PlainFile(checkpoint, PlainFile::Access::read).size();
  const auto unreadable = [&](std::string_view why) {
    return CheckpointError(
        "{}: no readable manifest beside it, so its save did not finish or the manifest was lost ({})", checkpoint,
        why);
  };
  std::error_code ignored;
  if (!std::filesystem::is_regular_file(path, ignored)) throw unreadable(path + ": no such file");
  const PlainFile opened(path, PlainFile::Access::read);  // one that may not be opened may be whole
  std::string text;
  try {
    text = read_file(path, manifest_limit(file_bytes));
  } catch (const DataError& error) {
    throw unreadable(error.what());
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
    if (to_json(manifest) != j) throw std::invalid_argument("a key or an element that no manifest has");
    manifest.digest = digest;
  } catch (const json::exception&) {
    throw CheckpointError("{}: damaged: not the manifest of a checkpoint", path);
  } catch (const std::invalid_argument&) {
    throw CheckpointError("{}: damaged: a value is not what it should be", path);
  }
  if (manifest.file != name) {
    throw CheckpointError("{}: its manifest is that of {}; rename both files back", checkpoint, manifest.file);
  }
  if (manifest.bytes != file_bytes) {
    throw CheckpointError("{}: damaged: {} bytes, its manifest says {}", checkpoint, file_bytes, manifest.bytes);
  }
  bool consistent = manifest.blocks.size() == Manifest::blocks_of(manifest.bytes);
  std::uint64_t covered = 0;  // regions do not overlap: to look through all of them is to read the file once
  for (const ManifestRegion& r : manifest.regions) {
    consistent = consistent && inside(r.offset, r.rows, r.row_bytes, manifest.bytes) &&
                 inside(r.digests, r.rows, kDigestBytes, manifest.bytes) &&
                 r.row_bytes <= std::min(manifest.bytes, kMaxRowBytes);
    if (!consistent) break;
    covered += r.rows * (r.row_bytes + kDigestBytes);
    consistent = covered <= manifest.bytes;
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

std::string digest_rest(const PlainFile& file, const Manifest& manifest) {
  std::vector<std::pair<std::uint64_t, std::uint64_t>> taken;  // [begin, end)
  for (const ManifestRegion& r : manifest.regions) {
    taken.emplace_back(r.offset, r.offset + r.rows * r.row_bytes);
    taken.emplace_back(r.digests, r.digests + r.rows * kDigestBytes);
  }
  taken.emplace_back(manifest.bytes, manifest.bytes);
  std::ranges::sort(taken);
  Digest digest;
  std::string piece;
  std::uint64_t at = 0;
  for (const auto& [begin, end] : taken) {
    while (at < begin) {
      piece.resize(std::min(begin - at, Manifest::kBlockBytes));
      file.read_at(at, piece.data(), piece.size());
      digest.add(piece);
      at += piece.size();
    }
    at = std::max(at, end);
  }
  return digest.text();
}

std::vector<DamagedBlock> find_damage(const PlainFile& file, const Manifest& manifest, BlockRange range) {
  try {
    std::vector<DamagedBlock> damage;
    const std::vector<std::uint64_t> found = digest_blocks(file, manifest.bytes, range);
    for (std::uint64_t i = range.first; i < range.last; ++i) {
      if (found[i - range.first] == manifest.blocks[i]) continue;
      DamagedBlock block;
      block.begin = i * Manifest::kBlockBytes;
      block.end = std::min(block.begin + Manifest::kBlockBytes, manifest.bytes);
      for (const ManifestRegion& region : manifest.regions) {
        if (const auto rows = damaged_rows(file, region, block.begin, block.end)) block.rows.push_back(*rows);
      }
      damage.push_back(std::move(block));
    }
    return damage;
  } catch (const DataError& error) {
    throw CheckpointError("damaged: {}", error.what());
  }
}

std::string damage_text(const PlainFile& file, const std::vector<DamagedBlock>& damage) {
  const DamagedBlock& first = damage.front();
  std::string where;
  for (const DamagedRows& rows : first.rows) {
    where += fmt::format("{}{} ", where.empty() ? "" : ", ", rows.region->path);
    where += rows.first == rows.last ? fmt::format("row {}", rows.first)
                                     : fmt::format("rows {} to {}", rows.first, rows.last);
  }
  if (where.empty()) where = "outside the tensors' rows";
  if (damage.size() > 1) where += fmt::format(", and in {} more places", damage.size() - 1);
  return fmt::format("{}: damaged between bytes {} and {}: {}", file.path(), first.begin, first.end, where);
}

void verify_blocks(const PlainFile& file, const Manifest& manifest, BlockRange range) {
  const std::vector<DamagedBlock> damage = find_damage(file, manifest, range);
  if (!damage.empty()) throw CheckpointError(damage_text(file, damage));
}

}  // namespace tforge
