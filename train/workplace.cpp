#include "train/workplace.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <string>
#include <vector>

#include "core/errors.h"
#include "core/log.h"
#include "kernels/device_libraries.h"
#include "train/config_schema.h"
#include "train/threads.h"

namespace tforge {

namespace {

/// What is called without a device, in front of what a rank says of its own.
constexpr std::string_view kNone = "none: ";

/// The number of the device that this rank takes.
int chosen(Communicator& world, Device device, DeviceUse use) {
  if (device == Device::cpu) return 0;
  const std::string host = host_name();
  const std::vector<std::string> hosts = world.all_gather_bytes(host);
  const auto before = static_cast<int>(std::count(hosts.begin(), hosts.begin() + world.rank(), host));
  const Devices found = devices_of(device);
  const int number = found.count == 0 ? 0 : before % found.count;
  // A launcher may show each rank another device, as the only one: what it is counts, not its number.
  const std::vector<std::string> ids = world.all_gather_bytes(
      found.count == 0 ? std::string(kNone) + found.why_none : fmt::format("{} {}", host, id_of(device, number)));
  for (const std::string& id : ids) {
    if (id.starts_with(kNone)) {
      throw DeviceError(
          "run.device = \"{}\": there is none here: {}; use run.device = \"cpu\", or start where there is one",
          name_of(device), id.substr(kNone.size()));
    }
  }
  for (std::size_t r = 0; r < ids.size() && use == DeviceUse::own; ++r) {
    const auto other = static_cast<std::size_t>(std::ranges::find(ids, ids[r]) - ids.begin());
    if (other == r) continue;
    throw ConfigError(
        "run.device = \"{}\": ranks {} and {} would use the same device of {}, where {} ranks are; start as many "
        "ranks as there are devices, or let ranks share one with parallel.share_device = true",
        name_of(device), other, r, hosts[r], std::ranges::count(hosts, hosts[r]));
  }
  log::info("computes on {} device {} of {}{}", name_of(device), number, found.count,
            use == DeviceUse::shared ? ", which ranks may share" : "");
  return number;
}

std::unique_ptr<Communicator> connected(Communicator& world, Stream& stream, DeviceUse use) {
  if (stream.device() == Device::cpu || world.size() == 1) return nullptr;
  if (use == DeviceUse::shared) return create_staged(world, stream);
  return create_nccl(world, stream);
}

}  // namespace

RunConfig placed(RunConfig config, const std::string& device, bool share_device) {
  const Field& field = *find_field("run.device");
  if (std::ranges::find(field.choices, device) == field.choices.end()) {
    throw UsageError("--device {}: there are {}", device, fmt::join(field.choices, " and "));
  }
  field.set(config, device);
  config.parallel.share_device = share_device ? DeviceUse::shared : DeviceUse::own;
  config.run.deterministic = RunConfig().run.deterministic;  // of training
  config.run.products = RunConfig().run.products;
  if (config.run.device == Device::cpu) {
    config.train.dtype = compute_dtype(config.train.dtype);
    config.train.f32_products = F32Products::exact;
  }
  validate(config);
  return config;
}

Workplace::Workplace(Communicator& world, Device device, DeviceUse use, F32Products f32, Choosing how)
    : world_(world),
      queue_(device, chosen(world, device, use)),
      device_world_(connected(world, queue_.stream(), use)),
      memory_(queue_.stream()),
      host_memory_(queue_.stream(), HostMemory::pinned),
      libraries_(std::make_unique<kernels::DeviceLibraries>(queue_.stream(), memory_, f32, how)) {}

Workplace::Workplace(Communicator& world, const RunConfig& config)
    : Workplace(world, config.run.device, config.parallel.share_device, config.train.f32_products,
                config.run.products) {}

Workplace::~Workplace() = default;

}  // namespace tforge
