#pragma once
// Pattention (TokenFormer, arXiv 2410.23168, equations 4 and 16): attention between input rows and parameter tokens.
//
//   A = X K^T [T, n]     P = f(A)     U = P V [T, d_out]        T rows, n tokens held here, X [T, d_in],
//                                                               K [n, d_in], V [n, d_out]
//
// n may be a shard of the layer's tokens; what a row needs of the other shards passes through two columns of numbers,
// `stat` (before the second product) and `weight` (after it), which the caller reduces over the ranks:
//
//   norm          stat [T]                       P                           weight [T]     layer output Y
//   l2_norm_gelu  sum_j A_j^2     (reduce sum)   gelu(scale A / sqrt(stat))  none           sum U
//   gelu_l2_norm  none                           gelu(A)                     sum_j P_j^2    scale U / sqrt(weight)
//   softmax       max_j A_j       (reduce max)   exp(A - stat)               sum_j P_j      scale U / weight
//
// The row scale of the last two leaves the product: the caller reduces [T, d_out + 1] once and calls row_normalize_*.
// A row with r < kNormFloor (over all ranks' tokens) has P = 0 and passes no gradient.
//
// dtype f32 or f64 throughout (all operands alike). On a CUDA device bf16 too: stat, weight, dot and dweight are then
// f32, and so is U of the norms that have a weight, to be reduced with it; dK and dV are f32 or bf16, sums are f32;
// scores, P and what the row passes read and write are rounded to bf16.
// On the CPU f32 accumulates in f32 in fixed order. An element of a product is a sum of chains of fused multiply-adds
// of fixed length, from token 0 (or row, or column 0) on, so that its bits depend neither on the sizes around it nor on
// the threads, and appended tokens whose P is 0 leave every bit of U. Views may have row strides; `stat`, `weight`,
// `dot` and `dweight` are columns: shape [T, 1], any row stride. On a CUDA device the products are cuBLASLt's: the same
// bits in every call of one shape, but those of U may change with n; `stat`, P and what else is made of rows keep
// theirs when tokens with P = 0 are appended. Workspace: a tensor of at least X_workspace(...) elements of the
// operands' dtype, asked for with the number of threads (OpenMP) that the kernel then runs with, or for the device.
// Nothing is allocated. Throws ShapeError or DTypeError naming the function and the operands.
//
// `floored`, [1] f64 or empty, is a counter: rows below the norm floor are added to it.
#include <cstddef>
#include <cstdint>
#include <span>

#include "core/device.h"
#include "core/pattention_norm.h"
#include "core/tensor.h"

namespace tforge::kernels {

/// First half: scores = X K^T, and stat (its view is empty for gelu_l2_norm). n = 0 gives stat 0 (or -inf for softmax).
void pattention_scores_forward(Stream& stream, PattentionNorm norm, ConstTensorView x, ConstTensorView keys,
                               TensorView scores, TensorView stat, TensorView workspace);

/// Second half: U = P V and weight (empty for l2_norm_gelu), from scores and the reduced stat. Only l2_norm_gelu counts
/// floored rows here.
void pattention_mix_forward(Stream& stream, PattentionNorm norm, double scale, ConstTensorView scores,
                            ConstTensorView stat, ConstTensorView values, TensorView u, TensorView weight,
                            TensorView floored, TensorView workspace);

/// One layer of a group that reads the same X: q, k and v share the passes over it, the threads' meeting points and
/// the packed X of the weight gradients. Views as for the halves above.
struct PattentionForward {
  double scale = 1;
  ConstTensorView keys, values;
  TensorView scores, stat, u, weight;
};
inline constexpr std::size_t kMaxPattentionGroup = 3;

/// Both halves for each layer, block by block while a block's scores are in cache: the same bits as the two calls
/// without a reduction between them. Workspace: the sum over the layers. Counts the floored rows of all layers.
void pattention_forward(Stream& stream, PattentionNorm norm, ConstTensorView x,
                        std::span<const PattentionForward> layers, TensorView floored, TensorView workspace);
/// Of one layer, whole or halved.
std::int64_t pattention_forward_workspace(std::int64_t rows, std::int64_t num_tokens, std::int64_t d_in,
                                          std::int64_t d_out, Device device = Device::cpu);

/// Backward of the mix: given dU and dweight (empty for l2_norm_gelu),
///   dV {=, +=} P^T dU
///   l2_norm_gelu:  B = scale A / r;  dscores = dB = (dU V^T) * gelu'(B);   dot = sum_j dB_j B_j   (reduce sum)
///   gelu_l2_norm:  dscores = dA = (dU V^T + 2 dweight P) * gelu'(A);        dot unused (empty)
///   softmax:       dscores = dA = (dU V^T + dweight) * P;                   dot unused (empty)
/// The maximum in softmax is a constant: its gradient cancels.
void pattention_mix_backward(Stream& stream, PattentionNorm norm, double scale, ConstTensorView scores,
                             ConstTensorView stat, ConstTensorView values, ConstTensorView du, ConstTensorView dweight,
                             GradMode dvalues_mode, TensorView dvalues, TensorView dscores, TensorView dot,
                             TensorView workspace);

/// Backward of the scores: for l2_norm_gelu first dA = (scale / r) (dB - B dot / scale^2) in place of dscores; then
///   dX {=, +=} dA K      dK {=, +=} dA^T X.      An empty dx, dkeys (or dvalues above) view skips that product.
void pattention_scores_backward(Stream& stream, PattentionNorm norm, double scale, ConstTensorView scores,
                                ConstTensorView stat, ConstTensorView dot, ConstTensorView x, ConstTensorView keys,
                                TensorView dscores, GradMode dx_mode, TensorView dx, GradMode dkeys_mode,
                                TensorView dkeys, TensorView workspace);

struct PattentionBackward {
  double scale = 1;
  ConstTensorView scores, stat, keys, values, du, dweight;
  GradMode dkeys_mode = GradMode::overwrite;
  TensorView dkeys;
  GradMode dvalues_mode = GradMode::overwrite;
  TensorView dvalues;
};
/// Both halves of the backward of each layer without a reduction between them, dX summed over the layers in their
/// order; dscores live in the workspace only. Workspace: the sum over the layers.
void pattention_backward(Stream& stream, PattentionNorm norm, ConstTensorView x,
                         std::span<const PattentionBackward> layers, GradMode dx_mode, TensorView dx,
                         TensorView workspace);
/// Of one layer, whole or halved.
std::int64_t pattention_backward_workspace(std::int64_t rows, std::int64_t num_tokens, std::int64_t d_in,
                                           std::int64_t d_out, Device device = Device::cpu);

/// Y = U * scale / sqrt(weight) (gelu_l2_norm) or U * scale / weight (softmax), row by row. gelu_l2_norm rows with
/// sqrt(weight) < kNormFloor give Y = 0 and are counted. y may be u. Where U is f32, Y may be bf16.
void row_normalize_forward(Stream& stream, PattentionNorm norm, double scale, ConstTensorView u, ConstTensorView weight,
                           TensorView y, TensorView floored);
/// du = dy * s,  dweight = <dy, U> * ds/dweight, with s the row's factor; floored rows give 0. du may be dy.
/// dU is of U's dtype, dY of Y's.
void row_normalize_backward(Stream& stream, PattentionNorm norm, double scale, ConstTensorView u,
                            ConstTensorView weight, ConstTensorView dy, TensorView du, TensorView dweight);

}  // namespace tforge::kernels
