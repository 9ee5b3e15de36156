#include "model/activation_memory.h"

#include <algorithm>

#include "autograd/ops/head_cross_entropy.h"
#include "kernels/pattention.h"

namespace tforge {

namespace {

/// Sizes of one tp rank; all sums are bytes a row of the batch.
struct Sizes {
  Sizes(const ModelConfig& config, const ShardPlan& plan, int tp_rank, DType dtype)
      : sharded(plan.heads.ranks() > 1),
        several_shards(sharded),
        norm(config.norm),
        element(static_cast<std::int64_t>(size_of(dtype))),
        d(config.dim),
        heads(plan.heads.count(tp_rank)),
        c(heads * config.head_dim()) {
    for (std::size_t g = 0; g < tokens.size(); ++g) tokens[g] = plan.tokens[g].count(tp_rank);
    if (!plan.shards) return;
    by_shard = true;
    shards = plan.shards->deal.count(tp_rank);
    gathered = sharded ? plan.shards->deal.total() : 0;
    several_shards = plan.shards->deal.total() > 1;
  }

  /// Elements of a row in the dtype that waits for backward, and numbers of the row, in bytes.
  std::int64_t bytes(const SavePolicy& saves, std::int64_t large, std::int64_t numbers) const {
    return large * (saves.dtype == SavedDType::bf16 ? 2 : element) + numbers * element;
  }

  /// Kept by q, k and v: their input (and, as copies are not shared, LayerNorm's result once more), scores and numbers.
  std::int64_t kept_by_qkv(const SavePolicy& saves) const {
    const std::int64_t input = saves.dtype == SavedDType::bf16 ? 2 * d : d;
    const std::int64_t scores = saves.recompute == Recompute::scores ? 0 : qkv_tokens();
    return bytes(saves, input + scores, 1 + (norm == PattentionNorm::gelu_l2_norm ? 0 : 3));
  }

  /// Kept by a whole block.
  std::int64_t kept(const SavePolicy& saves) const {
    const bool rounded = saves.dtype == SavedDType::bf16;
    std::int64_t large = 4 * c /* q, k, v and the result of attention */ + d /* LN0(h) */;
    if (sharded) large += d;                      // the heads of all ranks
    if (rounded) large += d + (sharded ? 0 : c);  // copies are not shared
    if (norm != PattentionNorm::l2_norm_gelu) large += 3 * (by_shard ? d : c) + 3 + 2 * (d + 1);  // not normalised yet
    if (saves.recompute != Recompute::scores) large += tokens[3] + tokens[4];
    const std::int64_t numbers = heads /* log-sum-exp */ + 1 + (norm == PattentionNorm::gelu_l2_norm ? 0 : 2);
    return kept_by_qkv(saves) + bytes(saves, large, numbers);
  }

  /// Beside what is kept, going back through Pattention of n tokens in all: `gradients` elements a row, the input
  /// widened, scores or their gradients outside the kernels' workspace.
  std::int64_t transient(const SavePolicy& saves, std::int64_t n, std::int64_t gradients) const {
    const bool rounded = saves.dtype == SavedDType::bf16;
    const std::int64_t score_buffers = (rounded || saves.recompute == Recompute::scores ? 1 : 0) +
                                       (several_shards && norm == PattentionNorm::l2_norm_gelu ? 1 : 0);
    const std::int64_t products = score_buffers * n + (by_shard ? shards * d : 0);
    // The sum of dx over virtual shards, when the scores are gone.
    const std::int64_t sum = by_shard ? (shards + gathered) * d - n : 0;
    return (gradients + (rounded ? d : 0) + std::max(products, sum)) * element;
  }

  /// What q, k and v take on their way forward: the results of each virtual shard and of all.
  std::int64_t forward(const SavePolicy& saves, std::int64_t rows) const {
    if (!by_shard) return 0;
    const std::int64_t width = 3 * (d + (norm == PattentionNorm::l2_norm_gelu ? 0 : 1));
    std::int64_t workspace = 0;
    for (const std::size_t g : {0, 1, 2}) workspace += kernels::pattention_forward_workspace(rows, tokens[g], d, d);
    return rows * (kept_by_qkv(saves) + ((shards + gathered + 1) * width + d) * element) + workspace * element;
  }

  /// The most that one block takes on its way back: in ffn, or in q, k and v when the rest of it is gone.
  std::int64_t block(const SavePolicy& saves, std::int64_t rows) const {
    const auto workspace = [&](std::int64_t n) {
      return kernels::pattention_backward_workspace(rows, n, d, d) * element;
    };
    const std::int64_t n = std::max(tokens[3], tokens[4]);
    return std::max({rows * (kept(saves) + transient(saves, n, 2 * d)) + workspace(n),
                     rows * (kept_by_qkv(saves) + transient(saves, qkv_tokens(), 5 * d)) + workspace(tokens[0]) +
                         workspace(tokens[1]) + workspace(tokens[2]),
                     forward(saves, rows)});
  }

  std::int64_t qkv_tokens() const { return tokens[0] + tokens[1] + tokens[2]; }

  bool sharded;               // over ranks
  bool several_shards;        // over ranks or virtual shards
  bool by_shard = false;      // virtual shards are computed apart,
  std::int64_t shards = 1;    // so many here,
  std::int64_t gathered = 0;  // and so many put together to be added
  PattentionNorm norm;
  std::int64_t element, d, heads, c;
  std::array<std::int64_t, 5> tokens{};  // by TokenGroup
};

}  // namespace

std::size_t activation_bytes(const ModelConfig& config, const ShardPlan& plan, int tp_rank, DType dtype,
                             const SavePolicy& saves, std::int64_t batch, std::int64_t seq) {
  const Sizes sizes(config, plan, tp_rank, dtype);
  const std::int64_t rows = batch * seq, width = config.dim * sizes.element;
  const std::int64_t vocab = plan.vocab.count(tp_rank);
  // The head: its input, the gradient of that, the chunk's logits, and what the final LayerNorm keeps.
  const std::int64_t final_input = sizes.bytes(saves, config.dim, 0);
  const std::int64_t chunk = head_chunk_rows(rows, sizes.by_shard ? config.vocab : vocab);
  const std::int64_t parts = sizes.by_shard ? (sizes.shards + sizes.gathered) * config.dim : 0;
  const std::int64_t head = rows * (2 * width + final_input) + chunk * (vocab + parts) * sizes.element;
  if (saves.recompute == Recompute::block) {
    // The inputs of the blocks; going back, one block as if nothing were left out.
    const std::int64_t input = rows * sizes.bytes(saves, config.dim, 0);
    return static_cast<std::size_t>((config.layers - 1) * input + std::max(input + head, sizes.block({}, rows)));
  }
  const std::int64_t block = rows * sizes.kept(saves);
  return static_cast<std::size_t>((config.layers - 1) * block + std::max(block + head, sizes.block(saves, rows)));
}

}  // namespace tforge
