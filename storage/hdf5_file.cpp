#include "storage/hdf5_file.h"

#include <fcntl.h>
#include <fmt/ranges.h>
#include <hdf5.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <limits>
#include <set>
#include <utility>

#include "storage/atomic_file.h"

namespace tforge {
namespace {

static_assert(std::is_same_v<hid_t, std::int64_t> || sizeof(hid_t) == sizeof(std::int64_t));

constexpr hsize_t kAlignment = 4096;
constexpr int kMaxDepth = 64;
constexpr std::size_t kMaxObjects = 1U << 20;
constexpr std::uint64_t kMaxAttributeBytes = 64U << 20;

/// An HDF5 identifier of any kind.
class Handle {
 public:
  explicit Handle(hid_t id) : id_(id) {}
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  ~Handle() {
    if (id_ >= 0) H5Idec_ref(id_);
  }
  hid_t get() const { return id_; }
  bool valid() const { return id_ >= 0; }

 private:
  hid_t id_;
};

/// The library prints nothing by itself and loads no code for filters that a file names. Its clean-up at exit is left
/// out, because after a failed write it would try again and complain; files are closed by their owners.
void prepare_library() {
  static const bool once = [] {
    H5dont_atexit();
    H5PLset_loading_state(0);
    H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
    return true;
  }();
  static_cast<void>(once);
}

/// The innermost reason on the library's error stack, cut before its internal details.
std::string library_reason() {
  std::string reason;
  H5Ewalk2(
      H5E_DEFAULT, H5E_WALK_UPWARD,
      [](unsigned n, const H5E_error2_t* error, void* data) -> herr_t {
        if (n == 0 && error->desc != nullptr) *static_cast<std::string*>(data) = error->desc;
        return 0;
      },
      &reason);
  H5Eclear2(H5E_DEFAULT);
  std::replace(reason.begin(), reason.end(), '\n', ' ');
  return reason;
}

bool is_disk_full(std::string_view reason) {
  return reason.find("No space left on device") != std::string_view::npos ||
         reason.find("Disk quota exceeded") != std::string_view::npos;
}

hid_t file_type(StoredType type) {
  switch (type) {
    case StoredType::f32: return H5T_IEEE_F32LE;
    case StoredType::f64: return H5T_IEEE_F64LE;
    case StoredType::i32: return H5T_STD_I32LE;
    case StoredType::i64: return H5T_STD_I64LE;
    case StoredType::u8: return H5T_STD_U8LE;
    case StoredType::u16: return H5T_STD_U16LE;
    case StoredType::u32: return H5T_STD_U32LE;
    case StoredType::u64: return H5T_STD_U64LE;
  }
  throw InternalError("StoredType {} is none", static_cast<int>(type));
}

constexpr StoredType kStoredTypes[] = {StoredType::f32, StoredType::f64, StoredType::i32, StoredType::i64,
                                       StoredType::u8,  StoredType::u16, StoredType::u32, StoredType::u64};

Handle string_type(std::size_t size) {
  const hid_t type = H5Tcopy(H5T_C_S1);
  H5Tset_size(type, size);
  H5Tset_strpad(type, H5T_STR_NULLPAD);
  H5Tset_cset(type, H5T_CSET_UTF8);
  return Handle(type);
}

/// Product of the extents times `size`, or max when it does not fit.
std::uint64_t bytes_of(std::span<const std::uint64_t> shape, std::uint64_t size) {
  std::uint64_t bytes = size;
  for (const std::uint64_t extent : shape) {
    if (extent != 0 && bytes > std::numeric_limits<std::uint64_t>::max() / extent) {
      return std::numeric_limits<std::uint64_t>::max();
    }
    bytes *= extent;
  }
  return bytes;
}

std::vector<std::string> components(std::string_view path) {
  std::vector<std::string> parts;
  std::size_t begin = 0;
  while (begin < path.size()) {
    const std::size_t end = std::min(path.find('/', begin), path.size());
    if (end > begin) parts.emplace_back(path.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

bool is_object(hid_t id, H5I_type_t kind) { return id >= 0 && H5Iget_type(id) == kind; }

}  // namespace

std::string_view name_of(StoredType type) {
  switch (type) {
    case StoredType::f32: return "f32";
    case StoredType::f64: return "f64";
    case StoredType::i32: return "i32";
    case StoredType::i64: return "i64";
    case StoredType::u8: return "u8";
    case StoredType::u16: return "u16";
    case StoredType::u32: return "u32";
    case StoredType::u64: return "u64";
  }
  return "?";
}

std::size_t size_of(StoredType type) {
  switch (type) {
    case StoredType::u8: return 1;
    case StoredType::u16: return 2;
    case StoredType::f32:
    case StoredType::i32:
    case StoredType::u32: return 4;
    case StoredType::f64:
    case StoredType::i64:
    case StoredType::u64: return 8;
  }
  return 1;
}

std::string DatasetInfo::text() const { return fmt::format("{} [{}]", name_of(type), fmt::join(shape, ", ")); }

// ---- file

Hdf5File Hdf5File::create(const std::string& path) {
  prepare_library();
  const Handle access(H5Pcreate(H5P_FILE_ACCESS));
  // Superblock 2: a reader is not locked out by the flags that a killed writer leaves in version 3.
  H5Pset_libver_bounds(access.get(), H5F_LIBVER_V18, H5F_LIBVER_LATEST);
  H5Pset_alignment(access.get(), kAlignment, kAlignment);
  H5Pset_file_locking(access.get(), true, true);
  Hdf5File file(path, H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, access.get()));
  if (file.id_ < 0) file.fail("/", "cannot be created");
  return file;
}

namespace {

/// What the file starts with is what our writer makes: the fixed fields of superblock 2, and no extension, through
/// which a file may set up the library before anything of it is looked at.
void check_superblock(const std::string& path) {
  constexpr std::string_view kSignature = "\x89HDF\r\n\x1a\n";
  constexpr std::string_view kFixed = "\x02\x08\x08";  // version, bytes of an offset and of a length
  constexpr std::size_t kBase = 12, kExtension = 20, kSuperblock = 48;
  const PlainFile file(path, PlainFile::Access::read);
  std::string head(std::min<std::uint64_t>(file.size(), kSuperblock), '\0');
  file.read_at(0, head.data(), head.size());
  if (!head.starts_with(kSignature)) throw DataError("{}: not an HDF5 file ({} bytes)", path, file.size());
  const auto address = [&](std::size_t at) {
    std::uint64_t value = 0;
    std::memcpy(&value, head.data() + at, sizeof value);
    return value;
  };
  if (head.size() < kSuperblock || head.compare(kSignature.size(), kFixed.size(), kFixed) != 0 || address(kBase) != 0 ||
      address(kExtension) != HADDR_UNDEF) {
    throw DataError("{}: an HDF5 file that no writer of TokenForge has made; make it anew", path);
  }
}

}  // namespace

Hdf5File Hdf5File::open(const std::string& path, Access access_mode, Maker maker) {
  prepare_library();
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0) {
    throw DataError("{}: cannot be opened: {}", path, std::strerror(errno));
  }
  if (!S_ISREG(status.st_mode)) throw DataError("{}: not a file", path);
  if (maker == Maker::tokenforge) check_superblock(path);
  const Handle access(H5Pcreate(H5P_FILE_ACCESS));
  H5Pset_libver_bounds(access.get(), H5F_LIBVER_V18, H5F_LIBVER_LATEST);
  H5Pset_alignment(access.get(), kAlignment, kAlignment);
  H5Pset_file_locking(access.get(), true, true);
  const unsigned flags = access_mode == Access::read ? H5F_ACC_RDONLY : H5F_ACC_RDWR;
  Hdf5File file(path, H5Fopen(path.c_str(), flags, access.get()));
  if (file.id_ < 0) {
    const std::string reason = library_reason();
    if (reason.find("file signature not found") != std::string::npos) {
      throw DataError("{}: not an HDF5 file ({} bytes)", path, status.st_size);
    }
    if (reason.find("truncated file") != std::string::npos) {
      throw DataError("{}: the HDF5 file is truncated ({} bytes on disk); copy it again or make it anew", path,
                      status.st_size);
    }
    throw DataError("{}: cannot be opened as HDF5: {}", path, reason);
  }
  file.file_bytes_ = static_cast<std::uint64_t>(status.st_size);
  file.maker_ = maker;
  return file;
}

Hdf5File::Hdf5File(Hdf5File&& other) noexcept
    : path_(std::move(other.path_)),
      id_(std::exchange(other.id_, -1)),
      file_bytes_(other.file_bytes_),
      maker_(other.maker_) {}

Hdf5File& Hdf5File::operator=(Hdf5File&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(id_, other.id_);
  std::swap(file_bytes_, other.file_bytes_);
  std::swap(maker_, other.maker_);
  return *this;
}

Hdf5File::~Hdf5File() {
  if (id_ >= 0) H5Fclose(id_);
}

void Hdf5File::close() {
  if (id_ < 0) return;
  const hid_t id = std::exchange(id_, -1);
  if (H5Fclose(id) < 0) fail("/", "cannot be closed");
}

void Hdf5File::fail(const std::string& path, std::string_view what) const {
  const std::string reason = library_reason();
  const std::string where = path == "/" ? path_ : fmt::format("{}: {}", path_, path);
  const std::string message =
      reason.empty() ? fmt::format("{}: {}", where, what) : fmt::format("{}: {}: {}", where, what, reason);
  if (is_disk_full(reason)) throw ResourceError("{}: the disk is full; free space or write elsewhere", where);
  throw DataError(message);
}

// ---- groups and objects

/// Of the last link of a path whose other links are known to be hard.
bool Hdf5File::is_hard_link(const std::string& path) const {
  H5L_info_t link{};
  return H5Lget_info(id_, path.c_str(), &link, H5P_DEFAULT) >= 0 && link.type == H5L_TYPE_HARD;
}

std::int64_t Hdf5File::open_object(const std::string& path) const {
  // Only hard links are followed: a soft link may lead in a circle, an external one out of the file.
  std::string so_far;
  for (const std::string& part : components(path)) {
    so_far += "/" + part;
    if (!is_hard_link(so_far)) {
      const bool there = H5Lexists(id_, so_far.c_str(), H5P_DEFAULT) > 0;
      H5Eclear2(H5E_DEFAULT);
      fail(path, there ? "a soft or external link; only objects of the file itself are read" : "not in the file");
    }
  }
  const hid_t id = H5Oopen(id_, so_far.empty() ? "/" : so_far.c_str(), H5P_DEFAULT);
  if (id < 0) fail(path, "cannot be opened");
  return id;
}

std::int64_t Hdf5File::open_dataset(const std::string& path) const {
  const hid_t id = open_object(path);
  if (!is_object(id, H5I_DATASET)) {
    H5Idec_ref(id);
    fail(path, "not a dataset");
  }
  return id;
}

void Hdf5File::create_group(const std::string& path) {
  std::string so_far;
  for (const std::string& part : components(path)) {
    so_far += "/" + part;
    if (exists(so_far)) continue;
    const Handle group(H5Gcreate2(id_, so_far.c_str(), H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
    if (!group.valid()) fail(path, "the group cannot be created");
  }
}

bool Hdf5File::exists(const std::string& path) const {
  std::string so_far;
  for (const std::string& part : components(path)) {
    // The library would follow a soft or external link to look below it.
    if (!so_far.empty() && !is_hard_link(so_far)) return false;
    so_far += "/" + part;
    const htri_t there = H5Lexists(id_, so_far.c_str(), H5P_DEFAULT);
    if (there <= 0) {
      H5Eclear2(H5E_DEFAULT);
      return false;
    }
  }
  return true;
}

bool Hdf5File::is_group(const std::string& path) const {
  if (!exists(path)) return false;
  const Handle object(open_object(path));
  return is_object(object.get(), H5I_GROUP);
}

bool Hdf5File::is_dataset(const std::string& path) const {
  if (!exists(path)) return false;
  const Handle object(open_object(path));
  return is_object(object.get(), H5I_DATASET);
}

std::vector<std::string> Hdf5File::children(const std::string& path) const {
  const Handle group(open_object(path));
  H5G_info_t about{};
  if (!is_object(group.get(), H5I_GROUP) || H5Gget_info(group.get(), &about) < 0) fail(path, "not a group");
  // Names are collected through the links that are really there, not through the count that the file claims.
  std::vector<std::string> names;
  const auto add = [](hid_t, const char* name, const H5L_info_t*, void* data) -> herr_t {
    auto& found = *static_cast<std::vector<std::string>*>(data);
    if (found.size() >= kMaxObjects) return -1;
    found.emplace_back(name);
    return 0;
  };
  if (H5Literate(group.get(), H5_INDEX_NAME, H5_ITER_INC, nullptr, add, &names) < 0) fail(path, "cannot be listed");
  std::sort(names.begin(), names.end());
  return names;
}

void Hdf5File::collect_datasets(const std::string& path, int depth, std::set<std::uint64_t>& groups,
                                std::vector<std::string>& found) const {
  if (depth > kMaxDepth) fail(path, "groups are nested too deep");
  for (const std::string& name : children(path)) {
    const std::string child = path == "/" ? "/" + name : path + "/" + name;
    const Handle object(open_object(child));
    if (is_object(object.get(), H5I_GROUP)) {
      // A few groups that hold each other under many names make more paths than anybody can walk.
      H5O_info_t about{};
      if (H5Oget_info2(object.get(), &about, H5O_INFO_BASIC) < 0 || !groups.insert(about.addr).second) {
        fail(child, "a group that has another name too");
      }
      collect_datasets(child, depth + 1, groups, found);
    } else if (is_object(object.get(), H5I_DATASET)) {
      if (found.size() >= kMaxObjects) fail(path, "holds too many datasets");
      found.push_back(child);
    }
  }
}

std::vector<std::string> Hdf5File::datasets_below(const std::string& path) const {
  std::vector<std::string> found;
  std::set<std::uint64_t> groups;
  collect_datasets(path, 0, groups, found);
  std::sort(found.begin(), found.end());
  return found;
}

// ---- datasets

void Hdf5File::create_dataset(const std::string& path, StoredType type, std::span<const std::uint64_t> shape) {
  std::vector<std::string> parts = components(path);
  if (parts.empty()) throw InternalError("{}: a dataset needs a name", path_);
  parts.pop_back();
  create_group(fmt::format("/{}", fmt::join(parts, "/")));

  const std::vector<hsize_t> extents(shape.begin(), shape.end());
  const Handle space(extents.empty() ? H5Screate(H5S_SCALAR)
                                     : H5Screate_simple(static_cast<int>(extents.size()), extents.data(), nullptr));
  const Handle creation(H5Pcreate(H5P_DATASET_CREATE));
  H5Pset_layout(creation.get(), H5D_CONTIGUOUS);
  H5Pset_alloc_time(creation.get(), H5D_ALLOC_TIME_EARLY);
  H5Pset_fill_time(creation.get(), H5D_FILL_TIME_NEVER);
  H5Pset_obj_track_times(creation.get(), false);  // the same content gives the same bytes
  const Handle dataset(
      H5Dcreate2(id_, path.c_str(), file_type(type), space.get(), H5P_DEFAULT, creation.get(), H5P_DEFAULT));
  if (!dataset.valid()) fail(path, "the dataset cannot be created");
}

DatasetInfo Hdf5File::describe(const std::string& path, std::int64_t dataset) const {
  DatasetInfo info;
  // Before the extent is asked for: that of a virtual dataset is looked up in the files that it names.
  const Handle creation(H5Dget_create_plist(dataset));
  if (H5Pget_layout(creation.get()) != H5D_CONTIGUOUS) {
    fail(path, "stored in chunks, virtual or compact; write it contiguous and uncompressed");
  }
  if (H5Pget_external_count(creation.get()) != 0) fail(path, "stored in an external file, which is not read");
  const Handle type(H5Dget_type(dataset));
  const auto* match = std::find_if(std::begin(kStoredTypes), std::end(kStoredTypes), [&](StoredType candidate) {
    return H5Tequal(type.get(), file_type(candidate)) > 0;
  });
  if (match == std::end(kStoredTypes)) {
    fail(path, "its element type is not one of f32, f64, i32, i64, u8, u16, u32, u64 (little-endian)");
  }
  info.type = *match;

  const Handle space(H5Dget_space(dataset));
  const int rank = H5Sget_simple_extent_ndims(space.get());
  if (rank < 0 || H5Sget_simple_extent_type(space.get()) == H5S_NULL) fail(path, "has no extent");
  info.shape.resize(static_cast<std::size_t>(rank));
  std::vector<hsize_t> extents(static_cast<std::size_t>(rank));
  if (rank > 0 && H5Sget_simple_extent_dims(space.get(), extents.data(), nullptr) < 0) fail(path, "has no extent");
  std::copy(extents.begin(), extents.end(), info.shape.begin());
  info.bytes = bytes_of(info.shape, size_of(info.type));
  // Extents beside one of 0 are bounded by nothing else: what multiplies some of them must not overflow.
  std::vector<std::uint64_t> at_least_one = info.shape;
  std::ranges::replace(at_least_one, 0, 1);
  if (bytes_of(at_least_one, size_of(info.type)) > std::numeric_limits<std::int64_t>::max()) {
    fail(path, fmt::format("has impossible extents ({})", info.text()));
  }

  const haddr_t offset = H5Dget_offset(dataset);
  info.mappable = offset != HADDR_UNDEF && info.bytes > 0;
  info.offset = info.mappable ? offset : 0;
  H5Eclear2(H5E_DEFAULT);
  if (file_bytes_ != 0 && (info.bytes > file_bytes_ || (info.mappable && info.offset > file_bytes_ - info.bytes))) {
    fail(path, fmt::format("claims {} bytes ({}), more than the file of {} bytes holds", info.bytes, info.text(),
                           file_bytes_));
  }
  return info;
}

std::uint64_t Hdf5File::most_bytes() const {
  return file_bytes_ != 0 ? file_bytes_ : std::numeric_limits<std::uint64_t>::max();
}

DatasetInfo Hdf5File::info(const std::string& path) const {
  const Handle dataset(open_dataset(path));
  return describe(path, dataset.get());
}

std::uint64_t Hdf5File::checked_elements(const std::string& path, StoredType type) const {
  const DatasetInfo about = info(path);
  if (about.type != type) fail(path, fmt::format("holds {}, want {}", about.text(), name_of(type)));
  return about.elements();
}

namespace {

/// Selects `elements` elements from `first_row` on in `space`; false when they are not whole rows inside it.
bool select_rows(hid_t space, const DatasetInfo& info, std::uint64_t first_row, std::uint64_t elements) {
  if (info.shape.empty()) return false;
  const std::uint64_t rows = info.shape[0];
  const std::uint64_t row = rows == 0 ? 0 : info.elements() / rows;
  if (row == 0) return elements == 0;
  const std::uint64_t count = elements / row;
  if (elements % row != 0 || first_row > rows || count > rows - first_row) return false;
  std::vector<hsize_t> start(info.shape.size(), 0);
  std::vector<hsize_t> extent(info.shape.begin(), info.shape.end());
  start[0] = first_row;
  extent[0] = count;
  return count == 0 ? H5Sselect_none(space) >= 0
                    : H5Sselect_hyperslab(space, H5S_SELECT_SET, start.data(), nullptr, extent.data(), nullptr) >= 0;
}

}  // namespace

void Hdf5File::write_range(const std::string& path, StoredType type, Range range, std::uint64_t first_row,
                           std::uint64_t elements, const void* values) {
  const Handle dataset(open_dataset(path));
  const DatasetInfo about = describe(path, dataset.get());
  if (about.type != type) {
    throw InternalError("{}: {}: {} written to a dataset of {}", path_, path, name_of(type), about.text());
  }
  const Handle file_space(H5Dget_space(dataset.get()));
  const bool fits =
      range == Range::whole ? elements == about.elements() : select_rows(file_space.get(), about, first_row, elements);
  if (!fits) {
    throw InternalError("{}: {}: {} values from row {} on do not fit {}", path_, path, elements, first_row,
                        about.text());
  }
  if (elements == 0) return;
  const hsize_t count = elements;
  const Handle memory_space(H5Screate_simple(1, &count, nullptr));
  if (H5Dwrite(dataset.get(), file_type(type), memory_space.get(), file_space.get(), H5P_DEFAULT, values) < 0) {
    fail(path, "cannot be written");
  }
}

void Hdf5File::read_range(const std::string& path, StoredType type, Range range, std::uint64_t first_row,
                          std::uint64_t elements, void* values) const {
  const Handle dataset(open_dataset(path));
  const DatasetInfo about = describe(path, dataset.get());
  if (about.type != type) fail(path, fmt::format("holds {}, want {}", about.text(), name_of(type)));
  const Handle file_space(H5Dget_space(dataset.get()));
  const bool fits =
      range == Range::whole ? elements == about.elements() : select_rows(file_space.get(), about, first_row, elements);
  if (!fits) {
    fail(path, fmt::format("{} values from row {} on are not whole rows of {}", elements, first_row, about.text()));
  }
  if (elements == 0) return;
  const hsize_t count = elements;
  const Handle memory_space(H5Screate_simple(1, &count, nullptr));
  if (H5Dread(dataset.get(), file_type(type), memory_space.get(), file_space.get(), H5P_DEFAULT, values) < 0) {
    fail(path, "cannot be read");
  }
}

void Hdf5File::write_bytes(const std::string& path, std::string_view bytes) {
  write(path, std::span(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size()));
}

std::string Hdf5File::read_bytes(const std::string& path) const {
  std::string bytes(checked_elements(path, StoredType::u8), '\0');
  read_range(path, StoredType::u8, Range::whole, 0, bytes.size(), bytes.data());
  return bytes;
}

// ---- strings

namespace {

/// Reads one string of a dataset or attribute through `read(memory type, buffer)`; false when it is not one string of
/// at most `limit` bytes. One of variable length is read from a file of anybody's only: the library believes the
/// lengths that stand in the file (and overruns its buffer when two of them disagree), which is more than our own files
/// need.
template <class Read>
bool read_string(hid_t type, hid_t space, std::uint64_t limit, Hdf5File::Maker maker, std::string& text, Read&& read) {
  if (H5Tget_class(type) != H5T_STRING || H5Sget_simple_extent_npoints(space) != 1) return false;
  if (H5Tis_variable_str(type) != 0) {
    if (maker == Hdf5File::Maker::tokenforge) return false;
    const Handle memory(H5Tcopy(H5T_C_S1));
    H5Tset_size(memory.get(), H5T_VARIABLE);
    H5Tset_cset(memory.get(), H5Tget_cset(type));
    char* value = nullptr;
    if (read(memory.get(), static_cast<void*>(&value)) < 0) return false;
    text = value == nullptr ? "" : value;
    H5free_memory(value);
    return true;
  }
  const std::size_t size = H5Tget_size(type);
  if (size > limit) return false;
  text.assign(size, '\0');
  if (read(type, static_cast<void*>(text.data())) < 0) return false;
  const std::size_t end = text.find('\0');
  if (end != std::string::npos) text.resize(end);
  return true;
}

}  // namespace

void Hdf5File::write_text(const std::string& path, std::string_view text) {
  if (text.find('\0') != std::string_view::npos) throw InternalError("{}: {}: a text with NUL", path_, path);
  std::vector<std::string> parts = components(path);
  if (!parts.empty()) parts.pop_back();
  create_group(fmt::format("/{}", fmt::join(parts, "/")));
  const std::string padded = text.empty() ? std::string(1, '\0') : std::string(text);
  const Handle type = string_type(padded.size());
  const Handle space(H5Screate(H5S_SCALAR));
  const Handle creation(H5Pcreate(H5P_DATASET_CREATE));
  H5Pset_layout(creation.get(), H5D_CONTIGUOUS);
  H5Pset_alloc_time(creation.get(), H5D_ALLOC_TIME_EARLY);
  H5Pset_obj_track_times(creation.get(), false);
  const Handle dataset(
      H5Dcreate2(id_, path.c_str(), type.get(), space.get(), H5P_DEFAULT, creation.get(), H5P_DEFAULT));
  if (!dataset.valid()) fail(path, "the text cannot be created");
  if (H5Dwrite(dataset.get(), type.get(), H5S_ALL, H5S_ALL, H5P_DEFAULT, padded.data()) < 0) {
    fail(path, "cannot be written");
  }
}

std::string Hdf5File::read_text(const std::string& path) const {
  const Handle dataset(open_dataset(path));
  const Handle creation(H5Dget_create_plist(dataset.get()));
  if (H5Pget_layout(creation.get()) != H5D_CONTIGUOUS || H5Pget_external_count(creation.get()) != 0) {
    fail(path, "text not stored contiguous in this file");
  }
  const Handle type(H5Dget_type(dataset.get()));
  const Handle space(H5Dget_space(dataset.get()));
  std::string text;
  if (!read_string(type.get(), space.get(), most_bytes(), maker_, text, [&](hid_t memory, void* buffer) {
        return H5Dread(dataset.get(), memory, H5S_ALL, H5S_ALL, H5P_DEFAULT, buffer);
      })) {
    fail(path, "not a single string");
  }
  return text;
}

// ---- attributes

void Hdf5File::set_attribute(const std::string& path, const std::string& name, const AttributeValue& value) {
  const Handle object(open_object(path));
  if (has_attribute(path, name) && H5Adelete(object.get(), name.c_str()) < 0) fail(path, "an attribute is kept");

  const auto put = [&](hid_t type, hid_t space, const void* data) {
    const Handle attribute(H5Acreate2(object.get(), name.c_str(), type, space, H5P_DEFAULT, H5P_DEFAULT));
    if (!attribute.valid() || H5Awrite(attribute.get(), type, data) < 0) {
      fail(path, fmt::format("attribute '{}' cannot be written", name));
    }
  };
  const auto put_values = [&](hid_t type, std::size_t count, const void* data, bool scalar) {
    const hsize_t extent = count;
    const Handle space(scalar ? H5Screate(H5S_SCALAR) : H5Screate_simple(1, &extent, nullptr));
    const std::int64_t nothing = 0;
    put(type, space.get(), count == 0 ? &nothing : data);
  };
  struct Visitor {
    decltype(put)& text;
    decltype(put_values)& values;
    void operator()(std::int64_t v) const { values(H5T_STD_I64LE, 1, &v, true); }
    void operator()(std::uint64_t v) const { values(H5T_STD_U64LE, 1, &v, true); }
    void operator()(double v) const { values(H5T_IEEE_F64LE, 1, &v, true); }
    void operator()(const std::vector<std::int64_t>& v) const { values(H5T_STD_I64LE, v.size(), v.data(), false); }
    void operator()(const std::vector<std::uint64_t>& v) const { values(H5T_STD_U64LE, v.size(), v.data(), false); }
    void operator()(const std::vector<double>& v) const { values(H5T_IEEE_F64LE, v.size(), v.data(), false); }
    void operator()(const std::string& v) const {
      if (v.find('\0') != std::string::npos) throw InternalError("an attribute's text with NUL");
      const std::string padded = v.empty() ? std::string(1, '\0') : v;
      const Handle type = string_type(padded.size());
      const Handle space(H5Screate(H5S_SCALAR));
      text(type.get(), space.get(), padded.data());
    }
  };
  std::visit(Visitor{put, put_values}, value);
}

bool Hdf5File::has_attribute(const std::string& path, const std::string& name) const {
  const Handle object(open_object(path));
  const htri_t there = H5Aexists(object.get(), name.c_str());
  if (there < 0) fail(path, "attributes cannot be read");
  return there > 0;
}

std::vector<std::string> Hdf5File::attribute_names(const std::string& path) const {
  const Handle object(open_object(path));
  std::vector<std::string> names;
  const auto add = [](hid_t, const char* name, const H5A_info_t*, void* data) -> herr_t {
    auto& found = *static_cast<std::vector<std::string>*>(data);
    if (found.size() >= kMaxObjects) return -1;
    found.emplace_back(name);
    return 0;
  };
  if (H5Aiterate2(object.get(), H5_INDEX_NAME, H5_ITER_INC, nullptr, add, &names) < 0) {
    fail(path, "attributes cannot be read");
  }
  std::sort(names.begin(), names.end());
  return names;
}

AttributeValue Hdf5File::attribute(const std::string& path, const std::string& name) const {
  const Handle object(open_object(path));
  if (H5Aexists(object.get(), name.c_str()) <= 0) {
    H5Eclear2(H5E_DEFAULT);
    fail(path, fmt::format("has no attribute '{}'", name));
  }
  const Handle attribute(H5Aopen(object.get(), name.c_str(), H5P_DEFAULT));
  if (!attribute.valid()) fail(path, fmt::format("attribute '{}' cannot be opened", name));
  const Handle type(H5Aget_type(attribute.get()));
  const Handle space(H5Aget_space(attribute.get()));
  const hssize_t points = H5Sget_simple_extent_npoints(space.get());
  const int rank = H5Sget_simple_extent_ndims(space.get());
  const auto read = [&](hid_t memory, void* buffer) { return H5Aread(attribute.get(), memory, buffer); };
  const auto wrong = [&]() {
    fail(path, fmt::format("attribute '{}' is not a number, a row of numbers or a string", name));
  };

  const std::uint64_t limit = std::min(kMaxAttributeBytes, most_bytes());
  const H5T_class_t kind = H5Tget_class(type.get());
  if (kind == H5T_STRING) {
    std::string text;
    if (!read_string(type.get(), space.get(), limit, maker_, text, read)) wrong();
    return text;
  }
  // Only types that processors have: for others, which a file may describe bit by bit, the library converts by rules
  // that the file gives.
  const std::array<hid_t, 4> more = {H5T_STD_I8LE, H5T_STD_I16LE, H5T_STD_U8LE, H5T_STD_U16LE};
  const auto is = [&](hid_t candidate) { return H5Tequal(type.get(), candidate) > 0; };
  const bool plain = std::ranges::any_of(kStoredTypes, [&](StoredType t) { return is(file_type(t)); }) ||
                     std::ranges::any_of(more, is);
  if (!plain || points < 0 || rank < 0 || rank > 1 ||
      static_cast<std::uint64_t>(points) > limit / H5Tget_size(type.get())) {
    wrong();
  }
  const auto get = [&]<class T>(hid_t memory, T) -> AttributeValue {
    std::vector<T> values(static_cast<std::size_t>(points));
    if (points > 0 && read(memory, values.data()) < 0) {
      fail(path, fmt::format("attribute '{}' cannot be read", name));
    }
    if (rank == 0) return values.at(0);
    return values;
  };
  if (kind == H5T_FLOAT) return get(H5T_NATIVE_DOUBLE, double{});
  if (H5Tget_sign(type.get()) == H5T_SGN_NONE) return get(H5T_NATIVE_UINT64, std::uint64_t{});
  return get(H5T_NATIVE_INT64, std::int64_t{});
}

template <class T>
T Hdf5File::attribute(const std::string& path, const std::string& name) const {
  const AttributeValue value = attribute(path, name);
  if (const T* exact = std::get_if<T>(&value)) return *exact;
  const auto convert = [&]<class To, class From>(From from, To& to) {
    if (!std::in_range<To>(from)) fail(path, fmt::format("attribute '{}' is {}, out of range", name, from));
    to = static_cast<To>(from);
  };
  if constexpr (std::is_same_v<T, std::int64_t> || std::is_same_v<T, std::uint64_t>) {
    T result{};
    if (const auto* other = std::get_if<std::int64_t>(&value)) return convert(*other, result), result;
    if (const auto* other = std::get_if<std::uint64_t>(&value)) return convert(*other, result), result;
  }
  static constexpr const char* kKinds[] = {"an integer",     "an unsigned integer", "a float",
                                           "a string",       "a row of integers",   "a row of unsigned integers",
                                           "a row of floats"};
  fail(path,
       fmt::format("attribute '{}' is {}, want {}", name, kKinds[value.index()], kKinds[AttributeValue(T{}).index()]));
}

template std::int64_t Hdf5File::attribute(const std::string&, const std::string&) const;
template std::uint64_t Hdf5File::attribute(const std::string&, const std::string&) const;
template double Hdf5File::attribute(const std::string&, const std::string&) const;
template std::string Hdf5File::attribute(const std::string&, const std::string&) const;
template std::vector<std::int64_t> Hdf5File::attribute(const std::string&, const std::string&) const;
template std::vector<std::uint64_t> Hdf5File::attribute(const std::string&, const std::string&) const;
template std::vector<double> Hdf5File::attribute(const std::string&, const std::string&) const;

}  // namespace tforge
