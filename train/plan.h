#pragma once
// What a run would be, as text.
#include <string>

#include "parallel/communicator.h"
#include "train/run.h"

namespace tforge {

/// Resolved configuration, parameters, memory by purpose per rank, FLOPs per token, communication of a step, tokens per
/// step. Reads the dataset's head and a checkpoint's configuration; writes nothing. Collective.
std::string plan_text(Communicator& world, const RunRequest& request);

}  // namespace tforge
