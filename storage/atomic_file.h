#pragma once
// Files that appear whole or not at all, and plain reads and writes at an offset.
//
// A temporary file with a name that cannot be guessed is created beside the target (O_EXCL, mode 0666 less the
// umask), written, synced, and renamed over the target. Errors: ResourceError for a full disk or quota and for a file
// over the limit of the process, DataError for anything else, both naming the file.
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace tforge {

/// An open file descriptor. The functions may be called from any thread.
class PlainFile {
 public:
  enum class Access : std::uint8_t { read, write };
  PlainFile() = default;
  /// Opens an existing file. Messages call it `shown`, where that is not empty.
  PlainFile(const std::string& path, Access access, const std::string& shown = {});
  PlainFile(PlainFile&& other) noexcept;
  PlainFile& operator=(PlainFile&& other) noexcept;
  PlainFile(const PlainFile&) = delete;
  PlainFile& operator=(const PlainFile&) = delete;
  ~PlainFile();

  bool is_open() const { return descriptor_ >= 0; }
  const std::string& path() const { return path_; }
  std::uint64_t size() const;
  /// Writes all bytes at `offset`, however often the system takes only a part.
  void write_at(std::uint64_t offset, const void* bytes, std::size_t count) const;
  /// Fills the buffer from `offset`; a file that ends earlier is an error.
  void read_at(std::uint64_t offset, void* bytes, std::size_t count) const;
  /// Takes the disk space of the first `bytes` bytes now, where the file system can.
  void reserve(std::uint64_t bytes) const;
  /// Waits until the bytes are on the disk.
  void sync() const;
  /// Closes and reports what the system had kept back.
  void close();

 private:
  friend class AtomicFile;
  std::string path_;  // as messages call it
  int descriptor_ = -1;
};

/// A temporary file that becomes `target` at commit() and is removed by the destructor otherwise.
class AtomicFile {
 public:
  explicit AtomicFile(std::string target);
  AtomicFile(AtomicFile&& other) noexcept;
  AtomicFile& operator=(AtomicFile&&) = delete;
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile();

  const std::string& target() const { return target_; }
  const std::string& temporary() const { return temporary_; }
  /// The temporary, open for writing. Messages call it by the target's name.
  const PlainFile& file() const { return file_; }
  /// Syncs the file, renames it over the target and syncs the folder.
  void commit();

 private:
  std::string target_;
  std::string temporary_;  // empty once committed
  PlainFile file_;
};

/// Writes a whole file through AtomicFile.
void write_file_atomically(const std::string& path, std::string_view bytes);
/// The whole of a file of at most `limit` bytes.
std::string read_file(const std::string& path, std::uint64_t limit);
/// The folder part of a path; "." when there is none.
std::string folder_of(const std::string& path);
/// Makes renames and removals in a folder durable.
void sync_folder(const std::string& folder);
/// A name for a temporary of `target` that cannot be guessed, in the same folder: ".NAME.<16 hex digits>.tmp".
std::string temporary_name(const std::string& target);
/// True for such names, without their folder.
bool is_temporary_name(std::string_view name);
/// NAME of such a name.
std::string_view target_of_temporary(std::string_view name);
/// Removes the temporaries of `target` that killed jobs have left, and logs their names; what cannot be removed stays.
/// Only while nobody else writes this file.
void remove_temporaries_of(const std::string& target);

}  // namespace tforge
