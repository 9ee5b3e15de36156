#pragma once
// The tied output head and its cross entropy, in chunks of rows: [T, vocab] never exists in training.
#include "autograd/reducer.h"
#include "autograd/row_shards.h"
#include "autograd/tape.h"
#include "autograd/var.h"

namespace tforge {

struct HeadLoss {
  Var loss;        // [1] f64: weight * nll_sum
  Tensor nll_sum;  // [1] f64: sum over rows of -log p(target); the same on every rank of the reducer
};

/// For a reducer by_shard(): the shards of the table's rows held here, and all rows of the vocabulary, which then
/// decide about the chunks.
struct HeadShards {
  RowShards rows;
  std::int64_t vocab = 0;
};

/// Rows of logits [., V here] that exist at a time, of `rows` in all: at most 128 MiB of f32, on a device 512, by shape
/// alone.
std::int64_t head_chunk_rows(Device device, std::int64_t rows, std::int64_t vocab);

/// loss = weight * sum_t nll(h[t] table^T, targets[t]);  h [T, d] replicated, table [V here, d] a shard of the
/// vocabulary that starts at row `first_row`, targets [T] i32 (global ids, < 0 ignored).
///
/// The gradients are computed chunk by chunk on the way forward, while the logits are at hand: dtable is written at
/// once, dh is kept for backward (PARTIAL over the shards, complete with a reducer by_shard()). The loss must therefore
/// be the root of the backward pass; any other incoming gradient than 1 is an InternalError. In inference mode nothing
/// but nll_sum is computed.
HeadLoss head_cross_entropy(Tape& tape, const Var& h, const Var& table, const Tensor& targets, std::int64_t first_row,
                            double weight, Reducer& reducer, const HeadShards& shards = {});

/// nll [T] f64 of each row, without gradients. Same chunks, same numbers.
Tensor head_nll(Tape& tape, const Var& h, const Var& table, const Tensor& targets, std::int64_t first_row,
                Reducer& reducer, const HeadShards& shards = {});

/// h table^T: logits [T, V here]. For the few rows of generation, and for comparisons.
Tensor head_logits(Tape& tape, const Var& h, const Var& table);

}  // namespace tforge
