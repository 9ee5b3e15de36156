#include "train/starts.h"

#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "core/errors.h"
#include "core/log.h"
#include "storage/atomic_file.h"

namespace tforge {

namespace {

constexpr const char* kName = "starts.json";
constexpr std::uint64_t kLimit = 4096;  // bytes of a record

}  // namespace

StartRecord StartRecord::count(const std::string& folder, std::int64_t step, const std::string& fingerprint,
                               std::int64_t max_restarts) {
  const std::string path = folder + "/" + kName;
  remove_temporaries_of(path);
  std::int64_t before = 0;
  if (std::error_code error; std::filesystem::exists(path, error)) {
    const auto json = nlohmann::json::parse(read_file(path, kLimit), nullptr, /*allow_exceptions=*/false);
    const auto damaged = [&] {
      throw DataError("{} is damaged; remove it: the starts of the run are counted anew", path);
    };
    const auto number = [&](const char* name) {
      if (!json.is_object() || !json.contains(name) || !json[name].is_number_integer()) damaged();
      return json[name].get<std::int64_t>();
    };
    const std::int64_t from = number("step"), starts = number("starts");
    if (!json.contains("fingerprint") || !json["fingerprint"].is_string()) damaged();
    if (from == step && json["fingerprint"] == fingerprint) before = starts;
  }
  if (max_restarts > 0 && before > max_restarts) {
    const char* requeues = std::getenv("SLURM_RESTART_COUNT");
    throw CrashLoopError(
        "{} starts from step {} have saved no later step{}; read the log of the last ones, and mend what ends them: "
        "another configuration or build counts anew, and so does a removed {}; run.max_restarts = {} is the limit",
        before, step, requeues == nullptr ? "" : fmt::format(" (SLURM has restarted this job {} times)", requeues),
        path, max_restarts);
  }
  StartRecord record(path, step, fingerprint, before + 1);
  record.write();
  return record;
}

void StartRecord::write() const {
  const nlohmann::ordered_json json = {{"step", step_}, {"starts", starts_}, {"fingerprint", fingerprint_}};
  try {
    write_file_atomically(path_, json.dump() + "\n");
  } catch (const Error& error) {
    log::warning("this start is not counted (run.max_restarts): {}", error.what());
  }
}

void StartRecord::forgive() {
  --starts_;
  write();
}

void StartRecord::remove() const {
  std::error_code ignored;
  std::filesystem::remove(path_, ignored);
}

}  // namespace tforge
