#include "train/metrics.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <system_error>

#include "core/errors.h"
#include "core/log.h"

namespace tforge {

namespace {

constexpr std::size_t kMostWaiting = 16 << 20;

/// Bytes of the leading lines that are whole and not later than `step`.
std::uintmax_t bytes_to_keep(const std::string& path, std::int64_t step) {
  std::ifstream file(path, std::ios::binary);
  std::uintmax_t keep = 0;
  for (std::string line; std::getline(file, line) && !file.eof();) {
    const auto object = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!object.is_object()) break;
    const auto at = object.find("step");
    if (at != object.end() && at->is_number_integer() && at->get<std::int64_t>() > step) break;
    keep += line.size() + 1;
  }
  return keep;
}

[[noreturn]] void fail(const std::string& path, const char* what, int error) {
  throw ResourceError("{}: cannot be {}: {}", path, what, std::generic_category().message(error));
}

}  // namespace

MetricsWriter::MetricsWriter(std::string path, std::int64_t step) : path_(std::move(path)) {
  std::error_code error;
  if (std::filesystem::is_regular_file(path_, error)) {
    std::filesystem::resize_file(path_, step < 0 ? 0 : bytes_to_keep(path_, step), error);
    if (error) fail(path_, "shortened", error.value());
  }
  if (const int refused = open(); refused != 0) fail(path_, "opened", refused);
}

MetricsWriter::~MetricsWriter() {
  if (const int error = write_waiting(); error != 0 || lost_ > 0) {
    log::error("{}: its last lines are lost: {}", path_, std::generic_category().message(error));
  }
  if (descriptor_ >= 0) ::close(descriptor_);
}

/// 0 or what the system said.
int MetricsWriter::open() {
  if (descriptor_ >= 0) ::close(descriptor_);
  descriptor_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
  end_ = descriptor_ >= 0 ? std::max<off_t>(::lseek(descriptor_, 0, SEEK_END), 0) : 0;
  return descriptor_ >= 0 ? 0 : errno;
}

/// 0 or what the system said.
int MetricsWriter::write_waiting() {
  struct stat status {};
  if (descriptor_ < 0 || ::fstat(descriptor_, &status) != 0 || status.st_nlink == 0) {
    if (const int error = open(); error != 0) return error;
  }
  while (!waiting_.empty()) {
    const ssize_t done = ::pwrite(descriptor_, waiting_.data(), waiting_.size(), end_);
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) return errno;
    end_ += done;
    waiting_.erase(0, static_cast<std::size_t>(done));
  }
  return 0;
}

void MetricsWriter::write(std::initializer_list<Metric> members) {
  nlohmann::ordered_json object = nlohmann::ordered_json::object();
  for (const Metric& member : members) {
    std::visit([&](const auto& value) { object[std::string(member.name)] = value; }, member.value);
  }
  const std::string line = object.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
  const bool waited = !waiting_.empty();
  if (waiting_.size() + line.size() > kMostWaiting) ++lost_;
  else waiting_ += line;
  const int error = write_waiting();
  if (error != 0 && !waited) {
    log::warning("{}: cannot be written: {}; its lines wait until it can", path_,
                 std::generic_category().message(error));
  } else if (error == 0 && waited) {
    log::info("{}: written again{}", path_, lost_ > 0 ? fmt::format(", without {} lines", lost_) : "");
    lost_ = 0;
  }
}

}  // namespace tforge
