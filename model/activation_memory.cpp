#include "model/activation_memory.h"

#include <algorithm>

#include "autograd/ops/head_cross_entropy.h"
#include "kernels/attention.h"
#include "kernels/pattention.h"

namespace tforge {

namespace {

/// Sizes of one tp rank; all sums are bytes a row of the batch.
struct Sizes {
  Sizes(const ModelConfig& config, const ShardPlan& plan, int tp_rank, DType dtype)
      : sharded(plan.heads.ranks() > 1),
        norm(config.norm),
        element(static_cast<std::int64_t>(size_of(dtype))),
        d(config.dim),
        heads(plan.heads.count(tp_rank)),
        c(heads * config.head_dim()) {
    for (std::size_t g = 0; g < tokens.size(); ++g) tokens[g] = plan.tokens[g].count(tp_rank);
  }

  std::int64_t all_tokens() const {
    std::int64_t sum = 0;
    for (const std::int64_t n : tokens) sum += n;
    return sum;
  }

  /// What a block keeps.
  std::int64_t kept(const SavePolicy& saves) const {
    const bool rounded = saves.dtype == SavedDType::bf16;
    std::int64_t large = 2 * d /* LN0(h), twice */ + 3 * c /* q, k, v */ + c /* attention's result */;
    if (sharded) large += d;                          // the heads of all ranks
    if (rounded) large += 2 * d + (sharded ? 0 : c);  // copies are not shared: LN0(h) and attention's result twice
    if (norm != PattentionNorm::l2_norm_gelu) large += 3 * c + 3 + 2 * (d + 1);  // not normalised yet
    if (saves.recompute != Recompute::scores) large += all_tokens();
    const std::int64_t numbers =
        heads /* log-sum-exp */ + 2 /* 1/std */ + (norm == PattentionNorm::gelu_l2_norm ? 0 : 5);
    return large * (rounded ? 2 : element) + numbers * element;
  }

  /// What going back through the largest Pattention takes: gradients of its result and of its input, and scores or
  /// their gradients outside the kernels' workspace.
  std::int64_t transient(const SavePolicy& saves) const {
    const bool fresh_scores = saves.recompute == Recompute::scores || saves.dtype == SavedDType::bf16;
    const bool exchanges = sharded && norm == PattentionNorm::l2_norm_gelu;
    const std::int64_t largest = *std::ranges::max_element(tokens);
    const std::int64_t group = std::max(tokens[0] + tokens[1] + tokens[2], largest);
    std::int64_t elements = 2 * d;
    if (saves.dtype == SavedDType::bf16) elements += d;  // the input widened
    if (exchanges) elements += group * (fresh_scores ? 2 : 1);
    else if (fresh_scores) elements += largest;
    return elements * element;
  }

  bool sharded;
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
  std::int64_t workspace = kernels::attention_workspace({batch, sizes.heads, seq, seq, seq}, config.head_dim());
  for (const std::int64_t n : sizes.tokens) {
    workspace = std::max(workspace, kernels::pattention_backward_workspace(rows, n, config.dim, config.dim));
  }
  workspace *= sizes.element;

  // The head: its input, the gradient of that, the chunk's logits, and what the final LayerNorm keeps.
  const std::int64_t final_input = saves.dtype == SavedDType::bf16 ? width / sizes.element * 2 : width;
  const std::int64_t head = rows * (2 * width + final_input) + head_chunk_rows(rows, vocab) * vocab * sizes.element;
  std::int64_t kept = 0, layer = 0;
  if (saves.recompute == Recompute::block) {
    // The inputs of the blocks; going back, one block as if nothing were left out.
    kept = config.layers * rows * (saves.dtype == SavedDType::bf16 ? width / sizes.element * 2 : width);
    layer = rows * (width + sizes.kept({}) + sizes.transient({})) + workspace;
  } else {
    kept = config.layers * rows * sizes.kept(saves);
    layer = rows * sizes.transient(saves) + workspace;
  }
  return static_cast<std::size_t>(kept + std::max(head, layer));
}

}  // namespace tforge
