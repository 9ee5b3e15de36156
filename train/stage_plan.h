#pragma once
// A growth plan as slurm/submit_stages reads it (docs/slurm.md), as far as it decides what is computed.
#include <cstdint>
#include <string>
#include <vector>

#include "train/config.h"

namespace tforge {

/// The vocabulary of the dataset, where there is one; else model.vocab has to be given. Throws ConfigError, DataError.
void take_vocab(RunConfig& config);

struct PlannedStage {
  RunConfig config;         // of the stage, with the model that it has by then
  std::int64_t tokens = 0;  // to train
  std::int64_t ranks = 1;
};

/// The stages in their order. What belongs to jobs and to evaluation is not looked at: submit_stages does that.
/// Throws ConfigError naming file and stage.
std::vector<PlannedStage> load_stages(const std::string& path);

}  // namespace tforge
