#include "kernels/attention.h"

#include <omp.h>

#include <limits>

#include "kernels/check.h"
#include "kernels/cpu/attention.h"
#include "kernels/cuda/attention.h"
#include "kernels/dispatch.h"
#include "kernels/work.h"

namespace tforge::kernels {
namespace {

void check_shape(const char* op, const AttentionShape& s, std::int64_t columns) {
  if (s.batch < 0 || s.heads < 1 || s.q_seq < 1 || s.kv_seq < s.q_seq || s.kv_stride < s.kv_seq) {
    throw ShapeError(
        "{}: batch {}, heads {}, q_seq {}, kv_seq {}, kv_stride {}; want heads and q_seq of at least 1 and "
        "q_seq <= kv_seq <= kv_stride",
        op, s.batch, s.heads, s.q_seq, s.kv_seq, s.kv_stride);
  }
  if (columns < 1 || columns % s.heads != 0) {
    throw ShapeError("{}: {} columns do not make {} heads", op, columns, s.heads);
  }
}

/// Keys or values: as many rows as the last sequence reaches; a cache may hold more.
void check_keys(const char* op, const char* name, const AttentionShape& s, const ConstTensorView& x, DType dtype,
                std::int64_t columns) {
  check_matrix(op, name, x, dtype, x.rows(), columns);
  const std::int64_t reach = s.batch == 0 ? 0 : (s.batch - 1) * s.kv_stride + s.kv_seq;
  if (x.rows() < reach) throw ShapeError("{}: {} has {} rows, want at least {}", op, name, x.rows(), reach);
}

/// The shape whose workspace backward takes: that depends on the keys alone.
AttentionShape backward_shape(AttentionShape shape) {
  shape.q_seq = shape.kv_seq;
  return shape;
}

/// Throws DeviceError for what the kernels of the stream's device cannot take.
void check_width(const char* op, const Stream& stream, std::int64_t head_dim) {
  if (head_dim > most_head_dim(stream.device())) {
    throw DeviceError("{}: a head is {} wide, the kernels for CUDA take at most {}; use more heads", op, head_dim,
                      most_head_dim(stream.device()));
  }
}

[[maybe_unused]] cuda::Heads heads_of(const AttentionShape& s, std::int64_t columns) {
  return {s.batch, s.heads, s.q_seq, s.kv_seq, s.kv_stride, columns / s.heads};
}

/// Pairs of a query and a key that it sees, over all sequences, of one head.
double visible_pairs(const AttentionShape& s) {
  const auto seen = static_cast<double>(s.kv_seq), queries = static_cast<double>(s.q_seq);
  return static_cast<double>(s.batch) * queries * (seen - (queries - 1) / 2);
}

}  // namespace

std::int64_t most_head_dim(Device device) {
  return device == Device::cuda ? cuda::kMostHeadDim : std::numeric_limits<std::int64_t>::max();
}

void causal_attention_forward(Stream& stream, const AttentionShape& shape, ConstTensorView q, ConstTensorView k,
                              ConstTensorView v, TensorView out, TensorView lse, TensorView workspace) {
  constexpr const char* kOp = "causal_attention_forward";
  const std::int64_t columns = q.columns();
  const std::int64_t rows = shape.batch * shape.q_seq;
  check_device(kOp, stream, q, k, v, out, lse, workspace);
  check_shape(kOp, shape, columns);
  check_matrix(kOp, "q", q, q.dtype, rows, columns);
  check_keys(kOp, "k", shape, k, q.dtype, columns);
  check_keys(kOp, "v", shape, v, q.dtype, columns);
  check_matrix(kOp, "out", out, q.dtype, rows, columns);
  if (lse) {
    check_matrix(kOp, "lse", lse, compute_dtype(q.dtype), rows, shape.heads);
    check_vector(kOp, "lse", lse, compute_dtype(q.dtype), rows * shape.heads);
  }
  check_width(kOp, stream, columns / shape.heads);
  check_workspace(kOp, workspace, compute_dtype(q.dtype),
                  attention_workspace(shape, columns / shape.heads, stream.device()));
  const ProfileScope scope(stream, kOp,
                           {4 * visible_pairs(shape) * static_cast<double>(columns), bytes_of(q, k, v, out)});
  with_stored_type(kOp, stream, q.dtype, [&](auto t) {
    using T = decltype(t);
    on_device<T>(
        stream, [&](auto) { cpu::causal_attention_forward<T>(shape, q, k, v, out, lse, workspace); },
        [&](auto) {
          cuda::causal_attention_forward<T>(stream, heads_of(shape, columns), q, k, v, out,
                                            lse ? lse.as<Compute<T>>() : nullptr);
        });
  });
}

void causal_attention_backward(Stream& stream, const AttentionShape& shape, ConstTensorView q, ConstTensorView k,
                               ConstTensorView v, ConstTensorView out, ConstTensorView lse, ConstTensorView dout,
                               TensorView dq, TensorView dk, TensorView dv, TensorView workspace) {
  constexpr const char* kOp = "causal_attention_backward";
  const std::int64_t columns = q.columns();
  const std::int64_t rows = shape.batch * shape.q_seq;
  check_device(kOp, stream, q, k, v, out, lse, dout, dq, dk, dv, workspace);
  check_shape(kOp, shape, columns);
  check_matrix(kOp, "q", q, q.dtype, rows, columns);
  check_keys(kOp, "k", shape, k, q.dtype, columns);
  check_keys(kOp, "v", shape, v, q.dtype, columns);
  check_matrix(kOp, "out", out, q.dtype, rows, columns);
  check_matrix(kOp, "lse", lse, compute_dtype(q.dtype), rows, shape.heads);
  check_vector(kOp, "lse", lse, compute_dtype(q.dtype), rows * shape.heads);
  check_matrix(kOp, "dout", dout, q.dtype, rows, columns);
  check_matrix(kOp, "dq", dq, q.dtype, rows, columns);
  check_keys(kOp, "dk", shape, dk, q.dtype, columns);
  check_keys(kOp, "dv", shape, dv, q.dtype, columns);
  check_width(kOp, stream, columns / shape.heads);
  check_workspace(kOp, workspace, compute_dtype(q.dtype),
                  attention_workspace(backward_shape(shape), columns / shape.heads, stream.device()));
  const ProfileScope scope(
      stream, kOp,
      {10 * visible_pairs(shape) * static_cast<double>(columns), bytes_of(q, k, v, out, dout, dq, dk, dv)});
  with_stored_type(kOp, stream, q.dtype, [&](auto t) {
    using T = decltype(t);
    on_device<T>(
        stream, [&](auto) { cpu::causal_attention_backward<T>(shape, q, k, v, out, lse, dout, dq, dk, dv, workspace); },
        [&](auto) {
          cuda::causal_attention_backward<T>(stream, heads_of(shape, columns), q, k, v, out, lse.as<Compute<T>>(), dout,
                                             dq, dk, dv, workspace.as<Compute<T>>());
        });
  });
}

std::int64_t attention_workspace(const AttentionShape& shape, std::int64_t head_dim, Device device) {
  if (device == Device::cuda) return shape.batch * shape.q_seq * shape.heads;
  return omp_get_max_threads() * cpu::attention_workspace_per_thread(shape, head_dim);
}

}  // namespace tforge::kernels
