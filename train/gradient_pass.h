#pragma once
// The part of a training step that makes the gradients: forward and backward over this rank's share of the batch, in
// micro-batches, and the sum over the dp ranks.
#include <cstdint>
#include <functional>
#include <optional>

#include "autograd/tape.h"
#include "core/allocator.h"
#include "model/tokenformer.h"
#include "parallel/grad_sync.h"
#include "parallel/mesh.h"
#include "train/config.h"

namespace tforge {

/// The sequences of a batch dealt to dp ranks, as evenly as possible. Throws ConfigError when a rank would get none.
ShardBorders deal_sequences(const RunConfig& config, int dp);
/// How many of the `mine` sequences of a rank it computes at once.
std::int64_t micro_batch(const RunConfig& config, std::int64_t mine);
/// The sequences of the last micro-batch of each dp rank: those whose backward pass the reduction overlaps.
std::vector<std::int64_t> last_micro_batches(const RunConfig& config, int dp);
/// The rows of these micro-batches, of all dp ranks together.
std::int64_t lookup_rows(const RunConfig& config, int dp);
/// Whether the lookup's gradient is exchanged apart from the table's (LookupSync), given the `vocab` rows held here.
bool separate_lookup(const RunConfig& config, int dp, std::int64_t vocab);

/// parallel.bucket_mb in bytes.
std::int64_t bucket_bytes(const RunConfig& config);

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
  GradientPass(const RunConfig& config, TokenFormer& model, Mesh& mesh, Allocator& allocator, Stream& stream);
  GradientPass(const GradientPass&) = delete;
  GradientPass& operator=(const GradientPass&) = delete;

  /// The gradient of the mean loss over the global batch, in model.parameters(), with the same bits on every rank of
  /// dp; with parallel.zero = 1 only of the rows that this rank owns. Returns that loss. batch(first, count) gives
  /// sequences first .. first + count of the global batch; they are this rank's. `step` is for the heartbeats. `poll`
  /// (may be empty) is called between micro-batches. Collective over the mesh.
  double run(std::int64_t step, const std::function<MicroBatch(std::int64_t first, std::int64_t count)>& batch,
             const PollPoint& poll = {});

  /// What data parallelism sends in one piece, with the parts that each rank of dp owns.
  const std::vector<Bucket>& buckets() const { return sync_.buckets(); }
  /// After an update: with parallel.zero = 1 every rank gets the values that others own. Collective over dp.
  void share_values() { sync_.gather(stream_, model_.parameters().values()); }

  /// Rows below the norm floor since the last call, on this rank.
  std::int64_t take_floored_rows() { return std::exchange(tape_.floored_rows, 0); }

 private:
  TokenFormer& model_;
  Mesh& mesh_;
  Stream& stream_;
  ShardBorders sequences_;  // of the global batch, by dp rank
  std::int64_t micro_;
  std::int64_t polls_;  // micro-batches that every rank of dp has, less one
  double weight_;       // of one target in the mean
  GradSync sync_;
  std::optional<LookupSync> lookup_;
  Tape tape_;
};

}  // namespace tforge
