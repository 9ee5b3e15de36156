#include "storage/atomic_file.h"

#include <fcntl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>

#include "core/errors.h"
#include "core/log.h"
#include "storage/digest.h"

namespace tforge {
namespace {

[[noreturn]] void fail(const std::string& path, std::string_view what, int error) {
  if (error == ENOSPC || error == EDQUOT) {
    throw ResourceError("{}: the disk is full; free space or write elsewhere", path);
  }
  if (error == EFBIG) throw ResourceError("{}: larger than a file may be here; see ulimit -f", path);
  throw DataError("{}: {}: {}", path, what, std::strerror(error));
}

constexpr std::size_t kHexDigits = 16;
constexpr std::string_view kEnd = ".tmp";

}  // namespace

PlainFile::PlainFile(const std::string& path, Access access, const std::string& shown)
    : path_(shown.empty() ? path : shown) {
  const int flags = access == Access::read ? O_RDONLY : O_RDWR;
  descriptor_ = ::open(path.c_str(), flags | O_CLOEXEC);
  if (descriptor_ < 0) fail(path_, "cannot be opened", errno);
}

PlainFile::PlainFile(PlainFile&& other) noexcept
    : path_(std::move(other.path_)), descriptor_(std::exchange(other.descriptor_, -1)) {}

PlainFile& PlainFile::operator=(PlainFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(descriptor_, other.descriptor_);
  return *this;
}

PlainFile::~PlainFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

std::uint64_t PlainFile::size() const {
  struct stat status {};
  if (::fstat(descriptor_, &status) != 0) fail(path_, "has no size", errno);
  if (!S_ISREG(status.st_mode)) throw DataError("{}: not a file", path_);
  return static_cast<std::uint64_t>(status.st_size);
}

void PlainFile::write_at(std::uint64_t offset, const void* bytes, std::size_t count) const {
  const char* from = static_cast<const char*>(bytes);
  while (count > 0) {
    const ssize_t done = ::pwrite(descriptor_, from, count, static_cast<off_t>(offset));
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) fail(path_, "cannot be written", errno);
    from += done;
    offset += static_cast<std::uint64_t>(done);
    count -= static_cast<std::size_t>(done);
  }
}

void PlainFile::read_at(std::uint64_t offset, void* bytes, std::size_t count) const {
  char* to = static_cast<char*>(bytes);
  while (count > 0) {
    const ssize_t done = ::pread(descriptor_, to, count, static_cast<off_t>(offset));
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) fail(path_, "cannot be read", errno);
    if (done == 0) throw DataError("{}: ends at byte {}, {} more were expected", path_, offset, count);
    to += done;
    offset += static_cast<std::uint64_t>(done);
    count -= static_cast<std::size_t>(done);
  }
}

void PlainFile::reserve(std::uint64_t bytes) const {
  if (bytes == 0) return;
  while (::fallocate(descriptor_, 0, 0, static_cast<off_t>(bytes)) != 0) {
    if (errno == EINTR) continue;
    if (errno == EOPNOTSUPP || errno == ENOSYS) return;  // some network file systems; writes will tell
    fail(path_, "cannot be extended", errno);
  }
}

void PlainFile::sync() const {
  if (::fsync(descriptor_) != 0) fail(path_, "cannot be synced to the disk", errno);
}

void PlainFile::close() {
  if (descriptor_ < 0) return;
  if (::close(std::exchange(descriptor_, -1)) != 0) fail(path_, "cannot be closed", errno);
}

AtomicFile::AtomicFile(std::string target) : target_(std::move(target)) {
  temporary_ = temporary_name(target_);
  file_.path_ = target_;
  file_.descriptor_ = ::open(temporary_.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (file_.descriptor_ < 0) {
    const int error = errno;
    temporary_.clear();
    fail(target_, "cannot be created", error);
  }
}

AtomicFile::AtomicFile(AtomicFile&& other) noexcept
    : target_(std::move(other.target_)),
      temporary_(std::exchange(other.temporary_, std::string())),
      file_(std::move(other.file_)) {}

AtomicFile::~AtomicFile() {
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

void AtomicFile::commit() {
  file_.sync();
  file_.close();
  if (::rename(temporary_.c_str(), target_.c_str()) != 0) fail(target_, "cannot be renamed from its temporary", errno);
  temporary_.clear();
  sync_folder(folder_of(target_));
}

void write_file_atomically(const std::string& path, std::string_view bytes) {
  AtomicFile file(path);
  file.file().write_at(0, bytes.data(), bytes.size());
  file.commit();
}

std::string read_file(const std::string& path, std::uint64_t limit) {
  const PlainFile file(path, PlainFile::Access::read);
  const std::uint64_t size = file.size();
  if (size > limit) throw DataError("{}: {} bytes, want at most {}", path, size, limit);
  std::string bytes(size, '\0');
  file.read_at(0, bytes.data(), bytes.size());
  return bytes;
}

std::string folder_of(const std::string& path) {
  const std::size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

void sync_folder(const std::string& folder) {
  const int descriptor = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor < 0) fail(folder, "the folder cannot be opened", errno);
  const int result = ::fsync(descriptor);
  const int error = errno;
  ::close(descriptor);
  // Some file systems cannot sync a folder and say EINVAL; their renames are durable by themselves.
  if (result != 0 && error != EINVAL) fail(folder, "the folder cannot be synced", error);
}

std::string temporary_name(const std::string& target) {
  std::uint64_t bits = 0;
  if (::getrandom(&bits, sizeof bits, 0) != static_cast<ssize_t>(sizeof bits)) {
    throw ResourceError("the system gives no random numbers: {}", std::strerror(errno));
  }
  return fmt::format("{}/.{}.{}{}", folder_of(target), target.substr(target.rfind('/') + 1), hex(bits), kEnd);
}

std::string_view target_of_temporary(std::string_view name) {
  name.remove_prefix(1);
  name.remove_suffix(kEnd.size() + kHexDigits + 1);
  return name;
}

bool is_temporary_name(std::string_view name) {
  if (name.size() < kHexDigits + kEnd.size() + 3 || name.front() != '.' || !name.ends_with(kEnd)) return false;
  name.remove_suffix(kEnd.size());
  const std::string_view digits = name.substr(name.size() - kHexDigits);
  return name[name.size() - kHexDigits - 1] == '.' && std::all_of(digits.begin(), digits.end(), [](char c) {
           return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
         });
}

void remove_temporaries_of(const std::string& target) {
  const std::string folder = folder_of(target);
  std::error_code error;
  for (std::filesystem::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    const std::string name = it->path().filename();
    if (!is_temporary_name(name) || target_of_temporary(name) != target.substr(target.rfind('/') + 1)) continue;
    if (::unlink(it->path().c_str()) == 0) log::info("removed {}/{}, left by a killed job", folder, name);
  }
}

}  // namespace tforge
