#include "train/algorithm_record.h"

#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <vector>

#include "checkpoint/agreement.h"
#include "core/errors.h"
#include "core/log.h"
#include "kernels/device_libraries.h"
#include "storage/atomic_file.h"

namespace tforge {

namespace {

using Algorithms = std::map<std::string, std::string>;

constexpr const char* kName = "algorithms.json";
constexpr std::uint64_t kLimit = std::uint64_t{16} << 20;  // bytes of a record

struct Kept {
  std::string depends_on;
  Algorithms algorithms;
};

/// Throws DataError.
std::optional<Kept> read(const std::string& path) {
  if (std::error_code error; !std::filesystem::exists(path, error)) return std::nullopt;
  try {
    const auto json = nlohmann::json::parse(read_file(path, kLimit));
    return Kept{json.at("depends_on").get<std::string>(), json.at("algorithms").get<Algorithms>()};
  } catch (const nlohmann::json::exception&) {
    throw DataError("{} is damaged; remove it, and algorithms are measured anew", path);
  }
}

}  // namespace

AlgorithmRecord::AlgorithmRecord(Communicator& world, const RunConfig& config, kernels::DeviceLibraries& libraries,
                                 bool goes_on)
    : world_(world), libraries_(libraries), path_(config.run.dir + "/" + kName) {
  if (config.run.device == Device::cpu) return;
  std::string here = libraries.bits_depend_on();
  if (const std::string sums = world.bits_depend_on(); !sums.empty()) here += ", " + sums;
  const std::vector<std::string> devices = world.all_gather_bytes(here);
  depends_on_ = devices[0];
  const bool measured = config.run.products == Choosing::measured;
  for (std::size_t r = 0; r < devices.size() && measured; ++r) {
    if (devices[r] == devices[0]) continue;
    throw ConfigError("run.products = \"measured\" is for devices of one kind: rank 0 has {}, rank {} {}; use \"rule\"",
                      devices[0], r, devices[r]);
  }
  // What is kept, and whether it is for this device, as rank 0 reads it.
  const std::string text = together(world, [&]() -> std::string {
    if (world_.rank() != 0) return {};
    const std::optional<Kept> kept = read(path_);
    if (kept && kept->depends_on == depends_on_) return nlohmann::json(kept->algorithms).dump();
    if (kept) {
      log::warning("the run was on {} and goes on on {}: from here on its bits are not those of an uninterrupted run",
                   kept->depends_on, depends_on_);
    } else if (goes_on && measured) {
      log::warning("there is no {}: algorithms are measured anew, and bits may not be those of an uninterrupted run",
                   path_);
    }
    return {};
  })[0];
  const auto known = text.empty() ? Algorithms() : nlohmann::json::parse(text).get<Algorithms>();
  if (measured && !known.empty()) {
    libraries_.settle(known, path_);
    log::info("{} algorithms of products are those of {}", known.size(), path_);
    return;
  }
  measures_ = measured;
  if (!measured && text.empty()) write({});
}

void AlgorithmRecord::settle() {
  if (!measures_) return;
  measures_ = false;
  Algorithms all;
  for (const std::string& of_rank : world_.all_gather_bytes(nlohmann::json(libraries_.choices().known()).dump())) {
    all.merge(nlohmann::json::parse(of_rank).get<Algorithms>());  // keeps what it has
  }
  libraries_.settle(all, path_);
  log::info("the algorithms of {} products were chosen by measurement", all.size());
  write(all);
}

void AlgorithmRecord::write(const Algorithms& algorithms) const {
  if (world_.rank() != 0) return;
  const nlohmann::ordered_json json = {{"depends_on", depends_on_}, {"algorithms", algorithms}};
  try {
    remove_temporaries_of(path_);
    write_file_atomically(path_, json.dump(1) + "\n");
  } catch (const Error& error) {
    log::warning("the device and its algorithms are not kept for later starts: {}", error.what());
  }
}

}  // namespace tforge
