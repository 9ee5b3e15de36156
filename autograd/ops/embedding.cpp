#include "autograd/ops/embedding.h"

#include "autograd/shard_parts.h"
#include "kernels/embedding.h"

namespace tforge {

namespace {

struct EmbeddingNode final : Node {
  EmbeddingNode(Tensor tokens_, const Var& table, std::int64_t first_row_)
      : tokens(std::move(tokens_)), rows(table.shape().rows()), first_row(first_row_), dtable(use(table)) {}
  void backward(Tape& tape) override {
    if (!dtable) return;
    Tensor workspace =
        tape.empty(Shape{kernels::embedding_workspace(tokens.elements(), rows)}, DType::i32, Purpose::workspace);
    const GradTarget to = dtable.target(tape);
    kernels::embedding_backward(tape.stream(), static_cast<const Tensor&>(tokens).view(), dy().read(), first_row,
                                to.mode, to.view, workspace.view());
  }
  Tensor tokens;
  std::int64_t rows, first_row;
  Grad dtable;
};

}  // namespace

Var embedding(Tape& tape, const Tensor& tokens, const Var& table, std::int64_t first_row, const RowShards& shards,
              Reducer& reducer) {
  ShardParts parts(tape, reducer, shards.count(), Shape{tokens.elements(), table.shape().columns()}, table.dtype());
  for (std::int64_t s = 0; s < shards.count(); ++s) {
    const RowShards::Range shard = shards.range(s, table.shape().rows());
    kernels::embedding_forward(tape.stream(), tokens.view(), table.view().row_range(shard.first, shard.rows),
                               first_row + shard.first, parts.part(s));
  }
  return tape.output(parts.total(), tape.record<EmbeddingNode>(tokens, table, first_row));
}

}  // namespace tforge
