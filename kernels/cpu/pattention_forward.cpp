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

constexpr std::int64_t kFewRows = 16;            // up to here packing the weights costs more than it saves
constexpr std::int64_t kWorthForking = 1 << 19;  // multiply-adds

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

/// Blocks of a product of few rows; in parallel only when there is enough to do.
template <class Body>
void few_row_blocks(std::int64_t blocks, std::int64_t multiply_adds, const Body& body) {
  if (multiply_adds >= kWorthForking) return parallel_blocks(blocks, body);
  for (std::int64_t block = 0; block < blocks; ++block) body(block);
}

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

  /// Reads K once, where it is.
  void few_rows() const {
    constexpr std::int64_t kTokens = 64;
    few_row_blocks(blocks_of(n_, kTokens), x_.count * n_ * x_.columns, [&](std::int64_t block) {
      const std::int64_t last = std::min(n_, (block + 1) * kTokens);
      for (std::int64_t j = block * kTokens; j < last; ++j) {
        for (std::int64_t i = 0; i < x_.count; ++i)
          scores_.row(i)[j] = passes_.dot(x_.row(i), keys_.row(j), x_.columns);
      }
    });
    statistics(0, x_.count);
  }

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
    return rows <= kFewRows ? rows * n : packed_size(n, d_out) + threads() * rows_per_block(rows) * kPitch;
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

  /// Reads V once, where it is. Returns the number of floored rows.
  std::int64_t few_rows() const {
    std::int64_t floored_rows = 0;
    for (std::int64_t i = 0; i < u_.count; ++i) {
      const T parameter = row_parameter<T>(norm_, scale_, stat_, i);
      T weight = 0;
      for (std::int64_t t = 0; t < n_; t += kDepth) {
        weight += passes_.activate(norm_, parameter, scores_.row(i) + t, std::min(kDepth, n_ - t), p_row(i) + t);
      }
      if (weight_) *weight_.row(i) = weight;
      floored_rows += floored(&parameter, 1);
    }
    const std::int64_t columns = std::max<std::int64_t>(64, round_up(blocks_of(u_.columns, 8), 64));
    few_row_blocks(blocks_of(u_.columns, columns), u_.count * n_ * u_.columns, [&](std::int64_t block) {
      mix_columns(block * columns, std::min(columns, u_.columns - block * columns));
    });
    return floored_rows;
  }

 private:
  static constexpr std::int64_t kPitch = kDepth + 16;

  /// U of a range of columns: chains over all tokens.
  void mix_columns(std::int64_t first, std::int64_t count) const {
    for (std::int64_t i = 0; i < u_.count; ++i) {
      T* out = u_.row(i) + first;
      std::fill_n(out, count, T(0));
      passes_.add_weighted_rows(p_row(i), n_, values_.row(0) + first, values_.stride, count, out);
    }
  }

  std::int64_t floored(const T* parameter, std::int64_t rows) const {
    return norm_ == PattentionNorm::l2_norm_gelu ? std::count(parameter, parameter + rows, T(0)) : 0;
  }
  T* p_row(std::int64_t i) const { return workspace_ + i * n_; }  // of few rows

  const RowPasses<T>& passes_ = row_passes<T>();
  PattentionNorm norm_;
  double scale_;
  Rows<const T> scores_, stat_, values_;
  Rows<T> u_, weight_;
  std::int64_t n_;
  T* workspace_;  // panels of V, then P of a block for each thread; of few rows P alone
};
}  // namespace

std::int64_t pattention_forward_workspace(std::int64_t rows, std::int64_t num_tokens, std::int64_t d_in,
                                          std::int64_t d_out) {
  return ScoresForward<float>::scratch(rows, num_tokens, d_in) + MixForward<float>::scratch(rows, num_tokens, d_out);
}

template <class T>
void pattention_scores_forward(PattentionNorm norm, ConstTensorView x, ConstTensorView keys, TensorView scores,
                               TensorView stat, TensorView workspace) {
  ScoresForward<T> half(norm, x, keys, scores, stat, start_of<T>(workspace));
  if (x.rows() <= kFewRows) return half.few_rows();
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
  if (u.rows() <= kFewRows) return half.few_rows();
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
  struct Halves {
    ScoresForward<T> scores;
    MixForward<T> mix;
  };
  std::array<std::optional<Halves>, kMaxPattentionGroup> group;
  T* start = start_of<T>(workspace);
  for (std::size_t g = 0; g < layers.size(); ++g) {
    const PattentionForward& l = layers[g];
    const std::int64_t n = l.keys.rows();
    T* const second = start + ScoresForward<T>::scratch(x.rows(), n, l.keys.columns());
    group[g].emplace(Halves{{norm, x, l.keys, l.scores, l.stat, start},
                            {norm, l.scale, l.scores, l.stat, l.values, l.u, l.weight, second}});
    start += pattention_forward_workspace(x.rows(), n, l.keys.columns(), l.values.columns());
  }
  std::atomic<std::int64_t> floored = 0;
  const auto for_each_layer = [&](const auto& f) {
    for (std::size_t g = 0; g < layers.size(); ++g) f(*group[g]);
  };
  if (x.rows() <= kFewRows) {
    for_each_layer([&](Halves& layer) {
      layer.scores.few_rows();
      floored += layer.mix.few_rows();
    });
    return floored;
  }
  for_each_layer([](Halves& layer) {
    layer.scores.prepare();
    layer.mix.prepare();
  });
  const RowBlocks blocks(x.rows());
  parallel_blocks(blocks.count(), [&](std::int64_t b) {
    blocks.visit(b, [&](std::int64_t first, std::int64_t rows) {
      for_each_layer([&](Halves& layer) {
        layer.scores.block(first, rows);
        floored += layer.mix.block(first, rows);
      });
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
