#include "train/metrics.h"

#include <cerrno>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <system_error>

#include "core/errors.h"

namespace tforge {

namespace {

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
  file_.reset(std::fopen(path_.c_str(), "ab"));
  if (!file_) fail(path_, "opened", errno);
}

void MetricsWriter::write(std::initializer_list<Metric> members) {
  nlohmann::ordered_json object = nlohmann::ordered_json::object();
  for (const Metric& member : members) {
    std::visit([&](const auto& value) { object[std::string(member.name)] = value; }, member.value);
  }
  const std::string line = object.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
  if (std::fwrite(line.data(), 1, line.size(), file_.get()) != line.size() || std::fflush(file_.get()) != 0) {
    fail(path_, "written", errno);
  }
}

}  // namespace tforge
