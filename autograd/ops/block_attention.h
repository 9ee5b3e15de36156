#pragma once
// A causal substitute for Linformer (Wang et al., arXiv 2006.04768), on the joint tensor [q | k | v] of this rank's
// heads.
//
// Linformer attends to E K and F V, [slots, seq] times [seq, head_dim]. Every slot mixes all positions, so as published
// it is not causal and no mask makes it so. Here E and F are cut into blocks of positions: a query attends, in one
// softmax, to `slots` projections of each block that was complete before its own, and exactly to the positions of its
// own block that it may see:
//
//   K~_b = E K_b,  V~_b = F V_b              for block b, [slots, head_dim]
//   out_i = softmax(q_i [K~_0; ...; K~_{b-1}; K_b up to i]^T / sqrt(head_dim)) [V~_0; ...; V~_{b-1}; V_b up to i]
//
// E and F are the same for all blocks and apart for each head. This is block-wise compression as the long-range part of
// Long-Short Transformer has it (Zhu et al., arXiv 2107.02192), with Linformer's projections.
#include "autograd/tape.h"
#include "autograd/var.h"

namespace tforge {

struct BlockSlots {
  Var keys, values;  // E, F [heads * slots, block]
  std::int64_t slots(std::int64_t heads) const { return keys.shape().rows() / heads; }
  std::int64_t block() const { return keys.shape().columns(); }
};

/// Rows of memory that a sequence of so many positions takes: the slots of blocks before the last, and a block.
std::int64_t block_attention_rows(std::int64_t positions, std::int64_t block, std::int64_t slots);

/// qkv [batch * seq, 3 c] -> [batch * seq, c]. Saves qkv, the output and the log-sum-exp of each row; slots are
/// computed again. E and F are SHARDED by heads as qkv is by columns. Throws ShapeError, DTypeError.
Var block_attention(Tape& tape, const Var& qkv, std::int64_t batch, std::int64_t heads, const BlockSlots& slots);

/// The same bits for positions first .. of sequences that go on, without gradients: keys, values [batch * rows, c]
/// (block_attention_rows()) hold what is kept of the positions before, and then of these. lse [batch * n, heads] may be
/// empty; its rows are block by block, those of all sequences together.
Tensor block_attention_extend(Tape& tape, ConstTensorView qkv, std::int64_t batch, std::int64_t heads,
                              const BlockSlots& of, std::int64_t first, Tensor& keys, Tensor& values, Tensor lse);

}  // namespace tforge
