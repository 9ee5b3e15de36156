#pragma once
// One training run: steps, evaluation and checkpoints of one model on one dataset.
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/allocator.h"
#include "data/prefetcher.h"
#include "data/sampler.h"
#include "data/token_dataset.h"
#include "model/models.h"
#include "parallel/mesh.h"
#include "train/evaluate.h"
#include "train/gradient_pass.h"
#include "train/optimizer.h"
#include "train/run_state.h"
#include "train/schedule.h"

namespace tforge {

enum class Update : std::uint8_t { applied, skipped };

struct StepResult {
  double loss = 0;       // mean negative log-likelihood over the global batch, nats a token
  double grad_norm = 0;  // before clipping
  double lr = 0;
  double data_wait_seconds = 0;     // for samples that were not read ahead in time, on this rank
  std::int64_t floored_rows = 0;    // below the norm floor, on this rank
  Update update = Update::applied;  // skipped: the loss or the gradients were not finite
};

/// A model with its optimizer on this rank of the mesh, in the memory of `allocator`. Allocator, stream, mesh and
/// dataset outlive it.
class Trainer {
 public:
  /// A new model, initialised from config.train.seed.
  Trainer(const RunConfig& config, const TokenDataset& dataset, Mesh& mesh, Allocator& allocator, Stream& stream);
  /// The model of a checkpoint, as `config` (already made by resumed()) wants it to go on. Start-of-stage actions of a
  /// growth that has not been trained on yet happen here, once, and are marked in the state.
  Trainer(const RunConfig& config, const TokenDataset& dataset, Mesh& mesh, Allocator& allocator, Stream& stream,
          const CheckpointReader& reader);

  /// One update from the next config.train.batch samples, which are dealt to the dp ranks (as evenly as possible) and
  /// cut into micro-batches. A step whose loss or gradients are not finite changes no parameter, moment or age.
  /// Collective over the mesh. From the third step on it asks the system for no memory. `poll` may be empty.
  StepResult step(const PollPoint& poll = {});

  EvalResult evaluate(Split split, const EvalOptions& options);
  /// The present state as a checkpoint holds it. The rows are in the memory of model and optimizer.
  CheckpointContents contents(Retention retention) const;
  /// What was saved from contents() is a checkpoint now: the next one has it as its parent.
  void saved(const CheckpointInfo& info) { parent_uuid_ = info.uuid; }
  /// Saves under `path` and returns when that is done. Collective over `world`.
  CheckpointInfo save(Communicator& world, const std::string& path, Retention retention);

  /// Whether the rows of contents() are: those of a device are elsewhere, and staged (checkpoint/staging.h).
  bool rows_in_host_memory() const { return allocator_.device() == Device::cpu; }

  const RunConfig& config() const { return config_; }
  const RunState& state() const { return state_; }
  /// Of a batch, dealt to this rank.
  std::int64_t sequences() const { return gradients_.sequences(); }
  LanguageModel& model() { return *model_; }
  AdamW& optimizer() { return optimizer_; }
  const std::vector<GrowthRecord>& history() const { return history_; }
  /// For samples that begin anew on another dataset.
  void restart_samples() { state_.samples = 0; }

 private:
  /// Numbers of the host in the allocator's memory. The copy may be under way until the device is waited for.
  Tensor upload(const Shape& shape, std::span<const std::int32_t> values);
  /// The sequences `now` of the next global batch, while `next` are read ahead.
  MicroBatch next_batch(const MicroRange& now, const MicroRange& next);

  RunConfig config_;
  const TokenDataset& dataset_;
  Mesh& mesh_;
  Allocator& allocator_;
  Stream& stream_;
  Allocator pinned_;             // for batches on their way to a device
  std::vector<Tensor> uploads_;  // that may be under way
  std::unique_ptr<LanguageModel> model_;
  GradientPass gradients_;
  AdamW optimizer_;
  Sampler sampler_;
  Prefetcher prefetcher_;
  RunState state_;
  Schedule schedule_;
  std::vector<GrowthRecord> history_;
  std::string parent_uuid_;
};

/// The shards that the configuration asks for, given the checkpoint that the run goes on from (or none).
/// Throws ConfigError.
ShardPlan plan_shards(const RunConfig& config, int tp, const CheckpointReader* reader);

}  // namespace tforge
