#include "kernels/linear_attention.h"

#include <omp.h>

#include <algorithm>

#include "kernels/check.h"
#include "kernels/cpu/head_products.h"
#include "kernels/cpu/linear_attention.h"
#include "kernels/cuda/linear_attention.h"
#include "kernels/dispatch.h"
#include "kernels/work.h"

namespace tforge::kernels {
namespace {

void check_shape(const char* op, const LinearShape& s, std::int64_t columns) {
  if (s.batch < 0 || s.heads < 1 || s.seq < 1 || s.first < 0) {
    throw ShapeError("{}: batch {}, heads {}, seq {}, first {}; want heads and seq of at least 1", op, s.batch, s.heads,
                     s.seq, s.first);
  }
  if (columns < 1 || columns % s.heads != 0) {
    throw ShapeError("{}: {} columns do not make {} heads", op, columns, s.heads);
  }
}

void check_map(const char* op, const LinearShape& s, const FeatureMap& map, DType dtype, std::int64_t head_dim) {
  if (map.kind == Features::random_exponential) {
    if (map.count < 1) throw ShapeError("{}: {} features, want at least 1", op, map.count);
    return check_matrix(op, "table", map.table, dtype, head_dim, feature_columns(map.count));
  }
  if (map.count != 2 * head_dim) {
    throw ShapeError("{}: {} features of a head of {}, want {}", op, map.count, head_dim, 2 * head_dim);
  }
  check_matrix(op, "table", map.table, dtype, map.table.rows(), 2);
  if (s.first + s.seq > map.table.rows()) {
    throw ShapeError("{}: positions {}..{}, the table holds 0..{}", op, s.first, s.first + s.seq - 1,
                     map.table.rows() - 1);
  }
}

void check_operands(const char* op, const Stream& stream, const LinearShape& s, const FeatureMap& map,
                    const ConstTensorView& q, const ConstTensorView& k, const ConstTensorView& v,
                    const ConstTensorView& out) {
  const std::int64_t columns = q.columns(), rows = s.batch * s.seq;
  check_device(op, stream, map.table, q, k, v, out);
  check_shape(op, s, columns);
  check_map(op, s, map, compute_dtype(q.dtype), columns / s.heads);
  check_matrix(op, "q", q, q.dtype, rows, columns);
  check_matrix(op, "k", k, q.dtype, rows, columns);
  check_matrix(op, "v", v, q.dtype, rows, columns);
  check_matrix(op, "out", out, q.dtype, rows, columns);
}

/// LinearShape and FeatureMap as the kernels for CUDA take them.
template <class C>
[[maybe_unused]] cuda::LinearHeads<C> heads_of(const LinearShape& s, const FeatureMap& map, std::int64_t columns) {
  return {s.batch,
          s.heads,
          s.seq,
          s.first,
          static_cast<int>(columns / s.heads),
          static_cast<int>(map.count),
          static_cast<int>(kLinearChunk),
          map.kind == Features::relu_cosine ? cuda::FeatureKind::relu_cosine : cuda::FeatureKind::random_exponential,
          cuda::Rows<const C>(map.table)};
}

/// Operations of one head of one sequence: products of `by_features` with all features and head_dim, and so many of w.
double operations(const LinearShape& s, const FeatureMap& map, std::int64_t head_dim, double by_features,
                  double by_pair) {
  const auto m = static_cast<double>(map.count), d = static_cast<double>(head_dim), seq = static_cast<double>(s.seq);
  const double seen = (static_cast<double>(std::min(s.seq, kLinearChunk)) + 1) / 2;
  const double maps = map.kind == Features::random_exponential ? by_features : 0;
  return 2 * static_cast<double>(s.batch * s.heads) * seq * (m * d * (by_features + maps) + seen * (m + d) * by_pair);
}

}  // namespace

std::int64_t feature_columns(std::int64_t count) { return cpu::padded(count); }

void orthogonal_features(Stream& stream, std::uint64_t seed, std::string_view name, std::int64_t count,
                         TensorView table) {
  constexpr const char* kOp = "orthogonal_features";
  check_cpu(kOp, stream);
  if (count < 1) throw ShapeError("{}: {} features, want at least 1", kOp, count);
  check_matrix(kOp, "table", table, table.dtype, table.rows(), feature_columns(count));
  with_compute_type(kOp, table.dtype, [&](auto t) {
    on_cpu(stream, [&] { cpu::orthogonal_features<decltype(t)>(seed, name, count, table); });
  });
}

void cosine_features(Stream& stream, TensorView table) {
  constexpr const char* kOp = "cosine_features";
  check_cpu(kOp, stream);
  check_matrix(kOp, "table", table, table.dtype, table.rows(), 2);
  with_compute_type(kOp, table.dtype,
                    [&](auto t) { on_cpu(stream, [&] { cpu::cosine_features<decltype(t)>(table); }); });
}

void linear_attention_forward(Stream& stream, const LinearShape& shape, const FeatureMap& map, ConstTensorView q,
                              ConstTensorView k, ConstTensorView v, TensorView out, TensorView den, TensorView state,
                              TensorView workspace) {
  constexpr const char* kOp = "linear_attention_forward";
  check_operands(kOp, stream, shape, map, q, k, v, out);
  check_device(kOp, stream, den, state, workspace);
  const std::int64_t columns = q.columns(), rows = shape.batch * shape.seq, head_dim = columns / shape.heads;
  const std::int64_t state_size = linear_attention_state(head_dim, map.count);
  const DType dtype = compute_dtype(q.dtype);
  if (den) {
    check_matrix(kOp, "den", den, dtype, rows, shape.heads);
    check_vector(kOp, "den", den, dtype, rows * shape.heads);
  }
  if (state) {
    check_matrix(kOp, "state", state, dtype, shape.batch * shape.heads, state_size);
    check_vector(kOp, "state", state, dtype, shape.batch * shape.heads * state_size);
  } else if (shape.first > 0) {
    throw ShapeError("{}: positions from {} on without the state of those before", kOp, shape.first);
  }
  check_workspace(kOp, workspace, dtype,
                  linear_attention_workspace(shape, head_dim, map.count, LinearPass::forward, stream.device()));
  const ProfileScope scope(stream, kOp, {operations(shape, map, head_dim, 2, 1), bytes_of(q, k, v, out)});
  with_stored_type(kOp, stream, q.dtype, [&](auto t) {
    using T = decltype(t);
    using C = Compute<T>;
    on_device<T>(
        stream, [&](auto) { cpu::linear_attention_forward<T>(shape, map, q, k, v, out, den, state, workspace); },
        [&](auto) {
          cuda::linear_attention_forward<T>(stream, heads_of<C>(shape, map, columns), q, k, v, out,
                                            den ? den.as<C>() : nullptr, state ? state.as<C>() : nullptr, state_size,
                                            workspace.as<C>());
        });
  });
}

void linear_attention_backward(Stream& stream, const LinearShape& shape, const FeatureMap& map, ConstTensorView q,
                               ConstTensorView k, ConstTensorView v, ConstTensorView out, ConstTensorView den,
                               ConstTensorView dout, TensorView dq, TensorView dk, TensorView dv,
                               TensorView workspace) {
  constexpr const char* kOp = "linear_attention_backward";
  check_operands(kOp, stream, shape, map, q, k, v, out);
  check_device(kOp, stream, den, dout, dq, dk, dv, workspace);
  const std::int64_t columns = q.columns(), rows = shape.batch * shape.seq, head_dim = columns / shape.heads;
  const DType dtype = compute_dtype(q.dtype);
  if (shape.first != 0) throw ShapeError("{}: first is {}; a state has no gradient", kOp, shape.first);
  check_matrix(kOp, "den", den, dtype, rows, shape.heads);
  check_vector(kOp, "den", den, dtype, rows * shape.heads);
  check_matrix(kOp, "dout", dout, q.dtype, rows, columns);
  check_matrix(kOp, "dq", dq, q.dtype, rows, columns);
  check_matrix(kOp, "dk", dk, q.dtype, rows, columns);
  check_matrix(kOp, "dv", dv, q.dtype, rows, columns);
  check_workspace(kOp, workspace, dtype,
                  linear_attention_workspace(shape, head_dim, map.count, LinearPass::backward, stream.device()));
  const ProfileScope scope(stream, kOp,
                           {operations(shape, map, head_dim, 5, 2.5), bytes_of(q, k, v, out, dout, dq, dk, dv)});
  with_stored_type(kOp, stream, q.dtype, [&](auto t) {
    using T = decltype(t);
    using C = Compute<T>;
    on_device<T>(
        stream,
        [&](auto) { cpu::linear_attention_backward<T>(shape, map, q, k, v, out, den, dout, dq, dk, dv, workspace); },
        [&](auto) {
          cuda::linear_attention_backward<T>(stream, heads_of<C>(shape, map, columns), q, k, v, out, den.as<C>(), dout,
                                             dq, dk, dv, workspace.as<C>());
        });
  });
}

std::int64_t linear_attention_state(std::int64_t head_dim, std::int64_t features) {
  return cpu::linear_attention_state(head_dim, features);
}

std::int64_t linear_attention_workspace(const LinearShape& shape, std::int64_t head_dim, std::int64_t features,
                                        LinearPass pass, Device device) {
  if (device == Device::cuda) {
    return shape.batch * shape.heads *
           (pass == LinearPass::forward ? cuda::linear_forward_workspace(head_dim, features, kLinearChunk)
                                        : cuda::linear_backward_workspace(head_dim, features, kLinearChunk));
  }
  return omp_get_max_threads() * cpu::linear_attention_workspace_per_thread(shape, head_dim, features, pass);
}

}  // namespace tforge::kernels
