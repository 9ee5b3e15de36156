#pragma once
// What a run would be: memory, work, communication and time of a step, and of the stages of a growth plan, without
// computing one.
#include <optional>
#include <string>
#include <vector>

#include "core/profile.h"
#include "parallel/communicator.h"
#include "parallel/mesh.h"
#include "train/communication_model.h"
#include "train/config.h"
#include "train/device_profile.h"
#include "train/run.h"

namespace tforge {

/// Bytes of one rank at its peak.
struct RankMemory {
  double weights = 0, gradients = 0, moments = 0;
  double step = 0;  // activations, workspace and communication buffers where the sum of all is largest
  // Of which, each at its own peak:
  double activations = 0, workspace = 0, communication = 0;
  double saving = 0;  // the copy from which a checkpoint is written beside the training
  double total() const { return weights + gradients + moments + step + saving; }
};

/// A training step (without evaluation and checkpoints).
struct StepPlan {
  MeshSize mesh;
  std::int64_t tokens = 0;              // of the global batch
  double flops = 0;                     // of the model, all ranks together (ModelConfig::train_flops_per_token)
  std::vector<RankMemory> memory;       // by tp rank, for the rank of dp that holds most
  std::vector<Profile::Entry> kernels;  // of rank 0: calls and work
  std::vector<Exchange> exchanges;      // of rank 0

  int ranks() const { return mesh.dp * mesh.tp; }
};

/// By rehearsal (train/lone_rank.h), with the workspace of the threads of this process. `shards` is for mesh.tp ranks;
/// model.vocab is set. Throws ConfigError for what the layout cannot be.
StepPlan plan_step(const RunConfig& config, const ShardPlan& shards, const MeshSize& mesh);

/// Seconds of a step of rank 0, which has no less to do than others.
struct StepTime {
  double kernels = 0;                // computing
  double between = 0;                // and what lies between kernels
  double communication = 0;          // all collectives over the link,
  double exposed = 0;                // and of them what backward does not hide
  std::vector<std::string> unknown;  // kernels that the profile has not measured

  double total() const { return kernels + between + exposed; }
};
/// Backward is taken as two thirds of the computing. `link` is needed for more than one rank. Throws ConfigError when
/// it is missing, or when the profile is of another dtype or number of threads.
StepTime predict(const RunConfig& config, const StepPlan& plan, const DeviceProfile& device,
                 const std::optional<Link>& link);

/// The resolved configuration and a step of it, as text. Reads the dataset's head and a checkpoint's configuration;
/// writes nothing. Collective.
std::string plan_text(Communicator& world, const RunRequest& request);

/// Of a configuration that nothing has been trained of yet, in one process: see tf_plan. `ranks` 0: as many as
/// parallel.dp and parallel.tp say, each 1 where it is 0. Where there is no dataset, model.vocab says the vocabulary.
struct PlanRequest {
  std::int64_t ranks = 0;
  std::optional<DeviceProfile> device;
  std::optional<Link> link;  // in place of the profile's
};
std::string configuration_plan_text(RunConfig config, const PlanRequest& request);

/// A growth plan as slurm/submit_stages reads it (docs/slurm.md), stage by stage, and beside it the last stage's model
/// trained from scratch on as many tokens. Throws ConfigError.
std::string stages_plan_text(const std::string& path, const PlanRequest& request);

}  // namespace tforge
