#include "autograd/ops/pattention.h"

#include <array>

#include "core/errors.h"
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

struct PattentionNode final : Node {
  struct Layer {
    Tensor keys, values;
    Saved scores;
    double scale;
    Grad dkeys, dvalues;
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
      layers[g] = {tokens[g].keys.value(), tokens[g].values.value(), std::move(scores[g]),
                   tokens[g].scale,        use(tokens[g].keys),      use(tokens[g].values)};
    }
  }

  /// The scores of layer g, kept or computed once more. The row statistic is the one of forward: over all ranks.
  Tensor take_scores(Tape& tape, std::size_t g, const Tensor& x, Tensor& workspace) {
    Layer& l = layers[g];
    if (!recompute) {
      Tensor scores = l.scores.load(tape);
      l.scores = Saved();
      return scores;
    }
    Tensor scores = tape.empty(Shape{x.shape().rows(), l.keys.shape().rows()}, x.dtype());
    Tensor here;
    if (stat) here = tape.empty(Shape{x.shape().rows(), 1}, x.dtype());
    kernels::pattention_scores_forward(tape.stream(), norm, x.view(), view(l.keys), scores.view(), here.view(),
                                       workspace.view());
    return scores;
  }

  void backward(Tape& tape) override {
    Stream& stream = tape.stream();
    const Tensor x = saved_x.load(tape);
    const std::int64_t rows = x.shape().rows();
    const auto groups = static_cast<std::int64_t>(count);
    const ConstTensorView du = dy().read();
    const Columns columns{groups, layers[0].values.shape().columns()};
    std::int64_t workspace_elements = 0, scores_workspace = 0;
    for (std::size_t g = 0; g < count; ++g) {
      const std::int64_t n = layers[g].keys.shape().rows(), d_in = layers[g].keys.shape().columns();
      workspace_elements += kernels::pattention_backward_workspace(rows, n, d_in, layers[g].values.shape().columns());
      if (recompute)
        scores_workspace = std::max(scores_workspace, kernels::pattention_forward_workspace(rows, n, d_in, 0));
    }
    Tensor workspace = tape.empty(Shape{std::max(workspace_elements, scores_workspace)}, x.dtype(), Purpose::workspace);
    const bool exchange = norm == PattentionNorm::l2_norm_gelu && !reducer.is_identity();

    if (!exchange) {
      std::array<Tensor, kMaxPattentionGroup> scores;
      std::array<kernels::PattentionBackward, kMaxPattentionGroup> group;
      for (std::size_t g = 0; g < count; ++g) {
        Layer& l = layers[g];
        const auto i = static_cast<std::int64_t>(g);
        const GradTarget to_k = target_or_none(l.dkeys, tape), to_v = target_or_none(l.dvalues, tape);
        scores[g] = take_scores(tape, g, x, workspace);
        group[g] = {l.scale,
                    view(scores[g]),
                    stat_of(i),
                    view(l.keys),
                    view(l.values),
                    columns.values(du, i),
                    columns.weight(du, i, norm),
                    to_k.mode,
                    to_k.view,
                    to_v.mode,
                    to_v.view};
      }
      const GradTarget to_x = target_or_none(dx, tape);
      kernels::pattention_backward(stream, norm, view(x), std::span(group).first(count), to_x.mode, to_x.view,
                                   workspace.view());
      return;
    }

    // sum_j dB_j B_j runs over all ranks' tokens: first halves, one reduction for all layers, second halves.
    Tensor dot = tape.empty(Shape{rows, groups}, x.dtype(), Purpose::communication);
    std::array<Tensor, kMaxPattentionGroup> scores, dscores;
    for (std::size_t g = 0; g < count; ++g) {
      Layer& l = layers[g];
      const auto i = static_cast<std::int64_t>(g);
      scores[g] = take_scores(tape, g, x, workspace);
      dscores[g] = tape.empty(scores[g].shape(), x.dtype());
      const GradTarget to_v = target_or_none(l.dvalues, tape);
      kernels::pattention_mix_backward(stream, norm, l.scale, view(scores[g]), stat_of(i), view(l.values),
                                       columns.values(du, i), {}, to_v.mode, to_v.view, dscores[g].view(),
                                       dot.view().column_range(i, 1), workspace.view());
    }
    reducer.sum(stream, dot.view());
    for (std::size_t g = 0; g < count; ++g) {
      Layer& l = layers[g];
      const auto i = static_cast<std::int64_t>(g);
      const GradTarget to_x = target_or_none(dx, tape);
      const GradTarget to_k = target_or_none(l.dkeys, tape);
      kernels::pattention_scores_backward(stream, norm, l.scale, view(scores[g]), stat_of(i),
                                          dot.view().column_range(i, 1), view(x), view(l.keys), dscores[g].view(),
                                          to_x.mode, to_x.view, to_k.mode, to_k.view, workspace.view());
      scores[g] = dscores[g] = Tensor();
    }
  }

  static ConstTensorView view(const Tensor& t) { return t.view(); }
  static GradTarget target_or_none(Grad& grad, Tape& tape) {
    return grad ? grad.target(tape) : GradTarget{{}, GradMode::overwrite};
  }
  ConstTensorView stat_of(std::int64_t g) const {
    return stat ? static_cast<const Tensor&>(stat).view().column_range(g, 1) : ConstTensorView{};
  }

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
  const bool has_stat = norm != PattentionNorm::gelu_l2_norm;
  const bool has_weight = norm != PattentionNorm::l2_norm_gelu;
  const Columns columns{groups, d_out};

  std::int64_t workspace_elements = 0;
  for (const PattentionTokens& l : layers) {
    if (l.values.shape().columns() != d_out) throw ShapeError("pattention: layers of a group differ in d_out");
    workspace_elements +=
        kernels::pattention_forward_workspace(rows, l.keys.shape().rows(), l.keys.shape().columns(), d_out);
  }
  Tensor workspace = tape.empty(Shape{workspace_elements}, x.dtype(), Purpose::workspace);
  Tensor u = tape.empty(Shape{rows, groups * d_out + (has_weight ? groups : 0)}, x.dtype());
  Tensor stat;
  if (has_stat) stat = tape.empty(Shape{rows, groups}, x.dtype());
  std::array<Tensor, kMaxPattentionGroup> scores;
  const auto stat_of = [&](std::int64_t g) { return has_stat ? stat.view().column_range(g, 1) : TensorView{}; };

  // The scores go as soon as the layer's second product has read them, unless they are kept as they are.
  const bool keep_scores = tape.recording() && tape.saves().recompute != Recompute::scores;
  std::array<Saved, kMaxPattentionGroup> saved_scores;
  const auto done_with_scores = [&](std::size_t g) {
    if (keep_scores) saved_scores[g] = Saved(tape, scores[g]);
    scores[g] = Tensor();
  };

  const bool exchange = has_stat && !reducer.is_identity();
  std::int64_t floored = 0;
  for (std::size_t g = 0; g < layers.size(); ++g) {
    scores[g] = tape.empty(Shape{rows, layers[g].keys.shape().rows()}, x.dtype());
  }
  if (!exchange) {
    std::array<kernels::PattentionForward, kMaxPattentionGroup> group;
    for (std::size_t g = 0; g < layers.size(); ++g) {
      const PattentionTokens& l = layers[g];
      const auto i = static_cast<std::int64_t>(g);
      group[g] = {l.scale,
                  l.keys.view(),
                  l.values.view(),
                  scores[g].view(),
                  stat_of(i),
                  columns.values(u.view(), i),
                  columns.weight(u.view(), i, norm)};
    }
    floored =
        kernels::pattention_forward(stream, norm, x.view(), std::span(group).first(layers.size()), workspace.view());
    for (std::size_t g = 0; g < layers.size(); ++g) done_with_scores(g);
  } else {
    for (std::size_t g = 0; g < layers.size(); ++g) {
      kernels::pattention_scores_forward(stream, norm, x.view(), layers[g].keys.view(), scores[g].view(),
                                         stat_of(static_cast<std::int64_t>(g)), workspace.view());
    }
    if (norm == PattentionNorm::softmax) reducer.max(stream, stat.view());
    else reducer.sum(stream, stat.view());
    for (std::size_t g = 0; g < layers.size(); ++g) {
      const PattentionTokens& l = layers[g];
      const auto i = static_cast<std::int64_t>(g);
      floored += kernels::pattention_mix_forward(stream, norm, l.scale, scores[g].view(), stat_of(i), l.values.view(),
                                                 columns.values(u.view(), i), columns.weight(u.view(), i, norm),
                                                 workspace.view());
      done_with_scores(g);
    }
  }
  tape.floored_rows += floored;

  auto* node = tape.record<PattentionNode>(tape, x, layers, saved_scores, std::move(stat), norm, reducer);
  return tape.output(std::move(u), node);
}

Var row_normalize(Tape& tape, const Var& u, std::span<const double> scales, PattentionNorm norm) {
  if (norm == PattentionNorm::l2_norm_gelu) return u;
  const auto groups = static_cast<std::int64_t>(scales.size());
  if (scales.empty() || scales.size() > kMaxPattentionGroup || u.shape().columns() % groups != 0) {
    throw ShapeError("row_normalize: {} layers in {} columns", groups, u.shape().columns());
  }
  const Columns columns{groups, u.shape().columns() / groups - 1};
  Tensor y = tape.empty(Shape{u.shape().rows(), groups * columns.width}, u.dtype());
  for (std::size_t g = 0; g < scales.size(); ++g) {
    const auto i = static_cast<std::int64_t>(g);
    tape.floored_rows += kernels::row_normalize_forward(tape.stream(), norm, scales[g], columns.values(u.view(), i),
                                                        columns.weight(u.view(), i, norm), columns.values(y.view(), i));
  }
  return tape.output(std::move(y), tape.record<RowNormalizeNode>(tape, u, scales, norm));
}

}  // namespace tforge
