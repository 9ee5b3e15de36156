#pragma once
// A training job from its configuration to its exit code: start or resume, train, evaluate, save, stop.
#include <optional>
#include <string>

#include "checkpoint/reader.h"
#include "core/errors.h"
#include "parallel/communicator.h"
#include "train/config.h"

namespace tforge {

enum class DatasetChange : std::uint8_t { refuse, accept };

struct RunRequest {
  LoadedConfig asked;
  /// A checkpoint to start from when run.dir has none yet: a grown one, or one of another run.
  std::optional<std::string> init;
  /// Whether the run may go on with another dataset than the checkpoint's (same tokenizer); its samples begin anew.
  DatasetChange dataset = DatasetChange::refuse;
  /// Whether the run may go on from a checkpoint with damaged moments; those begin anew.
  CheckpointReader::Salvage salvage = CheckpointReader::Salvage::nothing;
};

/// Runs to the end of train.steps or train.max_tokens (done) or of train.max_time (requeue), saving into run.dir and
/// writing run.dir/metrics.jsonl. Goes on from the newest whole checkpoint of run.dir; damaged ones are named and set
/// aside. What the disk refuses on the way is tried again and ends the run only when the last state cannot be saved.
/// Collective over `world`.
/// Throws ConfigError, DataError, ResourceError, CheckpointError, DivergedError.
ExitCode run_training(Communicator& world, const RunRequest& request);

}  // namespace tforge
