#include "checkpoint/writer.h"

#include <fcntl.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <ctime>
#include <nlohmann/json.hpp>

#include "checkpoint/agreement.h"
#include "checkpoint/integrity.h"
#include "core/errors.h"
#include "storage/digest.h"

namespace tforge {
namespace {

constexpr std::uint64_t kPieceBytes = 4U << 20;

std::uint64_t row_bytes(const CheckpointTensor& t) {
  return static_cast<std::uint64_t>(t.shape.columns()) * size_of(t.dtype);
}

std::string bytes_of(const std::vector<std::uint64_t>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(std::uint64_t)};
}

std::vector<std::uint64_t> values_of(const std::string& bytes) {
  std::vector<std::uint64_t> values(bytes.size() / sizeof(std::uint64_t));
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), values.size() * sizeof(std::uint64_t));
  return values;
}

bool is_tensor_path(const std::string& path) {
  return (path.starts_with("model/") || path.starts_with("optim/") || path.starts_with("hash/")) &&
         !path.ends_with('/') && path.find("//") == std::string::npos && path.find("/.") == std::string::npos &&
         path.find('\n') == std::string::npos;
}

/// A digest of what all ranks must agree on, then the borders of this rank's blocks: count, (first, rows)... a tensor.
std::string describe(std::span<const CheckpointTensor> tensors) {
  std::string listing;
  std::vector<std::uint64_t> numbers = {0};
  for (const CheckpointTensor& t : tensors) {
    if (!is_tensor_path(t.path)) throw InternalError("checkpoint: '{}' is not a path of a tensor", t.path);
    listing += fmt::format("{} {} {}\n", t.path, name_of(t.dtype), t.shape.text());
    numbers.push_back(t.blocks.size());
    for (const RowBlock& block : t.blocks) {
      numbers.push_back(static_cast<std::uint64_t>(block.first_row));
      numbers.push_back(static_cast<std::uint64_t>(block.rows));
    }
  }
  numbers[0] = digest64(listing.data(), listing.size());
  return bytes_of(numbers);
}

/// Every row of every tensor is owned once, and all ranks speak of the same tensors.
void check_cover(std::span<const CheckpointTensor> tensors, const std::vector<std::string>& ranks) {
  std::vector<std::vector<std::pair<std::uint64_t, std::uint64_t>>> blocks(tensors.size());
  std::uint64_t agreed = 0;
  for (std::size_t rank = 0; rank < ranks.size(); ++rank) {
    const std::vector<std::uint64_t> numbers = values_of(ranks[rank]);
    if (rank == 0) agreed = numbers.at(0);
    if (numbers.at(0) != agreed) throw InternalError("checkpoint: rank {} lists other tensors than rank 0", rank);
    std::size_t at = 1;
    for (auto& of_tensor : blocks) {
      for (std::uint64_t left = numbers.at(at++); left > 0; --left, at += 2) {
        if (numbers.at(at + 1) > 0) of_tensor.emplace_back(numbers.at(at), numbers.at(at + 1));
      }
    }
  }
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    std::sort(blocks[i].begin(), blocks[i].end());
    const auto rows = static_cast<std::uint64_t>(tensors[i].shape.rows());
    std::uint64_t next = 0;
    for (const auto& [first, count] : blocks[i]) {
      if (first != next || count > rows - next) {
        throw InternalError("checkpoint: {}: rows {} to {} are not owned by exactly one rank", tensors[i].path,
                            std::min(first, next), std::max(first, next));
      }
      next += count;
    }
    if (next != rows) {
      throw InternalError("checkpoint: {}: rows {} to {} are owned by no rank", tensors[i].path, next, rows);
    }
  }
}

bool exists(const std::string& path) { return ::access(path.c_str(), F_OK) == 0; }

}  // namespace

std::string timestamp() {
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  ::gmtime_r(&now, &utc);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &utc);
  return text;
}

std::string random_uuid() {
  unsigned char b[16];
  if (::getrandom(b, sizeof b, 0) != static_cast<ssize_t>(sizeof b)) {
    throw ResourceError("the system gives no random numbers");
  }
  b[6] = static_cast<unsigned char>((b[6] & 0x0fU) | 0x40U);
  b[8] = static_cast<unsigned char>((b[8] & 0x3fU) | 0x80U);
  std::string text;
  for (int i = 0; i < 16; ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    text += fmt::format("{:02x}", b[i]);
  }
  return text;
}

CheckpointWriter::CheckpointWriter(Communicator& world, std::string path, const CheckpointContents& contents,
                                   OnExisting existing)
    : world_(world), path_(std::move(path)), existing_(existing), content_(contents.tensors.size(), 0) {
  const std::vector<std::string> listings = together(world_, [&] { return describe(contents.tensors); });
  check_cover(contents.tensors, listings);
  const std::vector<std::string> layouts =
      together(world_, [&] { return world_.rank() == 0 ? lay_out(contents) : std::string(); });
  together(world_, [&] {
    adopt(layouts[0]);
    return std::string();
  });
}

namespace {

/// A little more than the file that lay_out() makes: data, row digests, and what HDF5 keeps for each object (about 500
/// bytes in real files, alignment included).
std::uint64_t room_for(const CheckpointContents& contents) {
  constexpr std::uint64_t kFile = 16 << 10, kObject = 640, kAttribute = 64;
  const auto attributes = [](const Attributes& all) {
    std::uint64_t bytes = 0;
    for (const auto& [name, value] : all) {
      bytes += kAttribute + 2 * name.size();
      std::visit(
          [&](const auto& v) {
            if constexpr (requires { v.size(); }) bytes += v.size() * sizeof(v[0]);
          },
          value);
    }
    return bytes;
  };
  std::uint64_t bytes = kFile + contents.config.size() + contents.tokenizer.bytes.size() + attributes(contents.state);
  bytes += contents.growth_history.size() * 6 * kObject;
  for (const CheckpointTensor& t : contents.tensors) {
    const auto rows = static_cast<std::uint64_t>(t.shape.rows());
    const std::uint64_t data = rows * row_bytes(t), digests = rows * sizeof(std::uint64_t);
    bytes += data + digests + 2 * kObject + attributes(t.attributes) + 2 * t.path.size();
  }
  return bytes;
}

}  // namespace

/// Rank 0: creates the temporary with everything but the tensors' rows in it, and returns the offsets.
std::string CheckpointWriter::lay_out(const CheckpointContents& contents) {
  if (existing_ == OnExisting::refuse && exists(manifest_path(path_))) {
    throw DataError("{}: there is a checkpoint of this name already; move it away or choose another folder", path_);
  }
  info_.uuid = random_uuid();
  info_.created = timestamp();
  temporary_.emplace(path_);
  try {
    return lay_out_with_hdf5(contents);
  } catch (const Error& error) {
    // HDF5 knows only the temporary; what the user knows is the target.
    std::string what = error.what();
    const std::size_t at = what.find(temporary_->temporary());
    if (at == std::string::npos) throw;
    what.replace(at, temporary_->temporary().size(), path_);
    throw Error(error.code(), what);
  }
}

std::string CheckpointWriter::lay_out_with_hdf5(const CheckpointContents& contents) {
  // A disk without room shows here. HDF5 would find out when it closes the file, and then loses memory.
  temporary_->file().reserve(room_for(contents));
  Hdf5File file = Hdf5File::create(temporary_->temporary());

  std::map<std::string, std::uint64_t> attribute_digests;
  std::map<std::string, std::uint64_t> blob_digests;
  const auto put_attributes = [&](const std::string& path, const Attributes& attributes) {
    for (const auto& [name, value] : attributes) file.set_attribute(path, name, value);
    attribute_digests[path] = layout::digest_of(attributes);
  };

  put_attributes("/", {{"format_version", kCheckpointFormat},
                       {"uuid", info_.uuid},
                       {"parent_uuid", contents.parent_uuid},
                       {"created", info_.created},
                       {"code_version", contents.code_version},
                       {"model_kind", contents.model_kind},
                       {"retention", std::string(name_of(contents.retention))}});
  file.write_text(layout::kConfig, contents.config);
  blob_digests[layout::kConfig] = digest64(contents.config.data(), contents.config.size());
  file.write_bytes(layout::kTokenizer, contents.tokenizer.bytes);
  blob_digests[layout::kTokenizer] = digest64(contents.tokenizer.bytes.data(), contents.tokenizer.bytes.size());
  put_attributes(layout::kTokenizer,
                 {{"kind", contents.tokenizer.kind}, {"fingerprint", contents.tokenizer.fingerprint}});
  Attributes state = contents.state;
  if (!state.emplace("step", contents.step).second) throw InternalError("checkpoint: the state's 'step' is ours");
  file.create_group(layout::kState);
  put_attributes(layout::kState, state);
  file.create_group(layout::kHistory);
  for (std::size_t i = 0; i < contents.growth_history.size(); ++i) {
    const std::string path = fmt::format("{}/{:06}", layout::kHistory, i);
    file.create_group(path);
    put_attributes(path, layout::to_attributes(contents.growth_history[i]));
  }

  std::string paths;
  for (const CheckpointTensor& t : contents.tensors) {
    std::vector<std::uint64_t> extents;
    for (int axis = 0; axis < t.shape.rank(); ++axis) extents.push_back(static_cast<std::uint64_t>(t.shape[axis]));
    file.create_dataset("/" + t.path, layout::stored_type(t.dtype), extents);
    put_attributes("/" + t.path, t.attributes);
    const std::uint64_t rows[] = {static_cast<std::uint64_t>(t.shape.rows())};
    file.create_dataset(fmt::format("{}/{}", layout::kRowDigests, t.path), StoredType::u64, rows);
    paths += t.path + "\n";
  }
  file.write_bytes(layout::kTensors, paths);
  const std::uint64_t tensors[] = {contents.tensors.size()};
  file.create_dataset(layout::kContent, StoredType::u64, tensors);
  blob_digests[layout::kTensors] = digest64(paths.data(), paths.size());
  file.write_bytes(layout::kAttributes, layout::index_text(attribute_digests));
  file.write_bytes(layout::kBlobs, layout::index_text(blob_digests));

  nlohmann::json regions = nlohmann::json::array();
  for (const CheckpointTensor& t : contents.tensors) {
    const DatasetInfo data = file.info("/" + t.path);
    const DatasetInfo digests = file.info(fmt::format("{}/{}", layout::kRowDigests, t.path));
    regions.push_back({t.path, data.offset, t.shape.rows(), row_bytes(t), digests.offset});
  }
  const std::uint64_t content_offset = file.info(layout::kContent).offset;
  file.close();
  const std::uint64_t bytes = temporary_->file().size();
  temporary_->file().reserve(bytes);
  return nlohmann::json{{"temporary", temporary_->temporary()},
                        {"bytes", bytes},
                        {"uuid", info_.uuid},
                        {"parent_uuid", contents.parent_uuid},
                        {"created", info_.created},
                        {"code_version", contents.code_version},
                        {"model_kind", contents.model_kind},
                        {"step", contents.step},
                        {"stage_end", contents.retention == Retention::stage_end},
                        {"content", content_offset},
                        {"regions", std::move(regions)}}
      .dump();
}

/// Every rank: learns the offsets and opens the temporary.
void CheckpointWriter::adopt(const std::string& layout) {
  const nlohmann::json j = nlohmann::json::parse(layout);
  info_.uuid = j.at("uuid");
  info_.parent_uuid = j.at("parent_uuid");
  info_.created = j.at("created");
  info_.code_version = j.at("code_version");
  info_.model_kind = j.at("model_kind");
  info_.step = j.at("step");
  info_.retention = j.at("stage_end").get<bool>() ? Retention::stage_end : Retention::rolling;
  info_.file_bytes = j.at("bytes");
  content_offset_ = j.at("content");
  for (const auto& r : j.at("regions")) {
    manifest_.regions.push_back({r.at(0), r.at(1), r.at(2), r.at(3), r.at(4)});
  }
  manifest_.file = path_.substr(path_.rfind('/') + 1);
  manifest_.uuid = info_.uuid;
  manifest_.step = info_.step;
  manifest_.retention = info_.retention;
  manifest_.bytes = info_.file_bytes;
  if (world_.rank() != 0) other_ = PlainFile(j.at("temporary"), PlainFile::Access::write, path_);
}

void CheckpointWriter::write_rows(std::span<const CheckpointTensor> tensors) {
  if (tensors.size() != manifest_.regions.size()) throw InternalError("checkpoint: other tensors than laid out");
  std::vector<std::uint64_t> digests;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const ManifestRegion& region = manifest_.regions[i];
    if (tensors[i].path != region.path)
      throw InternalError("checkpoint: {} where {} was", tensors[i].path, region.path);
    if (region.row_bytes == 0) continue;
    for (const RowBlock& block : tensors[i].blocks) {
      const auto first = static_cast<std::uint64_t>(block.first_row);
      const auto rows = static_cast<std::uint64_t>(block.rows);
      const auto* data = static_cast<const std::byte*>(block.data);
      const std::uint64_t piece = std::max<std::uint64_t>(1, kPieceBytes / region.row_bytes);
      digests.clear();
      for (std::uint64_t done = 0; done < rows; done += piece) {
        const std::uint64_t count = std::min(piece, rows - done);
        const std::byte* from = data + done * region.row_bytes;
        for (std::uint64_t r = 0; r < count; ++r) {
          digests.push_back(digest64(from + r * region.row_bytes, region.row_bytes));
          content_[i] += layout::content_term(digests.back(), first + done + r);
        }
        file().write_at(region.offset + (first + done) * region.row_bytes, from, count * region.row_bytes);
      }
      file().write_at(region.digests + first * sizeof(std::uint64_t), digests.data(),
                      digests.size() * sizeof(std::uint64_t));
    }
  }
  file().sync();
}

void CheckpointWriter::seal() {
  const std::vector<std::string> parts = together(world_, [&] { return bytes_of(content_); });
  together(world_, [&] {
    if (world_.rank() != 0 || content_.empty()) return std::string();
    std::vector<std::uint64_t> sums(content_.size(), 0);
    for (const std::string& part : parts) {
      const std::vector<std::uint64_t> of_rank = values_of(part);
      for (std::size_t i = 0; i < sums.size(); ++i) sums[i] += of_rank.at(i);
    }
    file().write_at(content_offset_, sums.data(), sums.size() * sizeof(std::uint64_t));
    file().sync();
    return std::string();
  });
}

void CheckpointWriter::digest_blocks() {
  const BlockRange share = block_share(Manifest::blocks_of(manifest_.bytes), world_.rank(), world_.size());
  my_blocks_ = tforge::digest_blocks(file(), manifest_.bytes, share);
  if (world_.rank() == 0) manifest_.rest = digest_rest(file(), manifest_);
}

/// Rank 0: the file first, its manifest last.
void CheckpointWriter::publish(const std::vector<std::string>& digests) {
  for (const std::string& part : digests) {
    const std::vector<std::uint64_t> blocks = values_of(part);
    manifest_.blocks.insert(manifest_.blocks.end(), blocks.begin(), blocks.end());
  }
  const std::string text = manifest_text(manifest_);
  AtomicFile manifest(manifest_path(path_));
  manifest.file().write_at(0, text.data(), text.size());
  manifest.file().sync();
  // From the first change of a name to the last the names lead to no whole checkpoint, never to a wrong one. What
  // recover_commits() needs to finish is on the disk by then, under the names of temporaries.
  sync_folder(folder_of(path_));
  if (existing_ == OnExisting::replace && exists(manifest.target())) {
    if (::unlink(manifest.target().c_str()) != 0) {
      throw DataError("{}: cannot be removed: {}", manifest.target(), std::strerror(errno));
    }
    sync_folder(folder_of(path_));
  }
  temporary_->commit();
  try {
    manifest.commit();
  } catch (...) {
    ::unlink(path_.c_str());
    throw;
  }
}

CheckpointInfo CheckpointWriter::commit() {
  const std::vector<std::string> digests = together(world_, [&] {
    other_.close();
    return bytes_of(my_blocks_);
  });
  const std::vector<std::string> results = together(world_, [&] {
    if (world_.rank() == 0) publish(digests);
    return manifest_.digest;
  });
  info_.digest = results[0];
  return info_;
}

CheckpointInfo save_checkpoint(Communicator& world, const std::string& path, const CheckpointContents& contents,
                               OnExisting existing) {
  CheckpointWriter writer(world, path, contents, existing);
  together(world, [&] {
    writer.write_rows(contents.tensors);
    return std::string();
  });
  writer.seal();
  together(world, [&] {
    writer.digest_blocks();
    return std::string();
  });
  return writer.commit();
}

}  // namespace tforge
