#pragma once
// A training job from its configuration to its exit code: start or resume, train, evaluate, save, stop.
#include <optional>
#include <string>

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
};

/// Runs to the end of train.steps or train.max_tokens (done) or of train.max_time (requeue), saving into run.dir and
/// writing run.dir/metrics.jsonl. Collective over `world`.
/// Throws ConfigError, DataError, ResourceError, CheckpointError, DivergedError.
ExitCode run_training(Communicator& world, const RunRequest& request);

/// What the run would be, as text: resolved configuration, parameters, memory by purpose per rank, FLOPs per token,
/// communication of a step, tokens per step. Reads the dataset's head and a checkpoint's configuration; writes nothing.
std::string plan_text(Communicator& world, const RunRequest& request);

/// OpenMP threads for this rank: run.threads, or the cores this process may use divided by the ranks on its node
/// (at least 1). Collective.
int threads_per_rank(Communicator& world, std::int64_t configured);

}  // namespace tforge
