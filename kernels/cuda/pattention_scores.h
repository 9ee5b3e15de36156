#pragma once
// The first product of Pattention with the row statistics taken from its tiles, in bf16 on a CUDA device; operands are
// already checked. A kernel of our own: scores are written once and not read again.
//
//   S = X K^T [T, n], rounded to bf16;   stat_t = sum_j S_tj^2 (l2_norm_gelu) or max_j S_tj (softmax), of what was
//                                        rounded, in f32
//
// The same contract as gemm and pattention_statistic() one after the other; other bits, since both add in another
// order. A block has a tile of 128 rows and 128 tokens and leaves one number a row; a second, small kernel adds those
// of a row from token 0 on. So appended tokens with scores of 0 leave every bit of S and of a row's sum, as there.
#include <cstdint>

#include "core/bf16.h"
#include "core/device.h"
#include "core/pattention_norm.h"
#include "kernels/cuda/rows.h"

namespace tforge::kernels::cuda {

/// `norm` is one that has a statistic. x [T, d], keys [n, d], scores [T, n], stat [T, 1], any row strides; 16-byte
/// accesses where the rows of x and keys start at multiples of 16 bytes. n = 0 gives stat 0 (or -inf for softmax).
void pattention_scores_fused(const Stream& stream, PattentionNorm norm, Rows<const bf16> x, Rows<const bf16> keys,
                             Rows<bf16> scores, Rows<float> stat, float* partials);

}  // namespace tforge::kernels::cuda
