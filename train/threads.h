#pragma once
// How many OpenMP threads a rank uses.
#include <cstdint>
#include <string>

#include "parallel/communicator.h"

namespace tforge {

/// The name of this node; "?" when it has none.
std::string host_name();

/// OpenMP threads for this rank: `configured`, or where that is 0 the cores this process may use divided by the ranks
/// on its node (at least 1). Collective.
int threads_per_rank(Communicator& world, std::int64_t configured);

}  // namespace tforge
