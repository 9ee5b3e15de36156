#include "model/activation_memory.h"

#include <algorithm>

#include "autograd/ops/head_cross_entropy.h"
#include "model/attention.h"
#include "model/models.h"

namespace tforge {

std::size_t activation_bytes(const ModelConfig& config, const ShardPlan& plan, int tp_rank, DType dtype,
                             const SavePolicy& saves, std::int64_t batch, std::int64_t seq) {
  const auto element = static_cast<std::int64_t>(size_of(dtype));
  const std::int64_t rows = batch * seq, width = config.dim * element;
  const std::int64_t vocab = plan.vocab.count(tp_rank);
  const auto block_of = [&](const SavePolicy& policy) {
    BlockMemory block = kind_of(config).block_memory(config, plan, {plan.heads.ranks(), tp_rank, dtype, policy, rows});
    const std::int64_t workspace = attention_backward_workspace(config, plan.heads.count(tp_rank), batch, seq);
    block.peak = std::max(block.peak, block.attention + workspace * element);
    return block;
  };
  // A hidden state that waits for backward.
  const std::int64_t waiting = rows * config.dim * (saves.dtype == SavedDType::bf16 ? 2 : element);
  // The head: its input, the gradient of that, the chunk's logits, and what the final LayerNorm keeps.
  const std::int64_t chunk = head_chunk_rows(rows, plan.shards ? config.vocab : vocab);
  std::int64_t parts = 0;  // of dh: those of the virtual shards here, and of all ranks to be added
  if (plan.shards) {
    const ShardBorders& deal = plan.shards->deal;
    parts = (deal.count(tp_rank) + (deal.ranks() > 1 ? deal.total() : 0)) * config.dim;
  }
  const std::int64_t head = 2 * rows * width + waiting + chunk * (vocab + parts) * element;
  if (saves.recompute == Recompute::block) {
    // The inputs of the blocks; going back, one block as if nothing were left out.
    return static_cast<std::size_t>((config.layers - 1) * waiting + std::max(waiting + head, block_of({}).peak));
  }
  const BlockMemory block = block_of(saves);
  return static_cast<std::size_t>((config.layers - 1) * block.kept + std::max(block.kept + head, block.peak));
}

}  // namespace tforge
