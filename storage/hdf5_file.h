#pragma once
// One HDF5 file, by paths: groups, contiguous datasets and attributes, with every size and type checked before
// memory is taken. The HDF5 library stays behind this header; use it from one thread at a time.
//
// Files are ordinary HDF5 (superblock version 2) for h5py and h5dump. Datasets are little-endian, contiguous,
// unfiltered, allocated when created and never filled; those of at least 4 KiB start at a multiple of 4096 bytes.
// Read from a file of other hands: chunked, external and virtual datasets and links that leave the file are
// refused, so nothing in a file decides which other file is opened or how much memory is taken.
//
// Unless said otherwise every function throws DataError (file, path, reason), or ResourceError for a full disk.
#include <cstddef>
#include <cstdint>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "core/errors.h"

namespace tforge {

enum class StoredType : std::uint8_t { f32, f64, i32, i64, u8, u16, u32, u64 };
std::string_view name_of(StoredType type);
std::size_t size_of(StoredType type);

template <class T>
struct stored_type_of;
template <>
struct stored_type_of<float> {
  static constexpr StoredType value = StoredType::f32;
};
template <>
struct stored_type_of<double> {
  static constexpr StoredType value = StoredType::f64;
};
template <>
struct stored_type_of<std::int32_t> {
  static constexpr StoredType value = StoredType::i32;
};
template <>
struct stored_type_of<std::int64_t> {
  static constexpr StoredType value = StoredType::i64;
};
template <>
struct stored_type_of<std::uint8_t> {
  static constexpr StoredType value = StoredType::u8;
};
template <>
struct stored_type_of<std::uint16_t> {
  static constexpr StoredType value = StoredType::u16;
};
template <>
struct stored_type_of<std::uint32_t> {
  static constexpr StoredType value = StoredType::u32;
};
template <>
struct stored_type_of<std::uint64_t> {
  static constexpr StoredType value = StoredType::u64;
};

/// A dataset whose type is known and whose bytes lie inside the file.
struct DatasetInfo {
  StoredType type = StoredType::u8;
  std::vector<std::uint64_t> shape;  // empty for a scalar
  std::uint64_t bytes = 0;
  std::uint64_t offset = 0;  // of the first byte in the file; 0 when `mappable` is false
  bool mappable = false;     // the bytes can be read at `offset` with pread or mmap
  /// Product of the extents.
  std::uint64_t elements() const { return bytes / size_of(type); }
  /// First extent; 1 for a scalar. Row ranges below count along it.
  std::uint64_t rows() const { return shape.empty() ? 1 : shape[0]; }
  /// "u16 [1200, 4]"
  std::string text() const;
};

/// The value of an attribute. Integers of any width are read as i64 or u64, floats as f64.
using AttributeValue = std::variant<std::int64_t, std::uint64_t, double, std::string, std::vector<std::int64_t>,
                                    std::vector<std::uint64_t>, std::vector<double>>;

class Hdf5File {
 public:
  enum class Access : std::uint8_t { read, modify };
  /// Whose writer made the file. Of our own only what our writer makes is read: superblock 2 without an extension, text
  /// of fixed length. That spares the library the part of its parsing that trusts a file most.
  enum class Maker : std::uint8_t { tokenforge, anybody };

  /// A new file; an existing one is emptied.
  static Hdf5File create(const std::string& path);
  /// Throws for a file that is missing, is not HDF5 or is shorter than its own superblock says.
  static Hdf5File open(const std::string& path, Access access = Access::read, Maker maker = Maker::tokenforge);
  Hdf5File(Hdf5File&& other) noexcept;
  Hdf5File& operator=(Hdf5File&& other) noexcept;
  Hdf5File(const Hdf5File&) = delete;
  Hdf5File& operator=(const Hdf5File&) = delete;
  /// Closes without reporting; a writer calls close() to learn of a failed write.
  ~Hdf5File();
  void close();

  const std::string& file_path() const { return path_; }
  /// Length when opened.
  std::uint64_t file_bytes() const { return file_bytes_; }

  /// Creates the group and those above it; existing ones are kept.
  void create_group(const std::string& path);
  bool exists(const std::string& path) const;
  bool is_group(const std::string& path) const;
  bool is_dataset(const std::string& path) const;
  /// Names in a group, sorted.
  std::vector<std::string> children(const std::string& path) const;
  /// Paths of all datasets below a group, sorted, groups nested at most 64 deep.
  std::vector<std::string> datasets_below(const std::string& path) const;

  /// Creates a dataset (and the groups above it) with undefined content.
  void create_dataset(const std::string& path, StoredType type, std::span<const std::uint64_t> shape);
  DatasetInfo info(const std::string& path) const;

  /// Creates a dataset and writes it. The number of values must be that of the shape (InternalError).
  template <class T>
  void write(const std::string& path, std::span<const std::uint64_t> shape, std::span<const T> values) {
    create_dataset(path, stored_type_of<T>::value, shape);
    write_range(path, stored_type_of<T>::value, Range::whole, 0, values.size(), values.data());
  }
  /// A dataset of one dimension.
  template <class T>
  void write(const std::string& path, std::span<const T> values) {
    const std::uint64_t shape[] = {values.size()};
    write(path, shape, values);
  }
  /// Writes whole rows from `first_row` on into an existing dataset of T.
  template <class T>
  void write_rows(const std::string& path, std::uint64_t first_row, std::span<const T> values) {
    write_range(path, stored_type_of<T>::value, Range::rows, first_row, values.size(), values.data());
  }
  /// All elements of a dataset of T.
  template <class T>
  std::vector<T> read(const std::string& path) const {
    std::vector<T> values(checked_elements(path, stored_type_of<T>::value));
    read_range(path, stored_type_of<T>::value, Range::whole, 0, values.size(), values.data());
    return values;
  }
  /// Fills `values` with whole rows from `first_row` on.
  template <class T>
  void read_rows(const std::string& path, std::uint64_t first_row, std::span<T> values) const {
    read_range(path, stored_type_of<T>::value, Range::rows, first_row, values.size(), values.data());
  }

  /// Bytes as a u8 dataset of one dimension; any content, also empty.
  void write_bytes(const std::string& path, std::string_view bytes);
  std::string read_bytes(const std::string& path) const;
  /// UTF-8 text without NUL as a scalar string dataset.
  void write_text(const std::string& path, std::string_view text);
  std::string read_text(const std::string& path) const;

  /// Sets an attribute of a group or dataset, replacing one of that name.
  void set_attribute(const std::string& path, const std::string& name, const AttributeValue& value);
  bool has_attribute(const std::string& path, const std::string& name) const;
  std::vector<std::string> attribute_names(const std::string& path) const;
  AttributeValue attribute(const std::string& path, const std::string& name) const;
  /// As T (std::int64_t, std::uint64_t, double, std::string or a vector of the first three). An integer is converted
  /// when its value fits, and an integer is not a double.
  template <class T>
  T attribute(const std::string& path, const std::string& name) const;

 private:
  enum class Range : std::uint8_t { whole, rows };
  Hdf5File(std::string path, std::int64_t id) : path_(std::move(path)), id_(id) {}
  [[noreturn]] void fail(const std::string& path, std::string_view what) const;
  std::int64_t open_object(const std::string& path) const;
  std::int64_t open_dataset(const std::string& path) const;
  DatasetInfo describe(const std::string& path, std::int64_t dataset) const;
  std::uint64_t checked_elements(const std::string& path, StoredType type) const;
  void write_range(const std::string& path, StoredType type, Range range, std::uint64_t first_row,
                   std::uint64_t elements, const void* values);
  void read_range(const std::string& path, StoredType type, Range range, std::uint64_t first_row,
                  std::uint64_t elements, void* values) const;
  /// No content of the file takes more.
  std::uint64_t most_bytes() const;
  bool is_hard_link(const std::string& path) const;
  void collect_datasets(const std::string& path, int depth, std::set<std::uint64_t>& groups,
                        std::vector<std::string>& found) const;

  std::string path_;
  std::int64_t id_ = -1;
  std::uint64_t file_bytes_ = 0;  // 0 for a new file: sizes are then not compared with it
  Maker maker_ = Maker::tokenforge;
};

}  // namespace tforge
