#include "checkpoint/reader.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <map>
#include <set>

#include "checkpoint/agreement.h"
#include "checkpoint/integrity.h"
#include "checkpoint/manifest.h"
#include "core/errors.h"
#include "core/printable.h"
#include "storage/digest.h"

namespace tforge {
namespace {

constexpr std::uint64_t kPieceBytes = 4U << 20;

std::uint64_t row_bytes(const CheckpointReader::Tensor& t) {
  return static_cast<std::uint64_t>(t.shape.columns()) * size_of(t.dtype);
}

Shape shape_of(const DatasetInfo& info) {
  const std::vector<std::uint64_t>& e = info.shape;
  if (e.size() > static_cast<std::size_t>(Shape::kMaxRank)) throw CheckpointError("has {} extents", e.size());
  const auto at = [&](std::size_t i) { return static_cast<std::int64_t>(e[i]); };
  switch (e.size()) {
    case 0: return Shape{};
    case 1: return Shape{at(0)};
    case 2: return Shape{at(0), at(1)};
    case 3: return Shape{at(0), at(1), at(2)};
    default: return Shape{at(0), at(1), at(2), at(3)};
  }
}

/// Reads attributes and blobs of one file and compares each with its digest.
class CheckedFile {
 public:
  explicit CheckedFile(const Hdf5File& file) : file_(file) {
    attributes_ = layout::parse_index(file.read_bytes(layout::kAttributes));
    blobs_ = layout::parse_index(file.read_bytes(layout::kBlobs));
  }

  Attributes attributes(const std::string& path) const {
    Attributes result;
    for (const std::string& name : file_.attribute_names(path)) result[name] = file_.attribute(path, name);
    const auto stored = attributes_.find(path);
    if (stored == attributes_.end() || stored->second != layout::digest_of(result)) {
      throw CheckpointError("the attributes of {} do not match their digest", path);
    }
    for (const auto& [name, value] : result) {
      const auto* text = std::get_if<std::string>(&value);
      if (printable(name) != name || (text != nullptr && printable(*text) != *text)) {
        throw CheckpointError("attribute '{}' of {} has control characters", name, path);
      }
    }
    return result;
  }
  std::string blob(const std::string& path, std::string bytes) const {
    const auto stored = blobs_.find(path);
    if (stored == blobs_.end() || stored->second != digest64(bytes.data(), bytes.size())) {
      throw CheckpointError("{} does not match its digest", path);
    }
    return bytes;
  }

 private:
  const Hdf5File& file_;
  std::map<std::string, std::uint64_t> attributes_;
  std::map<std::string, std::uint64_t> blobs_;
};

std::string text_of(const Attributes& attributes, const std::string& name) {
  return state_value<std::string>(attributes, name);
}

template <class From, class To>
void convert(const std::byte* from, std::uint64_t count, To* to) {
  for (std::uint64_t i = 0; i < count; ++i) {
    From value;
    std::memcpy(&value, from + i * sizeof value, sizeof value);
    to[i] = static_cast<To>(value);
  }
}

/// One that cannot be opened may be whole, unless its manifest is all there is.
PlainFile open_file(const std::string& path) {
  std::error_code ignored;
  if (!std::filesystem::is_regular_file(path, ignored) && std::filesystem::exists(manifest_path(path), ignored)) {
    throw CheckpointError("{}: the file is missing; only its manifest is there", path);
  }
  return {path, PlainFile::Access::read};
}

void check_manifest_agrees(const CheckpointReader& reader, const Manifest& manifest) {
  const CheckpointInfo& info = reader.info();
  if (info.uuid != manifest.uuid || info.step != manifest.step || info.retention != manifest.retention) {
    throw CheckpointError(
        "{}: its manifest is that of another checkpoint (step {}, uuid {}; the file: step {}, uuid {})", reader.path(),
        manifest.step, manifest.uuid, info.step, info.uuid);
  }
}

}  // namespace

/// Everything but the tensors' rows, from HDF5.
void CheckpointReader::load(const std::string& path) {
  try {
    const Hdf5File file = Hdf5File::open(path);
    info_.file_bytes = file.file_bytes();
    info_.format = file.attribute<std::int64_t>("/", "format_version");
    if (info_.format > kCheckpointFormat) {
      const std::string by = file.has_attribute("/", "code_version") ? file.attribute<std::string>("/", "code_version")
                                                                     : std::string("a newer TokenForge");
      throw DataError("{}: checkpoint format {} is newer than this program reads ({}); it was written by {}", path,
                      info_.format, kCheckpointFormat, by);
    }
    if (info_.format < 1) throw CheckpointError("format version {} is none", info_.format);
    const CheckedFile checked(file);
    const Attributes root = checked.attributes("/");
    info_.uuid = text_of(root, "uuid");
    info_.parent_uuid = text_of(root, "parent_uuid");
    info_.created = text_of(root, "created");
    info_.code_version = text_of(root, "code_version");
    info_.model_kind = text_of(root, "model_kind");
    const auto retention = retention_from_name(text_of(root, "retention"));
    if (!retention) throw CheckpointError("retention '{}' is none", text_of(root, "retention"));
    info_.retention = *retention;
    config_ = checked.blob(layout::kConfig, file.read_text(layout::kConfig));
    tokenizer_.bytes = checked.blob(layout::kTokenizer, file.read_bytes(layout::kTokenizer));
    const Attributes tokenizer = checked.attributes(layout::kTokenizer);
    tokenizer_.kind = text_of(tokenizer, "kind");
    tokenizer_.fingerprint = text_of(tokenizer, "fingerprint");
    state_ = checked.attributes(layout::kState);
    info_.step = state_value<std::int64_t>(state_, "step");
    for (const std::string& record : file.children(layout::kHistory)) {
      history_.push_back(layout::growth_record(checked.attributes(fmt::format("{}/{}", layout::kHistory, record))));
    }

    const std::string paths = checked.blob(layout::kTensors, file.read_bytes(layout::kTensors));
    const std::vector<std::uint64_t> content = file.read<std::uint64_t>(layout::kContent);
    std::set<std::string> listed;
    std::uint64_t held = 0;
    for (std::size_t begin = 0; begin < paths.size();) {
      const std::size_t end = std::min(paths.find('\n', begin), paths.size());
      Tensor t;
      t.path = paths.substr(begin, end - begin);
      begin = end + 1;
      if (printable(t.path) != t.path) throw CheckpointError("a tensor's name '{}' has control characters", t.path);
      const DatasetInfo data = file.info("/" + t.path);
      const DatasetInfo digests = file.info(fmt::format("{}/{}", layout::kRowDigests, t.path));
      t.dtype = layout::dtype_of_stored(data.type);
      t.shape = shape_of(data);
      t.attributes = checked.attributes("/" + t.path);
      t.offset = data.offset;
      t.digests_offset = digests.offset;
      const auto rows = static_cast<std::uint64_t>(t.shape.rows());
      if (digests.type != StoredType::u64 || digests.elements() != rows || tensors_.size() >= content.size() ||
          (data.bytes > 0 && (!data.mappable || !digests.mappable))) {
        throw CheckpointError("{}: its row digests do not fit {}", t.path, data.text());
      }
      t.content_digest = content[tensors_.size()];
      // So that what is asked of memory for all tensors together is bounded by the file.
      held += data.bytes;
      if (!listed.insert("/" + t.path).second || held > info_.file_bytes) {
        throw CheckpointError("{} is listed twice, or shares its rows with other tensors", t.path);
      }
      tensors_.push_back(std::move(t));
    }
    for (const char* group : {"/model", "/optim", "/hash"}) {
      if (!file.exists(group)) continue;
      for (const std::string& dataset : file.datasets_below(group)) {
        if (!listed.contains(dataset)) throw CheckpointError("{} is not listed in {}", dataset, layout::kTensors);
      }
    }
  } catch (const DataError& error) {
    if (info_.format > kCheckpointFormat) throw;
    // What HDF5 cannot read in a file that was once whole is damage.
    throw CheckpointError("damaged: {}", error.what());
  } catch (const CheckpointError& error) {
    throw CheckpointError("{}: damaged: {}", path, error.what());
  }
}

CheckpointReader CheckpointReader::open(const std::string& path, Verify verify) {
  CheckpointReader reader(open_file(path));
  if (verify == Verify::rows_when_read) {
    reader.load(path);
    return reader;
  }
  const Manifest manifest = read_manifest(path);
  verify_blocks(reader.file_, manifest, block_share(manifest.blocks.size(), 0, 1));
  reader.load(path);
  check_manifest_agrees(reader, manifest);
  reader.info_.digest = manifest.digest;
  return reader;
}

CheckpointReader CheckpointReader::open(Communicator& world, const std::string& path, Salvage salvage) {
  PlainFile file;
  Manifest manifest;
  const std::vector<std::string> digests = together(world, [&] {
    file = open_file(path);
    manifest = read_manifest(path);
    return manifest.digest;
  });
  // A line for each tensor with damaged rows.
  const std::vector<std::string> damaged = together(world, [&] {
    if (digests[0] != manifest.digest) throw CheckpointError("{}: the ranks see different files", path);
    const std::vector<DamagedBlock> damage =
        find_damage(file, manifest, block_share(manifest.blocks.size(), world.rank(), world.size()));
    std::string lines;
    for (const DamagedBlock& block : damage) {
      const bool moments = !block.rows.empty() && std::ranges::all_of(block.rows, [](const DamagedRows& rows) {
        return rows.region->path.starts_with("optim/");
      });
      if (salvage == Salvage::nothing || !moments) throw CheckpointError(damage_text(file, damage));
      for (const DamagedRows& rows : block.rows) lines += rows.region->path + "\n";
    }
    return lines;
  });
  CheckpointReader reader(std::move(file));
  std::set<std::string> paths;
  for (const std::string& lines : damaged) {
    for (std::size_t begin = 0; begin < lines.size();) {
      const std::size_t end = lines.find('\n', begin);
      paths.insert(lines.substr(begin, end - begin));
      begin = end + 1;
    }
  }
  reader.damaged_.assign(paths.begin(), paths.end());
  together(world, [&] {
    if (!paths.empty()) {
      if (manifest.rest.empty()) {
        throw CheckpointError(
            "{}: damaged; its manifest is of an older version and does not tell whether only moments are", path);
      }
      if (digest_rest(reader.file_, manifest) != manifest.rest) {
        throw CheckpointError("{}: damaged outside the tensors' rows, too", path);
      }
    }
    reader.load(path);
    check_manifest_agrees(reader, manifest);
    reader.info_.digest = manifest.digest;
    return std::string();
  });
  return reader;
}

const CheckpointReader::Tensor* CheckpointReader::find(const std::string& path) const {
  const auto found = std::find_if(tensors_.begin(), tensors_.end(), [&](const Tensor& t) { return t.path == path; });
  return found == tensors_.end() ? nullptr : &*found;
}

const CheckpointReader::Tensor& CheckpointReader::tensor(const std::string& path) const {
  const Tensor* found = find(path);
  if (found == nullptr) throw CheckpointError("{}: there is no tensor {}", file_.path(), path);
  return *found;
}

template <class Use>
void CheckpointReader::stream_rows(const Tensor& t, std::uint64_t first, std::uint64_t rows, Use&& use) const {
  const std::uint64_t width = row_bytes(t);
  if (width == 0) return;
  try {
    const std::uint64_t piece = std::min(rows, std::max<std::uint64_t>(1, kPieceBytes / width));
    std::vector<std::byte> bytes(piece * width);
    std::vector<std::uint64_t> digests(piece);
    for (std::uint64_t done = 0; done < rows; done += piece) {
      const std::uint64_t at = first + done;
      const std::uint64_t count = std::min(piece, rows - done);
      file_.read_at(t.offset + at * width, bytes.data(), count * width);
      file_.read_at(t.digests_offset + at * sizeof(std::uint64_t), digests.data(), count * sizeof(std::uint64_t));
      for (std::uint64_t r = 0; r < count; ++r) {
        if (digest64(bytes.data() + r * width, width) != digests[r]) {
          throw CheckpointError("{}: damaged: {} row {} does not match its digest", file_.path(), t.path, at + r);
        }
      }
      use(done, count, bytes.data(), digests.data());
    }
  } catch (const DataError& error) {
    throw CheckpointError("damaged: {}", error.what());
  }
}

void CheckpointReader::read_rows(const std::string& path, std::int64_t first_row, std::int64_t rows, DType dtype,
                                 void* to) const {
  const Tensor& t = tensor(path);
  if (first_row < 0 || rows < 0 || first_row > t.shape.rows() - rows) {
    throw ShapeError("{}: rows {} to {} of {} {}", file_.path(), first_row, first_row + rows, path, t.shape.text());
  }
  const bool widen = t.dtype == DType::f32 && dtype == DType::f64;
  const bool narrow = t.dtype == DType::f64 && dtype == DType::f32;
  if (t.dtype != dtype && !widen && !narrow) {
    throw DTypeError("{}: {} holds {} and was read as {}", file_.path(), path, name_of(t.dtype), name_of(dtype));
  }
  const auto columns = static_cast<std::uint64_t>(t.shape.columns());
  stream_rows(t, static_cast<std::uint64_t>(first_row), static_cast<std::uint64_t>(rows),
              [&](std::uint64_t done, std::uint64_t count, const std::byte* bytes, const std::uint64_t*) {
                std::byte* out = static_cast<std::byte*>(to) + done * columns * size_of(dtype);
                const std::uint64_t elements = count * columns;
                if (widen) {
                  convert<float>(bytes, elements, reinterpret_cast<double*>(out));
                } else if (narrow) {
                  convert<double>(bytes, elements, reinterpret_cast<float*>(out));
                } else {
                  std::memcpy(out, bytes, elements * size_of(dtype));
                }
              });
}

void CheckpointReader::verify(const Tensor& t) const {
  std::uint64_t content = 0;
  stream_rows(t, 0, static_cast<std::uint64_t>(t.shape.rows()),
              [&](std::uint64_t done, std::uint64_t count, const std::byte*, const std::uint64_t* digests) {
                for (std::uint64_t r = 0; r < count; ++r) content += layout::content_term(digests[r], done + r);
              });
  if (content != t.content_digest) {
    throw CheckpointError("{}: damaged: {} does not match its content digest", file_.path(), t.path);
  }
}

void CheckpointReader::verify_rows(Communicator& world) const {
  together(world, [&] {
    for (const Tensor& t : tensors_) {
      if (std::ranges::binary_search(damaged_, t.path)) continue;
      const BlockRange mine = block_share(static_cast<std::uint64_t>(t.shape.rows()), world.rank(), world.size());
      stream_rows(t, mine.first, mine.last - mine.first,
                  [](std::uint64_t, std::uint64_t, const std::byte*, const std::uint64_t*) {});
    }
    return std::string();
  });
}

}  // namespace tforge
