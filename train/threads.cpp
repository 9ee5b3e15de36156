#include "train/threads.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <array>

namespace tforge {

std::string host_name() {
  std::array<char, 256> host{};
  return ::gethostname(host.data(), host.size() - 1) == 0 ? host.data() : "?";
}

int threads_per_rank(Communicator& world, std::int64_t configured) {
  const std::vector<std::string> hosts = world.all_gather_bytes(host_name());
  if (configured > 0) return static_cast<int>(configured);
  cpu_set_t set;
  CPU_ZERO(&set);
  const int cores = ::sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
  const auto neighbours =
      std::max<std::ptrdiff_t>(std::ranges::count(hosts, hosts[static_cast<std::size_t>(world.rank())]), 1);
  return std::max(1, cores / static_cast<int>(neighbours));
}

}  // namespace tforge
