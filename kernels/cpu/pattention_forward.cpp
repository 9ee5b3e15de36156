#include "kernels/cpu/pattention.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <optional>

#include "kernels/cpu/packed_product.h"
#include "kernels/cpu/pattention_blocks.h"
#include "kernels/cpu/row_passes.h"

namespace tforge::kernels::cpu {
namespace {

// Of few rows:
constexpr std::int64_t kFewRows = 16;            // up to here packing the weights costs more than it saves
constexpr std::int64_t kTokensAtOnce = 48;       // of a block of scores
constexpr std::int64_t kColumnsAtOnce = 64;      // of a block of U
constexpr std::int64_t kWorthForking = 1 << 15;  // elements to read; below, one thread is faster

/// The row blocks of a matrix.
struct RowBlocks {
  std::int64_t rows;
  std::int64_t step;
  explicit RowBlocks(std::int64_t rows_) : rows(rows_), step(rows_per_block(rows_)) {}
  std::int64_t count() const { return blocks_of(rows, step); }
  /// Calls f(first row, rows) of a block.
  template <class F>
  void visit(std::int64_t block, const F& f) const {
    f(block * step, std::min(step, rows - block * step));
  }
};

/// X K^T and the rows' statistics.
template <class T>
class ScoresForward {
 public:
  static std::int64_t scratch(std::int64_t rows, std::int64_t n, std::int64_t d_in) {
    return rows <= kFewRows ? 0 : packed_size(d_in, n);
  }
  ScoresForward(PattentionNorm norm, ConstTensorView x, ConstTensorView keys, TensorView scores, TensorView stat,
                T* workspace)
      : norm_(norm), x_(x), keys_(keys), scores_(scores), stat_(stat), n_(scores.columns()), panels_(workspace) {}

  void prepare() { pack_transposed(keys_.data, keys_.stride, n_, keys_.columns, panels_); }
  void block(std::int64_t first, std::int64_t rows) const {
    product<T>(rows, n_, keys_.columns, {x_.row(first), x_.stride}, {panels_, keys_.columns * kPanelColumns<T>},
               scores_.row(first), scores_.stride, GradMode::overwrite);
    statistics(first, rows);
  }

  // Of few rows: K is read once, where it lies.
  std::int64_t few_blocks() const { return blocks_of(n_, kTokensAtOnce); }
  void few_block(std::int64_t b) const {
    const std::int64_t first = b * kTokensAtOnce;
    passes_.dots(x_.count, x_.data, x_.stride, std::min(kTokensAtOnce, n_ - first), keys_.row(first), keys_.stride,
                 x_.columns, scores_.data + first, scores_.stride);
  }
  std::int64_t few_reads() const { return n_ * keys_.columns; }
  void statistics_of(std::int64_t row) const { statistics(row, 1); }

 private:
  void statistics(std::int64_t first, std::int64_t rows) const {
    if (!stat_) return;
    const auto statistic = norm_ == PattentionNorm::softmax ? passes_.largest : passes_.sum_of_squares;
    for (std::int64_t i = first; i < first + rows; ++i) *stat_.row(i) = statistic(scores_.row(i), n_);
  }

  const RowPasses<T>& passes_ = row_passes<T>();
  PattentionNorm norm_;
  Rows<const T> x_, keys_;
  Rows<T> scores_, stat_;
  std::int64_t n_;
  T* panels_;  // of K^T
};

/// P V and the rows' weights.
template <class T>
class MixForward {
 public:
  static std::int64_t scratch(std::int64_t rows, std::int64_t n, std::int64_t d_out) {
    return rows <= kFewRows ? rows * scratch_pitch(n)
                            : packed_size(n, d_out) + threads() * rows_per_block(rows) * kPitch;
  }
  MixForward(PattentionNorm norm, double scale, ConstTensorView scores, ConstTensorView stat, ConstTensorView values,
             TensorView u, TensorView weight, T* workspace)
      : norm_(norm),
        scale_(scale),
        scores_(scores),
        stat_(stat),
        values_(values),
        u_(u),
        weight_(weight),
        n_(scores.columns()),
        workspace_(workspace) {}

  void prepare() { pack_matrix(values_.data, values_.stride, n_, values_.columns, workspace_); }

  /// P lives for kDepth tokens at a time. Returns the number of floored rows.
  std::int64_t block(std::int64_t first, std::int64_t rows) const {
    T parameter[kMostRows] = {};
    T weight[kMostRows] = {};
    for (std::int64_t i = 0; i < rows; ++i) parameter[i] = row_parameter<T>(norm_, scale_, stat_, first + i);
    T* p = workspace_ + packed_size(n_, u_.columns) + omp_get_thread_num() * rows_per_block(u_.count) * kPitch;
    std::int64_t token = 0;
    do {  // once for no tokens too: U is then 0
      const std::int64_t tokens = std::min(kDepth, n_ - token);
      for (std::int64_t i = 0; i < rows; ++i) {
        weight[i] += passes_.activate(norm_, parameter[i], scores_.row(first + i) + token, tokens, p + i * kPitch);
      }
      product<T>(rows, u_.columns, tokens, {p, kPitch}, {workspace_ + token * kPanelColumns<T>, n_ * kPanelColumns<T>},
                 u_.row(first), u_.stride, token > 0 ? GradMode::accumulate : GradMode::overwrite);
      token += kDepth;
    } while (token < n_);
    if (weight_) {
      for (std::int64_t i = 0; i < rows; ++i) *weight_.row(first + i) = weight[i];
    }
    return floored(parameter, rows);
  }

  // Of few rows: V is read once, where it lies.
  /// P of a row. Returns the number of floored rows.
  std::int64_t few_row(std::int64_t i) const {
    const T parameter = row_parameter<T>(norm_, scale_, stat_, i);
    T weight = 0;
    for (std::int64_t t = 0; t < n_; t += kDepth) {
      weight += passes_.activate(norm_, parameter, scores_.row(i) + t, std::min(kDepth, n_ - t), p_row(i) + t);
    }
    if (weight_) *weight_.row(i) = weight;
    return floored(&parameter, 1);
  }
  std::int64_t few_blocks() const { return blocks_of(u_.columns, kColumnsAtOnce); }
  void few_block(std::int64_t b) const {
    const std::int64_t first = b * kColumnsAtOnce;
    passes_.weighted_rows(u_.count, workspace_, scratch_pitch(n_), n_, values_.data + first, values_.stride,
                          std::min(kColumnsAtOnce, u_.columns - first), u_.data + first, u_.stride);
  }
  std::int64_t few_reads() const { return n_ * u_.columns; }
  std::int64_t tokens() const { return n_; }

 private:
  static constexpr std::int64_t kPitch = kDepth + 16;

  std::int64_t floored(const T* parameter, std::int64_t rows) const {
    return norm_ == PattentionNorm::l2_norm_gelu ? std::count(parameter, parameter + rows, T(0)) : 0;
  }
  T* p_row(std::int64_t i) const { return workspace_ + i * scratch_pitch(n_); }  // of few rows

  const RowPasses<T>& passes_ = row_passes<T>();
  PattentionNorm norm_;
  double scale_;
  Rows<const T> scores_, stat_, values_;
  Rows<T> u_, weight_;
  std::int64_t n_;
  T* workspace_;  // panels of V, then P of a block for each thread; of few rows P alone
};

/// The two halves of a layer, or one of them.
template <class T>
struct Halves {
  std::optional<ScoresForward<T>> scores;
  std::optional<MixForward<T>> mix;
};

/// f(layer, block) for every block of every layer, in parallel when `reads` elements are worth it.
template <class T, class Count, class F>
void over_blocks(std::span<const Halves<T>> layers, std::int64_t reads, const Count& blocks_of_layer, const F& f) {
  std::array<std::int64_t, kMaxPattentionGroup> end{};
  std::int64_t total = 0;
  for (std::size_t g = 0; g < layers.size(); ++g) end[g] = total += blocks_of_layer(layers[g]);
  const auto body = [&](std::int64_t block) {
    std::size_t g = 0;
    while (block >= end[g]) ++g;
    f(layers[g], block - (end[g] - blocks_of_layer(layers[g])));
  };
  if (reads >= kWorthForking) return parallel_blocks(total, body);
  for (std::int64_t block = 0; block < total; ++block) body(block);
}

/// Scores, activations and mix of few rows: each over the blocks of all layers. Returns the number of floored rows.
template <class T>
std::int64_t few_rows(std::int64_t rows, std::span<const Halves<T>> layers) {
  if (rows == 0) return 0;
  std::int64_t score_reads = 0, mix_reads = 0, activations = 0;
  for (const Halves<T>& layer : layers) {
    if (layer.scores) score_reads += layer.scores->few_reads();
    if (layer.mix) mix_reads += layer.mix->few_reads();
    if (layer.mix) activations += rows * layer.mix->tokens();
  }
  over_blocks<T>(
      layers, score_reads, [](const Halves<T>& layer) { return layer.scores ? layer.scores->few_blocks() : 0; },
      [](const Halves<T>& layer, std::int64_t block) { layer.scores->few_block(block); });
  std::atomic<std::int64_t> floored = 0;
  over_blocks<T>(
      layers, activations, [&](const Halves<T>&) { return rows; },
      [&](const Halves<T>& layer, std::int64_t row) {
        if (layer.scores) layer.scores->statistics_of(row);
        if (layer.mix) floored += layer.mix->few_row(row);
      });
  over_blocks<T>(
      layers, mix_reads, [](const Halves<T>& layer) { return layer.mix ? layer.mix->few_blocks() : 0; },
      [](const Halves<T>& layer, std::int64_t block) { layer.mix->few_block(block); });
  return floored;
}

}  // namespace

std::int64_t pattention_forward_workspace(std::int64_t rows, std::int64_t num_tokens, std::int64_t d_in,
                                          std::int64_t d_out) {
  return ScoresForward<float>::scratch(rows, num_tokens, d_in) + MixForward<float>::scratch(rows, num_tokens, d_out);
}

template <class T>
void pattention_scores_forward(PattentionNorm norm, ConstTensorView x, ConstTensorView keys, TensorView scores,
                               TensorView stat, TensorView workspace) {
  ScoresForward<T> half(norm, x, keys, scores, stat, start_of<T>(workspace));
  if (x.rows() <= kFewRows) {
    const Halves<T> layer{half, std::nullopt};
    few_rows<T>(x.rows(), {&layer, 1});
    return;
  }
  half.prepare();
  const RowBlocks blocks(x.rows());
  parallel_blocks(blocks.count(), [&](std::int64_t b) {
    blocks.visit(b, [&](std::int64_t first, std::int64_t rows) { half.block(first, rows); });
  });
}

template <class T>
std::int64_t pattention_mix_forward(PattentionNorm norm, double scale, ConstTensorView scores, ConstTensorView stat,
                                    ConstTensorView values, TensorView u, TensorView weight, TensorView workspace) {
  MixForward<T> half(norm, scale, scores, stat, values, u, weight, start_of<T>(workspace));
  if (u.rows() <= kFewRows) {
    const Halves<T> layer{std::nullopt, half};
    return few_rows<T>(u.rows(), {&layer, 1});
  }
  half.prepare();
  std::atomic<std::int64_t> floored = 0;
  const RowBlocks blocks(u.rows());
  parallel_blocks(blocks.count(), [&](std::int64_t b) {
    blocks.visit(b, [&](std::int64_t first, std::int64_t rows) { floored += half.block(first, rows); });
  });
  return floored;
}

template <class T>
std::int64_t pattention_forward(PattentionNorm norm, ConstTensorView x, std::span<const PattentionForward> layers,
                                TensorView workspace) {
  std::array<Halves<T>, kMaxPattentionGroup> group;
  T* start = start_of<T>(workspace);
  for (std::size_t g = 0; g < layers.size(); ++g) {
    const PattentionForward& l = layers[g];
    const std::int64_t n = l.keys.rows();
    T* const second = start + ScoresForward<T>::scratch(x.rows(), n, l.keys.columns());
    group[g].scores.emplace(norm, x, l.keys, l.scores, l.stat, start);
    group[g].mix.emplace(norm, l.scale, l.scores, l.stat, l.values, l.u, l.weight, second);
    start += pattention_forward_workspace(x.rows(), n, l.keys.columns(), l.values.columns());
  }
  const std::span<Halves<T>> halves(group.data(), layers.size());
  if (x.rows() <= kFewRows) return few_rows<T>(x.rows(), halves);
  for (Halves<T>& layer : halves) {
    layer.scores->prepare();
    layer.mix->prepare();
  }
  std::atomic<std::int64_t> floored = 0;
  const RowBlocks blocks(x.rows());
  parallel_blocks(blocks.count(), [&](std::int64_t b) {
    blocks.visit(b, [&](std::int64_t first, std::int64_t rows) {
      for (const Halves<T>& layer : halves) {
        layer.scores->block(first, rows);
        floored += layer.mix->block(first, rows);
      }
    });
  });
  return floored;
}

#define TFORGE_INSTANTIATE(T)                                                                                          \
  template void pattention_scores_forward<T>(PattentionNorm, ConstTensorView, ConstTensorView, TensorView, TensorView, \
                                             TensorView);                                                              \
  template std::int64_t pattention_mix_forward<T>(PattentionNorm, double, ConstTensorView, ConstTensorView,            \
                                                  ConstTensorView, TensorView, TensorView, TensorView);                \
  template std::int64_t pattention_forward<T>(PattentionNorm, ConstTensorView, std::span<const PattentionForward>,     \
                                              TensorView)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cpu
