#pragma once
// The part of a training step that makes the gradients: forward and backward over this rank's share of the batch, in
// micro-batches, and the sum over the dp ranks.
#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "autograd/tape.h"
#include "core/allocator.h"
#include "model/language_model.h"
#include "parallel/grad_sync.h"
#include "parallel/mesh.h"
#include "parallel/ordered_sum.h"
#include "parallel/shard_gradients.h"
#include "train/config.h"

namespace tforge {

/// The shards that a batch is cut into, by dp rank: one a rank, or virtual ones (run.deterministic =
/// "layout_independent"). Throws ConfigError when there are fewer shards than ranks.
ShardBorders deal_shards(const RunConfig& config, int dp);
/// The sequences of a batch by shard, as evenly as possible. Throws ConfigError when a shard would get none.
ShardBorders deal_sequences(const RunConfig& config, int dp);
/// How many of the `mine` sequences of a shard are computed at once.
std::int64_t micro_batch(const RunConfig& config, std::int64_t mine);
/// Sequences [first, first + count) of the global batch, all of one shard; beyond it, of the batch that follows.
struct MicroRange {
  std::int64_t first = 0;
  std::int64_t count = 0;
  std::int64_t shard = 0;  // of those of this rank
};
/// The micro-batches of a rank, in the order in which it computes them.
std::vector<MicroRange> micro_batches(const RunConfig& config, int dp, int dp_index);
/// The sequences of the last micro-batch of each dp rank: those whose backward pass the reduction overlaps.
std::vector<std::int64_t> last_micro_batches(const RunConfig& config, int dp);
/// The rows of these micro-batches, of all dp ranks together.
std::int64_t lookup_rows(const RunConfig& config, int dp);
/// Whether the lookup's gradient is exchanged apart from the table's (LookupSync), given the `vocab` rows held here.
/// Only where the table is the head as well.
bool separate_lookup(const RunConfig& config, int dp, std::int64_t vocab);

/// parallel.bucket_mb in bytes.
std::int64_t bucket_bytes(const RunConfig& config);
/// Bytes that virtual shards of the batch take beside `gradients` bytes of gradients; 0 without them.
struct ShardGradientBytes {
  std::int64_t kept = 0;    // a copy for each shard of a rank but one
  std::int64_t pieces = 0;  // with several ranks: of all shards, while they are added and there are no activations
};
ShardGradientBytes shard_gradient_bytes(const RunConfig& config, int dp, int dp_index, std::int64_t gradients);

/// Called at points of a step or an evaluation that all ranks reach equally often, with the part (0 to 1) that this
/// rank has still to do. What it throws, it throws on every rank alike, and what was under way is given up: no
/// parameter, no moment and no counter has changed.
using PollPoint = std::function<void(double left)>;

/// Tokens and targets of a micro-batch, [sequences * seq] i32 each.
struct MicroBatch {
  Tensor tokens, targets;
};

class GradientPass {
 public:
  /// `model`, `mesh`, allocator and stream outlive it.
  GradientPass(const RunConfig& config, LanguageModel& model, Mesh& mesh, Allocator& allocator, Stream& stream);
  GradientPass(const GradientPass&) = delete;
  GradientPass& operator=(const GradientPass&) = delete;

  /// The gradient of the mean loss over the global batch, in model.parameters(), with the same bits on every rank of
  /// dp; with parallel.zero = 1 only of the rows that this rank owns. batch(now, next) gives the
  /// sequences `now`, which are this rank's; it will be asked for `next` after that. `step` is for the heartbeats.
  /// `poll` (may be empty) is called between micro-batches. Collective over the mesh.
  void run(std::int64_t step, const std::function<MicroBatch(const MicroRange& now, const MicroRange& next)>& batch,
           const PollPoint& poll = {});

  /// The mean loss of the last run(). Waits for the device. Collective over dp.
  double loss();

  /// What data parallelism sends in one piece, with the parts that each rank of dp owns.
  const std::vector<Bucket>& buckets() const { return sync_.buckets(); }
  /// After an update: with parallel.zero = 1 every rank gets the values that others own; what ops read is made of them.
  /// Collective over dp.
  void share_values() {
    sync_.gather(stream_, model_.parameters().values());
    model_.parameters().round(stream_);
  }

  /// Of a batch, dealt to this rank.
  std::int64_t sequences() const {
    return micro_batches_.back().first + micro_batches_.back().count - micro_batches_.front().first;
  }
  /// Rows below the norm floor since the last call, on this rank.
  std::int64_t take_floored_rows() { return tape_.take_floored_rows(); }

 private:
  LanguageModel& model_;
  Mesh& mesh_;
  Stream& stream_;
  std::vector<MicroRange> micro_batches_;
  MicroRange next_step_;  // the first micro-batch of the step that follows
  std::size_t polls_;     // micro-batches that every rank of dp has, less one
  double weight_;         // of one target in the mean
  GradSync sync_;
  // With virtual shards in place of the sums of sync_.
  std::optional<OrderedSum> shard_sum_;
  std::optional<ShardGradients> shard_gradients_;
  std::optional<LookupSync> lookup_;
  Tape tape_;
  Tensor nll_sums_;  // of the step, by shard of this rank, f64
};

}  // namespace tforge
