#include "kernels/pattention.h"

#include "kernels/check.h"
#include "kernels/cpu/pattention.h"
#include "kernels/cuda/pattention.h"
#include "kernels/cuda/pattention_rows.h"
#include "kernels/dispatch.h"
#include "kernels/work.h"

namespace tforge::kernels {
namespace {

/// Checks the operands of one call, all against the dtype and the sizes of its scores.
class Checker {
 public:
  Checker(const char* op, const Stream& stream, PattentionNorm norm, DType dtype, std::int64_t rows,
          std::int64_t tokens)
      : op_(op), stream_(stream), norm_(norm), dtype_(dtype), rows_(rows), tokens_(tokens) {
    check_built(op, stream);
  }

  const Checker& matrix(const char* name, const ConstTensorView& v, std::int64_t rows, std::int64_t columns) const {
    check_device(op_, stream_, v);
    check_matrix(op_, name, v, dtype_, rows, columns);
    return *this;
  }
  /// A gradient of parameters that may be left out: it may be wider than they are.
  const Checker& parameter_gradient(const char* name, const ConstTensorView& v, std::int64_t rows,
                                    std::int64_t columns) const {
    check_device(op_, stream_, v);
    if (v) check_matrix(op_, name, v, v.dtype == compute_dtype(dtype_) ? v.dtype : dtype_, rows, columns);
    return *this;
  }
  /// A gradient that may be left out.
  const Checker& gradient(const char* name, const ConstTensorView& v, std::int64_t rows, std::int64_t columns) const {
    return v ? matrix(name, v, rows, columns) : *this;
  }
  const Checker& scores(const char* name, const ConstTensorView& v) const { return matrix(name, v, rows_, tokens_); }
  /// A column [T, 1], which the norm has or has not.
  const Checker& column(const char* name, const ConstTensorView& v, bool wanted) const {
    check_device(op_, stream_, v);
    if (wanted) check_matrix(op_, name, v, compute_dtype(dtype_), rows_, 1);
    else if (v) throw ShapeError("{}: {} was given, but {} has none", op_, name, name_of(norm_));
    return *this;
  }
  const Checker& stat(const ConstTensorView& v) const {
    return column("stat", v, norm_ != PattentionNorm::gelu_l2_norm);
  }
  const Checker& weight(const char* name, const ConstTensorView& v) const {
    return column(name, v, norm_ != PattentionNorm::l2_norm_gelu);
  }
  const Checker& dot(const ConstTensorView& v) const { return column("dot", v, norm_ == PattentionNorm::l2_norm_gelu); }
  /// U, which is as wide as the weight beside it.
  const Checker& u(const ConstTensorView& v, std::int64_t columns) const {
    check_device(op_, stream_, v);
    const bool wide = norm_ != PattentionNorm::l2_norm_gelu;
    check_matrix(op_, "U", v, wide ? compute_dtype(dtype_) : dtype_, rows_, columns);
    return *this;
  }
  const Checker& floored(const ConstTensorView& v) const {
    check_device(op_, stream_, v);
    if (v) check_vector(op_, "floored", v, DType::f64, 1);
    return *this;
  }
  void workspace(const ConstTensorView& v, std::int64_t elements) const {
    check_device(op_, stream_, v);
    check_workspace(op_, v, dtype_, elements);
  }

 private:
  const char* op_;
  const Stream& stream_;
  PattentionNorm norm_;
  DType dtype_;
  std::int64_t rows_, tokens_;
};

void check_group(const char* op, std::size_t layers) {
  if (layers < 1 || layers > kMaxPattentionGroup) {
    throw ShapeError("{}: {} layers in a group, want 1 to {}", op, layers, kMaxPattentionGroup);
  }
}

[[maybe_unused]] double* counter(const TensorView& floored) { return floored ? floored.as<double>() : nullptr; }
void count(const TensorView& floored, std::int64_t rows) {
  if (floored) *floored.as<double>() += static_cast<double>(rows);
}

}  // namespace

std::int64_t pattention_forward_workspace(std::int64_t rows, std::int64_t num_tokens, std::int64_t d_in,
                                          std::int64_t d_out, Device device) {
  if (device == Device::cuda) return cuda::pattention_forward_workspace(rows, num_tokens);
  return cpu::pattention_forward_workspace(rows, num_tokens, d_in, d_out);
}

void pattention_scores_forward(Stream& stream, PattentionNorm norm, ConstTensorView x, ConstTensorView keys,
                               TensorView scores, TensorView stat, TensorView workspace) {
  const char* op = "pattention_scores_forward";
  Checker(op, stream, norm, x.dtype, x.rows(), keys.rows())
      .matrix("X", x, x.rows(), keys.columns())
      .matrix("K", keys, keys.rows(), keys.columns())
      .scores("scores", scores)
      .stat(stat)
      .workspace(workspace, pattention_forward_workspace(x.rows(), keys.rows(), keys.columns(), 0, stream.device()));
  const ProfileScope scope(stream, op, {product_flops(x.rows(), keys.rows(), x.columns()), bytes_of(x, keys, scores)});
  with_stored_type(op, stream, x.dtype, [&](auto t) {
    using T = decltype(t);
    on_device<T>(
        stream, [&](auto) { cpu::pattention_scores_forward<T>(norm, x, keys, scores, stat, workspace); },
        [&](auto) { cuda::pattention_scores_forward<T>(stream, norm, x, keys, scores, stat, workspace); });
  });
}

void pattention_mix_forward(Stream& stream, PattentionNorm norm, double scale, ConstTensorView scores,
                            ConstTensorView stat, ConstTensorView values, TensorView u, TensorView weight,
                            TensorView floored, TensorView workspace) {
  const char* op = "pattention_mix_forward";
  const std::int64_t rows = scores.rows();
  const std::int64_t tokens = values.rows();
  Checker(op, stream, norm, scores.dtype, rows, tokens)
      .scores("scores", scores)
      .stat(stat)
      .matrix("V", values, tokens, values.columns())
      .u(u, values.columns())
      .weight("weight", weight)
      .floored(floored)
      .workspace(workspace, pattention_forward_workspace(rows, tokens, 0, values.columns(), stream.device()));
  const ProfileScope scope(stream, op, {product_flops(rows, values.columns(), tokens), bytes_of(scores, values, u)});
  with_stored_type(op, stream, scores.dtype, [&](auto t) {
    using T = decltype(t);
    on_device<T>(
        stream,
        [&](auto) {
          count(floored, cpu::pattention_mix_forward<T>(norm, scale, scores, stat, values, u, weight, workspace));
        },
        [&](auto) {
          cuda::pattention_mix_forward<T>(stream, norm, scale, scores, stat, values, u, weight, counter(floored),
                                          workspace);
        });
  });
}

void pattention_forward(Stream& stream, PattentionNorm norm, ConstTensorView x,
                        std::span<const PattentionForward> layers, TensorView floored, TensorView workspace) {
  const char* op = "pattention_forward";
  check_group(op, layers.size());
  const std::int64_t rows = x.rows();
  std::int64_t scratch = 0;
  Work work;
  for (const PattentionForward& l : layers) {
    const std::int64_t tokens = l.keys.rows(), d_in = l.keys.columns(), d_out = l.values.columns();
    scratch += pattention_forward_workspace(rows, tokens, d_in, d_out, stream.device());
    Checker(op, stream, norm, x.dtype, rows, tokens)
        .matrix("X", x, rows, d_in)
        .matrix("K", l.keys, tokens, d_in)
        .matrix("V", l.values, tokens, d_out)
        .scores("scores", l.scores)
        .stat(l.stat)
        .u(l.u, d_out)
        .weight("weight", l.weight)
        .floored(floored)
        .workspace(workspace, scratch);
    work.flops += product_flops(rows, tokens, d_in + d_out);
    work.bytes += bytes_of(x, l.keys, l.values, l.scores, l.u);
  }
  const ProfileScope scope(stream, op, work);
  with_stored_type(op, stream, x.dtype, [&](auto t) {
    using T = decltype(t);
    on_device<T>(
        stream, [&](auto) { count(floored, cpu::pattention_forward<T>(norm, x, layers, workspace)); },
        [&](auto) { cuda::pattention_forward<T>(stream, norm, x, layers, counter(floored), workspace); });
  });
}

std::int64_t pattention_backward_workspace(std::int64_t rows, std::int64_t num_tokens, std::int64_t d_in,
                                           std::int64_t d_out, Device device) {
  if (device == Device::cuda) return cuda::pattention_backward_workspace(rows, num_tokens);
  return cpu::pattention_backward_workspace(rows, num_tokens, d_in, d_out);
}

void pattention_mix_backward(Stream& stream, PattentionNorm norm, double scale, ConstTensorView scores,
                             ConstTensorView stat, ConstTensorView values, ConstTensorView du, ConstTensorView dweight,
                             GradMode dvalues_mode, TensorView dvalues, TensorView dscores, TensorView dot,
                             TensorView workspace) {
  const char* op = "pattention_mix_backward";
  const std::int64_t rows = scores.rows();
  const std::int64_t tokens = values.rows();
  Checker(op, stream, norm, scores.dtype, rows, tokens)
      .scores("scores", scores)
      .stat(stat)
      .matrix("V", values, tokens, values.columns())
      .matrix("dU", du, rows, values.columns())
      .weight("dweight", dweight)
      .parameter_gradient("dV", dvalues, tokens, values.columns())
      .scores("dscores", dscores)
      .dot(dot)
      .workspace(workspace, pattention_backward_workspace(rows, tokens, 0, values.columns(), stream.device()));
  const ProfileScope scope(stream, op,
                           {product_flops(rows, tokens, values.columns() * (dvalues ? 2 : 1)),
                            bytes_of(scores, values, du, dscores) + bytes_written(dvalues_mode, dvalues)});
  with_stored_type(op, stream, scores.dtype, [&](auto t) {
    using T = decltype(t);
    on_device<T>(
        stream,
        [&](auto) {
          cpu::pattention_mix_backward<T>(norm, scale, scores, stat, values, du, dweight, dvalues_mode, dvalues,
                                          dscores, dot, workspace);
        },
        [&](auto) {
          cuda::pattention_mix_backward<T>(stream, norm, scale, scores, stat, values, du, dweight, dvalues_mode,
                                           dvalues, dscores, dot, workspace);
        });
  });
}

void pattention_scores_backward(Stream& stream, PattentionNorm norm, double scale, ConstTensorView scores,
                                ConstTensorView stat, ConstTensorView dot, ConstTensorView x, ConstTensorView keys,
                                TensorView dscores, GradMode dx_mode, TensorView dx, GradMode dkeys_mode,
                                TensorView dkeys, TensorView workspace) {
  const char* op = "pattention_scores_backward";
  const std::int64_t rows = x.rows();
  const std::int64_t tokens = keys.rows();
  Checker(op, stream, norm, x.dtype, rows, tokens)
      .scores("scores", scores)
      .stat(stat)
      .dot(dot)
      .matrix("X", x, rows, keys.columns())
      .matrix("K", keys, tokens, keys.columns())
      .scores("dscores", dscores)
      .gradient("dX", dx, rows, keys.columns())
      .parameter_gradient("dK", dkeys, tokens, keys.columns())
      .workspace(workspace, pattention_backward_workspace(rows, tokens, keys.columns(), 0, stream.device()));
  const std::int64_t products = (dx ? 1 : 0) + (dkeys ? 1 : 0);
  const ProfileScope scope(
      stream, op,
      {product_flops(rows, tokens, keys.columns() * products),
       bytes_of(scores, x, keys, dscores) + bytes_written(dx_mode, dx) + bytes_written(dkeys_mode, dkeys)});
  with_stored_type(op, stream, x.dtype, [&](auto t) {
    using T = decltype(t);
    on_device<T>(
        stream,
        [&](auto) {
          cpu::pattention_scores_backward<T>(norm, scale, scores, stat, dot, x, keys, dscores, dx_mode, dx, dkeys_mode,
                                             dkeys, workspace);
        },
        [&](auto) {
          cuda::pattention_scores_backward<T>(stream, norm, scale, scores, stat, dot, x, keys, dscores, dx_mode, dx,
                                              dkeys_mode, dkeys);
        });
  });
}

void pattention_backward(Stream& stream, PattentionNorm norm, ConstTensorView x,
                         std::span<const PattentionBackward> layers, GradMode dx_mode, TensorView dx,
                         TensorView workspace) {
  const char* op = "pattention_backward";
  check_group(op, layers.size());
  const std::int64_t rows = x.rows();
  std::int64_t scratch = 0;
  Work work{0, bytes_written(dx_mode, dx)};
  for (const PattentionBackward& l : layers) {
    const std::int64_t tokens = l.keys.rows(), d_in = l.keys.columns(), d_out = l.values.columns();
    scratch += pattention_backward_workspace(rows, tokens, d_in, d_out, stream.device());
    Checker(op, stream, norm, x.dtype, rows, tokens)
        .scores("scores", l.scores)
        .stat(l.stat)
        .matrix("X", x, rows, d_in)
        .matrix("K", l.keys, tokens, d_in)
        .matrix("V", l.values, tokens, d_out)
        .matrix("dU", l.du, rows, d_out)
        .weight("dweight", l.dweight)
        .gradient("dX", dx, rows, d_in)
        .parameter_gradient("dK", l.dkeys, tokens, d_in)
        .parameter_gradient("dV", l.dvalues, tokens, d_out)
        .workspace(workspace, scratch);
    work.flops += product_flops(rows, tokens, d_in * ((dx ? 1 : 0) + (l.dkeys ? 1 : 0)) + d_out * (l.dvalues ? 2 : 1));
    work.bytes += bytes_of(l.scores, x, l.keys, l.values, l.du) + bytes_written(l.dkeys_mode, l.dkeys) +
                  bytes_written(l.dvalues_mode, l.dvalues);
  }
  const ProfileScope scope(stream, op, work);
  with_stored_type(op, stream, x.dtype, [&](auto t) {
    using T = decltype(t);
    on_device<T>(
        stream, [&](auto) { cpu::pattention_backward<T>(norm, x, layers, dx_mode, dx, workspace); },
        [&](auto) { cuda::pattention_backward<T>(stream, norm, x, layers, dx_mode, dx, workspace); });
  });
}

void row_normalize_forward(Stream& stream, PattentionNorm norm, double scale, ConstTensorView u, ConstTensorView weight,
                           TensorView y, TensorView floored) {
  const char* op = "row_normalize_forward";
  Checker(op, stream, norm, y.dtype, u.rows(), 0)
      .u(u, u.columns())
      .weight("weight", weight)
      .matrix("Y", y, u.rows(), u.columns())
      .floored(floored);
  with_stored_type(op, stream, y.dtype, [&](auto t) {
    using T = decltype(t);
    on_device<T>(
        stream, [&](auto) { count(floored, cpu::row_normalize_forward<T>(norm, scale, u, weight, y)); },
        [&](auto) { cuda::row_normalize_forward<T>(stream, norm, scale, u, weight, y, counter(floored)); });
  });
}

void row_normalize_backward(Stream& stream, PattentionNorm norm, double scale, ConstTensorView u,
                            ConstTensorView weight, ConstTensorView dy, TensorView du, TensorView dweight) {
  const char* op = "row_normalize_backward";
  Checker(op, stream, norm, dy.dtype, u.rows(), 0)
      .u(u, u.columns())
      .weight("weight", weight)
      .matrix("dY", dy, u.rows(), u.columns())
      .u(du, u.columns())
      .weight("dweight", dweight);
  with_stored_type(op, stream, dy.dtype, [&](auto t) {
    using T = decltype(t);
    on_device<T>(
        stream, [&](auto) { cpu::row_normalize_backward<T>(norm, scale, u, weight, dy, du, dweight); },
        [&](auto) { cuda::row_normalize_backward<T>(stream, norm, scale, u, weight, dy, du, dweight); });
  });
}

}  // namespace tforge::kernels
