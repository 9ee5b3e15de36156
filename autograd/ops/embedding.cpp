#include "autograd/ops/embedding.h"

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
  const std::int64_t rows = tokens.elements(), columns = table.shape().columns();
  Tensor y = tape.empty(Shape{rows, columns}, table.dtype());
  if (!reducer.by_shard()) {
    kernels::embedding_forward(tape.stream(), tokens.view(), table.view(), first_row, y.view());
  } else {
    Tensor parts = tape.empty(Shape{shards.count() * rows, columns}, table.dtype(), Purpose::communication);
    for (std::int64_t s = 0; s < shards.count(); ++s) {
      const RowShards::Range shard = shards.range(s, table.shape().rows());
      kernels::embedding_forward(tape.stream(), tokens.view(), table.view().row_range(shard.first, shard.rows),
                                 first_row + shard.first, parts.view().row_range(s * rows, rows));
    }
    reducer.sum(tape.stream(), parts.view(), y.view());
  }
  return tape.output(std::move(y), tape.record<EmbeddingNode>(tokens, table, first_row));
}

}  // namespace tforge
