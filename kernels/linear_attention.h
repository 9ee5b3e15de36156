#pragma once
// Causal attention whose weights are products of features in place of a softmax (Katharopoulos et al., "Transformers
// are RNNs", arXiv 2006.16236, equations 8 to 12): linear in the length of a sequence.
//
//   w_ij = phi(q_i) . phi(k_j)        out_i = sum_{j <= i} w_ij v_j / den_i
//   den_i = sum_{j <= i} w_ij, of relu_cosine at least 1e-6
//
// Positions go in chunks of kLinearChunk. With S = sum over the keys of earlier chunks of phi(k_j)^T v_j, [m,
// head_dim],
//   sum_{j <= i} w_ij v_j = phi(q_i) S + sum over j <= i of the own chunk of w_ij v_j,
// so that all of it is products of matrices; neither w nor phi of a whole sequence lies in memory.
#include <cstdint>
#include <string_view>

#include "core/device.h"
#include "core/tensor.h"

namespace tforge::kernels {

/// Positions of a chunk. Chunks begin at position 0 of a sequence, whatever part of it a call computes.
inline constexpr std::int64_t kLinearChunk = 64;

enum class Features : std::uint8_t {
  /// FAVOR+ of Performer (Choromanski et al., arXiv 2009.14794, lemma 1 and section 2.4): E[w_ij] is proportional to
  /// exp(q_i . k_j / sqrt(head_dim)) over the draw of `table` = omega^T / head_dim^(1/4), [head_dim, m].
  ///   a = x table,   phi(q)_r = exp(a_r - max_r a_r) + 1e-6,   phi(k)_r = exp(a_r - |k|^2 / (2 sqrt(head_dim))) + 1e-6
  /// The maximum is that of the query's own features and cancels in out; a query's exp(-|q|^2 / ...) and the factors
  /// 1 / sqrt(m) cancel as well. Keys have no maximum: the published one is over all positions, also later ones. Their
  /// exponent is at most |omega_r|^2 / 2, about head_dim / 2, which f32 holds for heads of up to about 128.
  random_exponential,
  /// cosFormer (Qin et al., arXiv 2202.08791, equations 8 to 12): m = 2 head_dim, M the rows of `table`, which holds
  /// cosine and sine of pi i / (2 M) in two columns.
  ///   phi(x_i) = [relu(x_i) cos(pi i / 2M), relu(x_i) sin(pi i / 2M)]
  ///   w_ij = relu(q_i) . relu(k_j) cos(pi (i - j) / 2M)
  relu_cosine,
};

struct FeatureMap {
  Features kind = Features::relu_cosine;
  std::int64_t count = 0;  // m
  /// random_exponential: [head_dim, feature_columns(m)], the same for all heads, 0 from column m on. relu_cosine: [M,
  /// 2].
  ConstTensorView table;
};

/// m rounded up to what the products want.
std::int64_t feature_columns(std::int64_t count);

/// omega^T / head_dim^(1/4) for m features, table [head_dim, feature_columns(m)], f32 or f64. The rows omega_r are
/// orthogonal in groups of head_dim (Gram-Schmidt of normal vectors; the last group may be cut short), each with the
/// length of a normal vector of its own: each is N(0, I) by itself. Computed in f64 from (seed, name) alone.
/// Throws ShapeError, DTypeError.
void orthogonal_features(Stream& stream, std::uint64_t seed, std::string_view name, std::int64_t count,
                         TensorView table);
/// table [M, 2] of Features::relu_cosine, computed in f64. Throws ShapeError, DTypeError.
void cosine_features(Stream& stream, TensorView table);

/// q, k, v and out hold rows (b, i) = b * seq + i, of position first + i of sequence b.
struct LinearShape {
  std::int64_t batch = 1;
  std::int64_t heads = 1;
  std::int64_t seq = 1;
  std::int64_t first = 0;  // more than 0 needs a state
};

/// out [batch * seq, heads * head_dim] as above; q, k, v alike, row strides allowed (columns of one tensor). den
/// [batch * seq, heads] (contiguous, or empty) saves sum_j w_ij, before its floor. f32 or f64, accumulated in the same;
/// on a CUDA device also bf16, with table, den, state, workspace and sums in f32. state [batch * heads,
/// linear_attention_state()] (contiguous), or empty: what is kept of the positions before `first` (not read when first
/// = 0), and then of those up to first + seq. Its size does not depend on how many they are. workspace:
/// linear_attention_workspace(..., LinearPass::forward). Parallel over (sequence, head); the bits of a row depend
/// neither on threads, batch, seq nor later rows, so a sequence in pieces, by way of a state, gives the bits of the
/// whole. Throws ShapeError, DTypeError.
void linear_attention_forward(Stream& stream, const LinearShape& shape, const FeatureMap& map, ConstTensorView q,
                              ConstTensorView k, ConstTensorView v, TensorView out, TensorView den, TensorView state,
                              TensorView workspace);

/// dq, dk, dv (as q) are overwritten. first = 0. Needs q, k, v, out and den; computes features, weights and the sums S
/// of every chunk again. workspace: linear_attention_workspace(..., LinearPass::backward). Throws ShapeError,
/// DTypeError.
void linear_attention_backward(Stream& stream, const LinearShape& shape, const FeatureMap& map, ConstTensorView q,
                               ConstTensorView k, ConstTensorView v, ConstTensorView out, ConstTensorView den,
                               ConstTensorView dout, TensorView dq, TensorView dk, TensorView dv, TensorView workspace);

/// Elements of the state of one head of one sequence: S, the sum of phi(k), and features and values of a chunk.
std::int64_t linear_attention_state(std::int64_t head_dim, std::int64_t features);

enum class LinearPass : std::uint8_t { forward, backward };
/// Elements, on the CPU for omp_get_max_threads() threads, on a CUDA device for every head of every sequence. Backward
/// on the CPU holds the sums of every chunk: m head_dim seq / kLinearChunk numbers a thread.
std::int64_t linear_attention_workspace(const LinearShape& shape, std::int64_t head_dim, std::int64_t features,
                                        LinearPass pass, Device device = Device::cpu);

}  // namespace tforge::kernels
