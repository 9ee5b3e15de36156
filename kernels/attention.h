#pragma once
// Causal attention between tokens (Vaswani et al., arXiv 1706.03762), softmax(q k^T / sqrt(head_dim)) v, without an
// S x S matrix in memory.
#include "core/device.h"
#include "core/tensor.h"

namespace tforge::kernels {

/// How the rows of q, k and v lie. Query row (b, i) is row b * q_seq + i; key row (b, j) is row b * kv_stride + j.
/// The queries are the last q_seq of kv_seq positions: query i sees keys 0 .. kv_seq - q_seq + i.
struct AttentionShape {
  std::int64_t batch = 1;
  std::int64_t heads = 1;
  std::int64_t q_seq = 1;
  std::int64_t kv_seq = 1;     // valid keys of each sequence
  std::int64_t kv_stride = 1;  // rows from one sequence's keys to the next one's (kv_seq, or a cache's capacity)
};

/// Widest head that the kernels of `device` take.
std::int64_t most_head_dim(Device device);

/// out = attention(q, k, v). q, out [batch * q_seq, heads * head_dim]; k, v rows as above, heads * head_dim columns;
/// row strides allowed (q, k, v may be columns of one tensor). lse [batch * q_seq, heads] (contiguous; empty view in
/// inference) saves the log-sum-exp of each row's scaled scores. f32 or f64; accumulates in the same. On a CUDA device
/// also bf16, with lse, workspace and sums in f32, and P and dS rounded to bf16 as operands of products; there a head
/// is at most most_head_dim(Device::cuda) wide (DeviceError). workspace: at least attention_workspace(...) elements.
/// Parallel over (sequence, head); bits do not depend on threads, and a row's bits depend neither on q_seq nor on the
/// batch. Throws ShapeError, DTypeError.
void causal_attention_forward(Stream& stream, const AttentionShape& shape, ConstTensorView q, ConstTensorView k,
                              ConstTensorView v, TensorView out, TensorView lse, TensorView workspace);

/// dq [as q], dk and dv [as k] are overwritten, whichever of kv_seq positions the queries are; rows between kv_seq and
/// kv_stride are left. Needs q, k, v, out and lse; recomputes the probabilities block by block. workspace: at least
/// that of a shape with q_seq = kv_seq. Throws ShapeError, DTypeError, and DeviceError as forward does.
void causal_attention_backward(Stream& stream, const AttentionShape& shape, ConstTensorView q, ConstTensorView k,
                               ConstTensorView v, ConstTensorView out, ConstTensorView lse, ConstTensorView dout,
                               TensorView dq, TensorView dk, TensorView dv, TensorView workspace);

/// Elements of workspace on omp_get_max_threads() threads. A thread holds a block of 24 rows of scores and packed keys
/// and values: O(kv_seq * (head_dim + 24)). On a CUDA device: one number a row and head.
std::int64_t attention_workspace(const AttentionShape& shape, std::int64_t head_dim, Device device = Device::cpu);

}  // namespace tforge::kernels
