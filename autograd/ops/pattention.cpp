#include "autograd/ops/pattention.h"

#include <array>
#include <optional>

#include "autograd/shard_parts.h"
#include "core/errors.h"
#include "kernels/elementwise.h"
#include "kernels/pattention.h"

namespace tforge {

namespace {

/// Where layer g lies in the columns of the op's result.
struct Columns {
  std::int64_t layers;
  std::int64_t width;  // columns of one layer

  template <class View>
  View values(View u, std::int64_t g) const {
    return u.column_range(g * width, width);
  }
  template <class View>
  View weight(View u, std::int64_t g, PattentionNorm norm) const {
    return norm == PattentionNorm::l2_norm_gelu ? View{} : u.column_range(layers * width + g, 1);
  }
};

/// The scores of one shard are a matrix [T, its tokens] of their own, in the memory of all of them.
Tensor shard_of(const Tensor& scores, const RowShards::Range& shard) {
  const std::int64_t rows = scores.shape().rows();
  return scores.reshaped(Shape{scores.elements()})
      .rows(rows * shard.first, rows * shard.rows)
      .reshaped(Shape{rows, shard.rows});
}

ConstTensorView view(const Tensor& t) { return t.view(); }

/// The rows of a shard; of an empty view none.
template <class View>
View rows_of(const View& v, const RowShards::Range& shard) {
  return v ? v.row_range(shard.first, shard.rows) : v;
}

/// Part s of a tensor that holds one [rows, columns] below the other.
TensorView part_of(Tensor& parts, std::int64_t s, std::int64_t rows) { return parts.view().row_range(s * rows, rows); }

struct PattentionNode final : Node {
  struct Layer {
    Tensor keys, values;
    Saved scores;
    double scale;
    RowShards shards;
    Grad dkeys, dvalues;

    RowShards::Range shard(std::int64_t s) const { return shards.range(s, keys.shape().rows()); }
  };

  PattentionNode(Tape& tape, const Var& input, std::span<const PattentionTokens> tokens, std::span<Saved> scores,
                 Tensor stat_, PattentionNorm norm_, Reducer& reducer_)
      : norm(norm_),
        reducer(reducer_),
        recompute(tape.saves().recompute == Recompute::scores),
        saved_x(tape, input.value()),
        dx(use(input)),
        count(tokens.size()),
        stat(std::move(stat_)) {
    for (std::size_t g = 0; g < count; ++g) {
      layers[g] = {tokens[g].keys.value(), tokens[g].values.value(), std::move(scores[g]), tokens[g].scale,
                   tokens[g].shards,       use(tokens[g].keys),      use(tokens[g].values)};
    }
  }

  /// The scores of layer g, kept or computed once more. The row statistic is the one of forward: over all shards.
  Tensor take_scores(Tape& tape, std::size_t g, const Tensor& x, Tensor& workspace) {
    Layer& l = layers[g];
    if (!recompute) {
      Tensor scores = l.scores.load(tape);
      l.scores = Saved();
      return scores;
    }
    Tensor scores = tape.empty(Shape{x.shape().rows(), l.keys.shape().rows()}, x.dtype());
    Tensor here;
    if (stat) here = tape.empty(Shape{x.shape().rows(), 1}, compute_dtype(x.dtype()));
    for (std::int64_t s = 0; s < l.shards.count(); ++s) {
      kernels::pattention_scores_forward(tape.stream(), norm, x.view(), rows_of(view(l.keys), l.shard(s)),
                                         shard_of(scores, l.shard(s)).view(), here.view(), workspace.view());
    }
    return scores;
  }

  void backward(Tape& tape) override {
    Stream& stream = tape.stream();
    const Tensor x = saved_x.load(tape);
    const std::int64_t rows = x.shape().rows(), shards = layers[0].shards.count();
    const auto groups = static_cast<std::int64_t>(count);
    const Columns columns{groups, layers[0].values.shape().columns()};
    const ConstTensorView dresult = dy().read();  // of U and the weights; the products want dU as x is
    ConstTensorView du = dresult;
    Tensor rounded;
    if (du.dtype != x.dtype()) {
      rounded = tape.empty(Shape{rows, groups * columns.width}, x.dtype());
      kernels::convert(stream, dresult.column_range(0, groups * columns.width), rounded.view());
      du = view(rounded);
    }
    std::int64_t workspace_elements = 0, scores_workspace = 0;
    for (std::size_t g = 0; g < count; ++g) {
      const std::int64_t n = layers[g].keys.shape().rows(), d_in = layers[g].keys.shape().columns();
      workspace_elements +=
          kernels::pattention_backward_workspace(rows, n, d_in, layers[g].values.shape().columns(), stream.device());
      if (recompute) {
        scores_workspace =
            std::max(scores_workspace, kernels::pattention_forward_workspace(rows, n, d_in, 0, stream.device()));
      }
    }
    Tensor workspace = tape.empty(Shape{std::max(workspace_elements, scores_workspace)}, x.dtype(), Purpose::workspace);
    const bool exchange = norm == PattentionNorm::l2_norm_gelu && !reducer.is_identity();

    // Where a shard's dx goes: to the gradient itself, or to a part of its own.
    std::optional<ShardParts> dx_parts;
    if (dx && reducer.by_shard()) dx_parts.emplace(tape, reducer, shards, x.shape(), x.dtype());
    const auto dx_target = [&](std::int64_t s, GradMode mode) {
      return dx_parts ? GradTarget{dx_parts->part(s), mode} : target_or_none(dx, tape);
    };

    if (!exchange) {
      std::array<Tensor, kMaxPattentionGroup> scores;
      std::array<GradTarget, kMaxPattentionGroup> to_k, to_v;
      for (std::size_t g = 0; g < count; ++g) {
        to_k[g] = target_or_none(layers[g].dkeys, tape);
        to_v[g] = target_or_none(layers[g].dvalues, tape);
        scores[g] = take_scores(tape, g, x, workspace);
      }
      for (std::int64_t s = 0; s < shards; ++s) {
        std::array<kernels::PattentionBackward, kMaxPattentionGroup> group;
        for (std::size_t g = 0; g < count; ++g) {
          const Layer& l = layers[g];
          const auto i = static_cast<std::int64_t>(g);
          const RowShards::Range shard = l.shard(s);
          group[g] = {l.scale,
                      shard_of(scores[g], shard).view(),
                      stat_of(i),
                      rows_of(view(l.keys), shard),
                      rows_of(view(l.values), shard),
                      columns.values(du, i),
                      columns.weight(dresult, i, norm),
                      to_k[g].mode,
                      rows_of(to_k[g].view, shard),
                      to_v[g].mode,
                      rows_of(to_v[g].view, shard)};
        }
        const GradTarget to_x = dx_target(s, GradMode::overwrite);
        kernels::pattention_backward(stream, norm, view(x), std::span(group).first(count), to_x.mode, to_x.view,
                                     workspace.view());
      }
    } else {
      backward_with_exchange(tape, x, du, workspace, dx_target);
    }
    if (dx_parts) dx.adopt(tape, dx_parts->total());
  }

  /// sum_j dB_j B_j runs over all shards: first halves, one reduction for all layers, second halves.
  template <class DxTarget>
  void backward_with_exchange(Tape& tape, const Tensor& x, const ConstTensorView& du, Tensor& workspace,
                              const DxTarget& dx_target) {
    Stream& stream = tape.stream();
    const std::int64_t rows = x.shape().rows(), shards = layers[0].shards.count();
    const auto groups = static_cast<std::int64_t>(count);
    const Columns columns{groups, layers[0].values.shape().columns()};
    const DType wide = compute_dtype(x.dtype());
    Tensor dots = tape.empty(Shape{shards * rows, groups}, wide, Purpose::communication);
    std::array<Tensor, kMaxPattentionGroup> scores, dscores;
    for (std::size_t g = 0; g < count; ++g) {
      Layer& l = layers[g];
      const auto i = static_cast<std::int64_t>(g);
      scores[g] = take_scores(tape, g, x, workspace);
      dscores[g] = tape.empty(scores[g].shape(), x.dtype());
      const GradTarget to_v = target_or_none(l.dvalues, tape);
      for (std::int64_t s = 0; s < shards; ++s) {
        const RowShards::Range shard = l.shard(s);
        kernels::pattention_mix_backward(stream, norm, l.scale, shard_of(scores[g], shard).view(), stat_of(i),
                                         rows_of(view(l.values), shard), columns.values(du, i), {}, to_v.mode,
                                         rows_of(to_v.view, shard), shard_of(dscores[g], shard).view(),
                                         part_of(dots, s, rows).column_range(i, 1), workspace.view());
      }
    }
    Tensor dot = reducer.by_shard() ? tape.empty(Shape{rows, groups}, wide, Purpose::communication) : dots;
    reducer.sum(stream, dots.view(), dot.view());
    for (std::size_t g = 0; g < count; ++g) {
      Layer& l = layers[g];
      const auto i = static_cast<std::int64_t>(g);
      const GradTarget to_k = target_or_none(l.dkeys, tape);
      for (std::int64_t s = 0; s < shards; ++s) {
        const RowShards::Range shard = l.shard(s);
        const GradTarget to_x = dx_target(s, g == 0 ? GradMode::overwrite : GradMode::accumulate);
        kernels::pattention_scores_backward(stream, norm, l.scale, shard_of(scores[g], shard).view(), stat_of(i),
                                            dot.view().column_range(i, 1), view(x), rows_of(view(l.keys), shard),
                                            shard_of(dscores[g], shard).view(), to_x.mode, to_x.view, to_k.mode,
                                            rows_of(to_k.view, shard), workspace.view());
      }
      scores[g] = dscores[g] = Tensor();
    }
  }

  static GradTarget target_or_none(Grad& grad, Tape& tape) {
    return grad ? grad.target(tape) : GradTarget{{}, GradMode::overwrite};
  }
  ConstTensorView stat_of(std::int64_t g) const { return stat ? view(stat).column_range(g, 1) : ConstTensorView{}; }

  PattentionNorm norm;
  Reducer& reducer;
  bool recompute;  // scores
  Saved saved_x;
  Grad dx;
  std::size_t count;
  std::array<Layer, kMaxPattentionGroup> layers;
  Tensor stat;  // [T, G], reduced; absent for gelu_l2_norm
};

struct RowNormalizeNode final : Node {
  RowNormalizeNode(Tape& tape, const Var& input, std::span<const double> scales_, PattentionNorm norm_)
      : norm(norm_), saved_u(tape, input.value()), du(use(input)), count(scales_.size()) {
    for (std::size_t g = 0; g < count; ++g) scales[g] = scales_[g];
  }

  void backward(Tape& tape) override {
    const auto groups = static_cast<std::int64_t>(count);
    const Tensor u = saved_u.load(tape);
    const Columns columns{groups, u.shape().columns() / groups - 1};
    Tensor gradient = tape.empty(u.shape(), u.dtype());
    const ConstTensorView saved = u.view();
    for (std::size_t g = 0; g < count; ++g) {
      const auto i = static_cast<std::int64_t>(g);
      kernels::row_normalize_backward(tape.stream(), norm, scales[g], columns.values(saved, i),
                                      columns.weight(saved, i, norm), columns.values(dy().read(), i),
                                      columns.values(gradient.view(), i), columns.weight(gradient.view(), i, norm));
    }
    du.adopt(tape, std::move(gradient));
  }

  PattentionNorm norm;
  Saved saved_u;
  Grad du;
  std::size_t count;
  std::array<double, kMaxPattentionGroup> scales{};
};

}  // namespace

Var pattention(Tape& tape, const Var& x, std::span<const PattentionTokens> layers, PattentionNorm norm,
               Reducer& reducer) {
  if (layers.empty() || layers.size() > kMaxPattentionGroup) {
    throw ShapeError("pattention: {} layers in a group, want 1 to {}", layers.size(), kMaxPattentionGroup);
  }
  Stream& stream = tape.stream();
  const auto groups = static_cast<std::int64_t>(layers.size());
  const std::int64_t rows = x.shape().rows();
  const std::int64_t d_out = layers[0].values.shape().columns();
  const std::int64_t shards = layers[0].shards.count();
  const bool has_stat = norm != PattentionNorm::gelu_l2_norm;
  const bool has_weight = norm != PattentionNorm::l2_norm_gelu;
  const Columns columns{groups, d_out};

  std::int64_t workspace_elements = 0;
  for (const PattentionTokens& l : layers) {
    if (l.values.shape().columns() != d_out) throw ShapeError("pattention: layers of a group differ in d_out");
    if (l.shards.count() != shards || (shards > 1 && !reducer.by_shard())) {
      throw ShapeError("pattention: {} and {} shards of layers in a group", shards, l.shards.count());
    }
    workspace_elements += kernels::pattention_forward_workspace(rows, l.keys.shape().rows(), l.keys.shape().columns(),
                                                                d_out, stream.device());
  }
  Tensor workspace = tape.empty(Shape{workspace_elements}, x.dtype(), Purpose::workspace);
  ShardParts us(tape, reducer, shards, Shape{rows, groups * d_out + (has_weight ? groups : 0)},
                has_weight ? compute_dtype(x.dtype()) : x.dtype());
  Tensor stats;
  if (has_stat) stats = tape.empty(Shape{shards * rows, groups}, compute_dtype(x.dtype()));
  std::array<Tensor, kMaxPattentionGroup> scores;
  const auto column = [](TensorView stat, std::int64_t g) { return stat ? stat.column_range(g, 1) : TensorView{}; };
  const auto shard = [&](std::size_t g, std::int64_t s) {
    return layers[g].shards.range(s, layers[g].keys.shape().rows());
  };

  // The scores go as soon as the layer's second product has read them, unless they are kept as they are.
  const bool keep_scores = tape.recording() && tape.saves().recompute != Recompute::scores;
  std::array<Saved, kMaxPattentionGroup> saved_scores;
  const auto done_with_scores = [&](std::size_t g) {
    if (keep_scores) saved_scores[g] = Saved(tape, scores[g]);
    scores[g] = Tensor();
  };

  const bool exchange = has_stat && !reducer.is_identity();
  Tensor stat = stats;
  for (std::size_t g = 0; g < layers.size(); ++g) {
    scores[g] = tape.empty(Shape{rows, layers[g].keys.shape().rows()}, x.dtype());
  }
  if (!exchange) {
    for (std::int64_t s = 0; s < shards; ++s) {
      std::array<kernels::PattentionForward, kMaxPattentionGroup> group;
      const TensorView u = us.part(s);
      for (std::size_t g = 0; g < layers.size(); ++g) {
        const PattentionTokens& l = layers[g];
        const auto i = static_cast<std::int64_t>(g);
        group[g] = {l.scale,
                    rows_of(l.keys.view(), shard(g, s)),
                    rows_of(l.values.view(), shard(g, s)),
                    shard_of(scores[g], shard(g, s)).view(),
                    column(stats.view(), i),
                    columns.values(u, i),
                    columns.weight(u, i, norm)};
      }
      kernels::pattention_forward(stream, norm, x.view(), std::span(group).first(layers.size()), tape.floored_rows(),
                                  workspace.view());
    }
    for (std::size_t g = 0; g < layers.size(); ++g) done_with_scores(g);
  } else {
    for (std::size_t g = 0; g < layers.size(); ++g) {
      for (std::int64_t s = 0; s < shards; ++s) {
        kernels::pattention_scores_forward(stream, norm, x.view(), rows_of(layers[g].keys.view(), shard(g, s)),
                                           shard_of(scores[g], shard(g, s)).view(),
                                           column(part_of(stats, s, rows), static_cast<std::int64_t>(g)),
                                           workspace.view());
      }
    }
    if (reducer.by_shard()) stat = tape.empty(Shape{rows, groups}, compute_dtype(x.dtype()));
    if (norm == PattentionNorm::softmax) reducer.max(stream, stats.view(), stat.view());
    else reducer.sum(stream, stats.view(), stat.view());
    stats = Tensor();
    for (std::size_t g = 0; g < layers.size(); ++g) {
      const PattentionTokens& l = layers[g];
      const auto i = static_cast<std::int64_t>(g);
      for (std::int64_t s = 0; s < shards; ++s) {
        const TensorView u = us.part(s);
        kernels::pattention_mix_forward(
            stream, norm, l.scale, shard_of(scores[g], shard(g, s)).view(), column(stat.view(), i),
            rows_of(l.values.view(), shard(g, s)), columns.values(u, i), columns.weight(u, i, norm),
            s == 0 ? tape.floored_rows() : TensorView{},  // a row is below the floor in all shards or in none
            workspace.view());
      }
      done_with_scores(g);
    }
  }
  auto* node = tape.record<PattentionNode>(tape, x, layers, saved_scores, std::move(stat), norm, reducer);
  return tape.output(us.total(), node);
}

Var row_normalize(Tape& tape, const Var& u, std::span<const double> scales, PattentionNorm norm,
                  std::optional<DType> dtype) {
  if (norm == PattentionNorm::l2_norm_gelu) return u;
  const auto groups = static_cast<std::int64_t>(scales.size());
  if (scales.empty() || scales.size() > kMaxPattentionGroup || u.shape().columns() % groups != 0) {
    throw ShapeError("row_normalize: {} layers in {} columns", groups, u.shape().columns());
  }
  const Columns columns{groups, u.shape().columns() / groups - 1};
  Tensor y = tape.empty(Shape{u.shape().rows(), groups * columns.width}, dtype.value_or(u.value().dtype()));
  for (std::size_t g = 0; g < scales.size(); ++g) {
    const auto i = static_cast<std::int64_t>(g);
    kernels::row_normalize_forward(tape.stream(), norm, scales[g], columns.values(u.view(), i),
                                   columns.weight(u.view(), i, norm), columns.values(y.view(), i), tape.floored_rows());
  }
  return tape.output(std::move(y), tape.record<RowNormalizeNode>(tape, u, scales, norm));
}

}  // namespace tforge
