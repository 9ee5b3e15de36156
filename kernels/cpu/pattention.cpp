#include "kernels/cpu/pattention.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <type_traits>

#include "kernels/cpu/packed_product.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/simd.h"

namespace tforge::kernels::cpu {
namespace {

// Sizes of blocks. None of them shows in the results (see packed_product.h), so they may follow the threads.
constexpr std::int64_t kMostRows = 11 * kTileRows;   // of a row block: its scores stay in the second-level cache
constexpr std::int64_t kFewRows = 16;                // up to here packing the weights costs more than it saves
constexpr std::int64_t kTokenStrip = 4 * kTileRows;  // tokens of one piece of a weight gradient
constexpr std::int64_t kWorthForking = 1 << 19;      // multiply-adds

std::int64_t round_up(std::int64_t size, std::int64_t step) { return blocks_of(size, step) * step; }

std::int64_t threads() { return omp_get_max_threads(); }

/// Rows of a row block: about as many blocks as give every thread the same work.
std::int64_t rows_per_block(std::int64_t rows) {
  if (rows == 0) return kTileRows;
  const std::int64_t blocks = round_up(blocks_of(rows, kMostRows), threads());
  return std::min(round_up(blocks_of(rows, blocks), kTileRows), kMostRows);
}

/// Row pitch of scratch matrices: walking down a column must not meet the same cache set again and again, as a pitch
/// of a power of two does.
std::int64_t scratch_pitch(std::int64_t columns) { return round_up(columns, 16) + 16; }

/// A matrix as the kernels below see it; false when it was left out or has no elements.
template <class T>
struct Rows {
  using View = BasicView<std::is_const_v<T>>;
  T* data;
  std::int64_t stride;
  std::int64_t count;
  std::int64_t columns;

  // NOLINTNEXTLINE(google-explicit-constructor): the same matrix with its type known
  Rows(const View& v)
      : data(v ? v.template as<std::remove_const_t<T>>() : nullptr),
        stride(v.row_stride),
        count(v.rows()),
        columns(v.columns()) {}
  explicit operator bool() const { return data != nullptr; }
  T* row(std::int64_t i) const { return data + i * stride; }
};

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

// ---------------------------------------------------------------------------------------------- passes over one row

/// Calls f(j) for each full vector of `count` elements and f(j, rest) for what is left.
template <class V, class F>
void for_vectors(std::int64_t count, const F& f) {
  std::int64_t j = 0;
  for (; j + V::kLanes <= count; j += V::kLanes) f(j);
  if (j < count) f(j, count - j);
}

/// Element j goes to lane j mod 4 kLanes, so that appended zeros change nothing.
template <class T>
T sum_of_squares(const T* a, std::int64_t count) {
  using V = Vec<T>;
  V s[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};
  std::int64_t j = 0;
  for (; j + 4 * V::kLanes <= count; j += 4 * V::kLanes) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const V x = V::load(a + j + k * V::kLanes);
      s[k] = fma(x, x, s[k]);
    }
  }
  int k = 0;
  for_vectors<V>(count - j, [&](std::int64_t i, auto... rest) {
    const V x = V::load(a + j + i, rest...);
    s[k] = fma(x, x, s[k]);
    ++k;
  });
  return sum_lanes((s[0] + s[1]) + (s[2] + s[3]));
}

/// -inf for no elements. A NaN among them may be lost here; exp() finds it again.
template <class T>
T largest(const T* a, std::int64_t count) {
  using V = Vec<T>;
  const V lowest = V::all(-std::numeric_limits<T>::infinity());
  V m = lowest;
  for_vectors<V>(count, [&](std::int64_t j, auto... rest) {
    V x = V::load(a + j, rest...);
    if constexpr (sizeof...(rest) > 0) x = first_lanes(rest..., x, lowest);
    m = max(m, x);
  });
  return max_lanes(m);
}

template <class T>
T statistic(PattentionNorm norm, const T* scores, std::int64_t count) {
  return norm == PattentionNorm::softmax ? largest(scores, count) : sum_of_squares(scores, count);
}

/// scale / r of an l2_norm_gelu row; 0 when r is below the floor, NaN when it is not finite (divergence must show).
template <class T>
T row_factor(double scale, T stat) {
  const double r = std::sqrt(static_cast<double>(stat));
  if (r < kNormFloor) return T(0);
  return std::isfinite(r) ? static_cast<T>(scale / r) : std::numeric_limits<T>::quiet_NaN();
}

/// What the activation of a row takes from its statistic: the factor of the scores (l2_norm_gelu), the largest score
/// (softmax), nothing (gelu_l2_norm).
template <class T>
T row_parameter(PattentionNorm norm, double scale, const Rows<const T>& stat, std::int64_t row) {
  switch (norm) {
    case PattentionNorm::l2_norm_gelu: return row_factor(scale, *stat.row(row));
    case PattentionNorm::softmax: return *stat.row(row);
    case PattentionNorm::gelu_l2_norm: break;
  }
  return T(0);
}

/// P of `count` scores. Returns their part of the row's weight.
template <class T>
T activate(PattentionNorm norm, T parameter, const T* scores, std::int64_t count, T* p) {
  using V = Vec<T>;
  V weight = V::all(0);
  const V with = V::all(parameter);
  switch (norm) {
    case PattentionNorm::l2_norm_gelu:
      if (parameter == T(0)) {  // a floored row: P is 0 even where a score is not finite
        std::fill_n(p, count, T(0));
        return T(0);
      }
      for_vectors<V>(count, [&](std::int64_t j, auto... rest) {
        gelu(with * V::load(scores + j, rest...)).store(p + j, rest...);
      });
      return T(0);
    case PattentionNorm::gelu_l2_norm:
      for_vectors<V>(count, [&](std::int64_t j, auto... rest) {
        const V value = gelu(V::load(scores + j, rest...));
        value.store(p + j, rest...);
        weight = fma(value, value, weight);
      });
      break;
    case PattentionNorm::softmax:
      for_vectors<V>(count, [&](std::int64_t j, auto... rest) {
        V value = exp(V::load(scores + j, rest...) - with);
        value.store(p + j, rest...);
        if constexpr (sizeof...(rest) > 0) value = first_lanes(rest..., value, V::all(0));
        weight = weight + value;
      });
      break;
  }
  return sum_lanes(weight);
}

/// From dP (in `d`) to dscores in place, and P again. Returns sum_j dB_j B_j for l2_norm_gelu.
template <class T>
T activate_backward(PattentionNorm norm, T parameter, T dweight, const T* scores, std::int64_t count, T* d, T* p) {
  using V = Vec<T>;
  V dot = V::all(0);
  const V with = V::all(parameter);
  switch (norm) {
    case PattentionNorm::l2_norm_gelu:
      if (parameter == T(0)) {
        std::fill_n(p, count, T(0));
        std::fill_n(d, count, T(0));
        return T(0);
      }
      for_vectors<V>(count, [&](std::int64_t j, auto... rest) {
        const V b = with * V::load(scores + j, rest...);
        const GeluAndSlope<V> g = gelu_and_slope(b);
        const V db = V::load(d + j, rest...) * g.slope;
        g.value.store(p + j, rest...);
        db.store(d + j, rest...);
        dot = fma(db, b, dot);
      });
      break;
    case PattentionNorm::gelu_l2_norm: {
      const V twice = V::all(2 * dweight);
      for_vectors<V>(count, [&](std::int64_t j, auto... rest) {
        const GeluAndSlope<V> g = gelu_and_slope(V::load(scores + j, rest...));
        const V da = fma(twice, g.value, V::load(d + j, rest...)) * g.slope;
        g.value.store(p + j, rest...);
        da.store(d + j, rest...);
      });
      break;
    }
    case PattentionNorm::softmax: {
      const V shift = V::all(dweight);
      for_vectors<V>(count, [&](std::int64_t j, auto... rest) {
        const V value = exp(V::load(scores + j, rest...) - with);
        const V da = (V::load(d + j, rest...) + shift) * value;
        value.store(p + j, rest...);
        da.store(d + j, rest...);
      });
      break;
    }
  }
  return sum_lanes(dot);
}

/// l2_norm_gelu, in place: dA = s (dB - B dot / scale^2) with s = scale / r, B = s A. A floored row gives 0.
template <class T>
void through_row_norm(double scale, T factor, T dot, const T* scores, std::int64_t count, T* d) {
  using V = Vec<T>;
  if (factor == T(0)) {
    std::fill_n(d, count, T(0));
    return;
  }
  const V s = V::all(factor);
  const V along = V::all(static_cast<T>(-static_cast<double>(factor) * static_cast<double>(dot) / (scale * scale)));
  for_vectors<V>(count, [&](std::int64_t j, auto... rest) {
    (s * fma(along, V::load(scores + j, rest...), V::load(d + j, rest...))).store(d + j, rest...);
  });
}

/// Sum of products, four chains wide.
template <class T>
T dot(const T* a, const T* b, std::int64_t count) {
  using V = Vec<T>;
  V s[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};
  std::int64_t j = 0;
  for (; j + 4 * V::kLanes <= count; j += 4 * V::kLanes) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) s[k] = fma(V::load(a + j + k * V::kLanes), V::load(b + j + k * V::kLanes), s[k]);
  }
  for_vectors<V>(count - j, [&](std::int64_t i, auto... rest) {
    s[0] = fma(V::load(a + j + i, rest...), V::load(b + j + i, rest...), s[0]);
  });
  return sum_lanes((s[0] + s[1]) + (s[2] + s[3]));
}

/// Blocks of a product of few rows; in parallel only when there is enough to do.
template <class Body>
void few_row_blocks(std::int64_t blocks, std::int64_t multiply_adds, const Body& body) {
  if (multiply_adds >= kWorthForking) return parallel_blocks(blocks, body);
  for (std::int64_t block = 0; block < blocks; ++block) body(block);
}

// ---------------------------------------------------------------------------------------------------------- forward

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
        for (std::int64_t i = 0; i < x_.count; ++i) scores_.row(i)[j] = dot(x_.row(i), keys_.row(j), x_.columns);
      }
    });
    statistics(0, x_.count);
  }

 private:
  void statistics(std::int64_t first, std::int64_t rows) const {
    if (!stat_) return;
    for (std::int64_t i = first; i < first + rows; ++i) *stat_.row(i) = statistic<T>(norm_, scores_.row(i), n_);
  }

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
        weight[i] += activate<T>(norm_, parameter[i], scores_.row(first + i) + token, tokens, p + i * kPitch);
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
        weight += activate<T>(norm_, parameter, scores_.row(i) + t, std::min(kDepth, n_ - t), p_row(i) + t);
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

  /// U of a range of columns: chains over all tokens, four tokens at a time.
  void mix_columns(std::int64_t first, std::int64_t count) const {
    using V = Vec<T>;
    for (std::int64_t i = 0; i < u_.count; ++i) std::fill_n(u_.row(i) + first, count, T(0));
    std::int64_t j = 0;
    for (; j + 4 <= n_; j += 4) {
      for (std::int64_t i = 0; i < u_.count; ++i) {
        const T* p = p_row(i) + j;
        const T* v = values_.row(j) + first;
        T* out = u_.row(i) + first;
        for_vectors<V>(count, [&](std::int64_t c, auto... rest) {
          V sum = V::load(out + c, rest...);
#pragma GCC unroll 4
          for (int k = 0; k < 4; ++k) sum = fma(V::all(p[k]), V::load(v + k * values_.stride + c, rest...), sum);
          sum.store(out + c, rest...);
        });
      }
    }
    for (; j < n_; ++j) {
      for (std::int64_t i = 0; i < u_.count; ++i) {
        const V p = V::all(p_row(i)[j]);
        T* out = u_.row(i) + first;
        for_vectors<V>(count, [&](std::int64_t c, auto... rest) {
          fma(p, V::load(values_.row(j) + first + c, rest...), V::load(out + c, rest...)).store(out + c, rest...);
        });
      }
    }
  }

  std::int64_t floored(const T* parameter, std::int64_t rows) const {
    return norm_ == PattentionNorm::l2_norm_gelu ? std::count(parameter, parameter + rows, T(0)) : 0;
  }
  T* p_row(std::int64_t i) const { return workspace_ + i * n_; }  // of few rows

  PattentionNorm norm_;
  double scale_;
  Rows<const T> scores_, stat_, values_;
  Rows<T> u_, weight_;
  std::int64_t n_;
  T* workspace_;  // panels of V, then P of a block for each thread; of few rows P alone
};

// --------------------------------------------------------------------------------------------------------- backward

/// Rows between two additions to the weight gradients: two row blocks for two threads. A multiple of kDepth, so that it
/// does not show in the gradients' bits.
std::int64_t superblock_rows(std::int64_t rows) {
  return std::min(kDepth * blocks_of(threads(), 2), round_up(rows, kDepth));
}

/// Calls block(first row, rows, offset in the superblock) for the row blocks of a superblock, then gradients(first
/// row, rows, mode) of it; superblock by superblock.
template <class Block, class Gradients>
void over_superblocks(std::int64_t rows, const Block& block, const Gradients& gradients) {
  std::int64_t start = 0;
  do {  // once for no rows too: overwritten gradients are then 0
    const std::int64_t here = std::min(superblock_rows(rows), rows - start);
    const std::int64_t step = rows_per_block(here);
    parallel_blocks(blocks_of(here, step),
                    [&](std::int64_t b) { block(start + b * step, std::min(step, here - b * step), b * step); });
    gradients(start, here);
    start += here;
  } while (start < rows);
}

/// G {=, +=} M^T R over the rows of a superblock: dV (M = P, R = dU) and dK (M = dscores, R = X).
template <class T>
class WeightGradient {
 public:
  static std::int64_t scratch(std::int64_t rows, std::int64_t columns) {
    return packed_size(superblock_rows(rows), columns);
  }
  WeightGradient(ConstTensorView right, GradMode mode, TensorView gradient, T* workspace)
      : right_(right), mode_(mode), gradient_(gradient), depth_(superblock_rows(right.rows())), panels_(workspace) {}

  void pack(std::int64_t first, std::int64_t rows, std::int64_t offset) const {
    if (gradient_) {
      pack_rows(right_.row(first), right_.stride, offset, rows, depth_, right_.columns, panels_);
    }
  }
  std::int64_t strips() const { return blocks_of(gradient_.count, kTokenStrip); }
  /// Adds `rows` rows from row `start` on, where `matrix` is the superblock's M.
  void add(std::int64_t strip, std::int64_t start, std::int64_t rows, const T* matrix, std::int64_t pitch) const {
    if (!gradient_) return;
    const std::int64_t token = strip * kTokenStrip;
    product<T>(std::min(kTokenStrip, gradient_.count - token), gradient_.columns, rows, {matrix + token, 1, pitch},
               {panels_, depth_ * kPanelColumns<T>}, gradient_.row(token), gradient_.stride,
               start == 0 ? mode_ : GradMode::accumulate);
  }

 private:
  Rows<const T> right_;
  GradMode mode_;
  Rows<T> gradient_;
  std::int64_t depth_;
  T* panels_;
};

template <class T>
class MixBackward {
 public:
  static std::int64_t scratch(std::int64_t rows, std::int64_t n, std::int64_t d_out) {
    return packed_size(d_out, n) + superblock_rows(rows) * scratch_pitch(n) + WeightGradient<T>::scratch(rows, d_out);
  }
  MixBackward(PattentionNorm norm, double scale, ConstTensorView scores, ConstTensorView stat, ConstTensorView values,
              ConstTensorView du, ConstTensorView dweight, GradMode mode, TensorView dvalues, T* workspace)
      : norm_(norm),
        scale_(scale),
        scores_(scores),
        stat_(stat),
        values_(values),
        du_(du),
        dweight_(dweight),
        n_(scores.columns()),
        pitch_(scratch_pitch(n_)),
        panels_(workspace),
        p_(panels_ + packed_size(du.columns(), n_)),
        dvalues_(du, mode, dvalues, p_ + superblock_rows(du.rows()) * pitch_) {}

  void prepare() { pack_transposed(values_.data, values_.stride, n_, values_.columns, panels_); }

  /// dP = dU V^T into d, then dscores in place (for l2_norm_gelu before the row norm), P, and the rows' dots.
  void block(std::int64_t first, std::int64_t rows, std::int64_t offset, T* d, std::int64_t pitch, T* dots) const {
    product<T>(rows, n_, du_.columns, {du_.row(first), du_.stride}, {panels_, du_.columns * kPanelColumns<T>}, d, pitch,
               GradMode::overwrite);
    for (std::int64_t i = 0; i < rows; ++i) {
      dots[i] = activate_backward<T>(norm_, row_parameter<T>(norm_, scale_, stat_, first + i),
                                     dweight_ ? *dweight_.row(first + i) : T(0), scores_.row(first + i), n_,
                                     d + i * pitch, p_ + (offset + i) * pitch_);
    }
    dvalues_.pack(first, rows, offset);
  }
  std::int64_t strips() const { return blocks_of(n_, kTokenStrip); }
  void gradient(std::int64_t strip, std::int64_t start, std::int64_t rows) const {
    dvalues_.add(strip, start, rows, p_, pitch_);
  }

 private:
  PattentionNorm norm_;
  double scale_;
  Rows<const T> scores_, stat_, values_, du_, dweight_;
  std::int64_t n_, pitch_;
  T* panels_;  // of V^T
  T* p_;       // P of a superblock
  WeightGradient<T> dvalues_;
};

template <class T>
class ScoresBackward {
 public:
  static std::int64_t scratch(std::int64_t rows, std::int64_t n, std::int64_t d_in) {
    return packed_size(n, d_in) + WeightGradient<T>::scratch(rows, d_in);
  }
  ScoresBackward(PattentionNorm norm, double scale, ConstTensorView scores, ConstTensorView stat, ConstTensorView x,
                 ConstTensorView keys, GradMode dx_mode, TensorView dx, GradMode dkeys_mode, TensorView dkeys,
                 T* workspace)
      : norm_(norm),
        scale_(scale),
        scores_(scores),
        stat_(stat),
        keys_(keys),
        dx_mode_(dx_mode),
        dx_(dx),
        n_(scores.columns()),
        panels_(workspace),
        dkeys_(x, dkeys_mode, dkeys, panels_ + packed_size(n_, keys.columns())) {}

  void prepare() {
    if (dx_) pack_matrix(keys_.data, keys_.stride, n_, keys_.columns, panels_);
  }
  /// The rest of dscores in place, given the rows' dots (dot_stride apart), then dX.
  void block(std::int64_t first, std::int64_t rows, std::int64_t offset, T* d, std::int64_t pitch, const T* dots,
             std::int64_t dot_stride) const {
    if (norm_ == PattentionNorm::l2_norm_gelu) {
      for (std::int64_t i = 0; i < rows; ++i) {
        through_row_norm<T>(scale_, row_factor(scale_, *stat_.row(first + i)), dots[i * dot_stride],
                            scores_.row(first + i), n_, d + i * pitch);
      }
    }
    if (dx_) {
      product<T>(rows, dx_.columns, n_, {d, pitch}, {panels_, n_ * kPanelColumns<T>}, dx_.row(first), dx_.stride,
                 dx_mode_);
    }
    dkeys_.pack(first, rows, offset);
  }
  std::int64_t strips() const { return blocks_of(n_, kTokenStrip); }
  void gradient(std::int64_t strip, std::int64_t start, std::int64_t rows, const T* d, std::int64_t pitch) const {
    dkeys_.add(strip, start, rows, d, pitch);
  }

 private:
  PattentionNorm norm_;
  double scale_;
  Rows<const T> scores_, stat_, keys_;
  GradMode dx_mode_;
  Rows<T> dx_;
  std::int64_t n_;
  T* panels_;  // of K
  WeightGradient<T> dkeys_;
};

template <class T>
T* start_of(const TensorView& workspace) {
  return workspace ? workspace.as<T>() : nullptr;
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
std::int64_t pattention_forward(PattentionNorm norm, double scale, ConstTensorView x, ConstTensorView keys,
                                ConstTensorView values, TensorView scores, TensorView stat, TensorView u,
                                TensorView weight, TensorView workspace) {
  T* start = start_of<T>(workspace);
  ScoresForward<T> first_half(norm, x, keys, scores, stat, start);
  MixForward<T> second_half(norm, scale, scores, stat, values, u, weight,
                            start + ScoresForward<T>::scratch(x.rows(), keys.rows(), keys.columns()));
  if (x.rows() <= kFewRows) {
    first_half.few_rows();
    return second_half.few_rows();
  }
  first_half.prepare();
  second_half.prepare();
  std::atomic<std::int64_t> floored = 0;
  const RowBlocks blocks(x.rows());
  parallel_blocks(blocks.count(), [&](std::int64_t b) {
    blocks.visit(b, [&](std::int64_t first, std::int64_t rows) {
      first_half.block(first, rows);
      floored += second_half.block(first, rows);
    });
  });
  return floored;
}

std::int64_t pattention_backward_workspace(std::int64_t rows, std::int64_t num_tokens, std::int64_t d_in,
                                           std::int64_t d_out) {
  return MixBackward<float>::scratch(rows, num_tokens, d_out) + ScoresBackward<float>::scratch(rows, num_tokens, d_in) +
         superblock_rows(rows) * scratch_pitch(num_tokens);
}

template <class T>
void pattention_mix_backward(PattentionNorm norm, double scale, ConstTensorView scores, ConstTensorView stat,
                             ConstTensorView values, ConstTensorView du, ConstTensorView dweight, GradMode dvalues_mode,
                             TensorView dvalues, TensorView dscores, TensorView dot, TensorView workspace) {
  MixBackward<T> half(norm, scale, scores, stat, values, du, dweight, dvalues_mode, dvalues, start_of<T>(workspace));
  const Rows<T> d(dscores);
  const Rows<T> dots(dot);
  half.prepare();
  over_superblocks(
      du.rows(),
      [&](std::int64_t first, std::int64_t rows, std::int64_t offset) {
        T of_rows[kMostRows];
        half.block(first, rows, offset, d.row(first), d.stride, of_rows);
        if (dots) {
          for (std::int64_t i = 0; i < rows; ++i) *dots.row(first + i) = of_rows[i];
        }
      },
      [&](std::int64_t start, std::int64_t rows) {
        parallel_blocks(half.strips(), [&](std::int64_t strip) { half.gradient(strip, start, rows); });
      });
}

template <class T>
void pattention_scores_backward(PattentionNorm norm, double scale, ConstTensorView scores, ConstTensorView stat,
                                ConstTensorView dot, ConstTensorView x, ConstTensorView keys, TensorView dscores,
                                GradMode dx_mode, TensorView dx, GradMode dkeys_mode, TensorView dkeys,
                                TensorView workspace) {
  ScoresBackward<T> half(norm, scale, scores, stat, x, keys, dx_mode, dx, dkeys_mode, dkeys, start_of<T>(workspace));
  const Rows<T> d(dscores);
  const Rows<const T> dots(dot);
  half.prepare();
  over_superblocks(
      x.rows(),
      [&](std::int64_t first, std::int64_t rows, std::int64_t offset) {
        half.block(first, rows, offset, d.row(first), d.stride, dots.row(first), dots.stride);
      },
      [&](std::int64_t start, std::int64_t rows) {
        parallel_blocks(half.strips(),
                        [&](std::int64_t strip) { half.gradient(strip, start, rows, d.row(start), d.stride); });
      });
}

template <class T>
void pattention_backward(PattentionNorm norm, double scale, ConstTensorView scores, ConstTensorView stat,
                         ConstTensorView x, ConstTensorView keys, ConstTensorView values, ConstTensorView du,
                         ConstTensorView dweight, GradMode dx_mode, TensorView dx, GradMode dkeys_mode,
                         TensorView dkeys, GradMode dvalues_mode, TensorView dvalues, TensorView workspace) {
  const std::int64_t all_rows = x.rows();
  const std::int64_t n = keys.rows();
  T* start_mix = start_of<T>(workspace);
  T* start_scores = start_mix + MixBackward<T>::scratch(all_rows, n, values.columns());
  T* d = start_scores + ScoresBackward<T>::scratch(all_rows, n, keys.columns());  // dscores of a superblock
  const std::int64_t pitch = scratch_pitch(n);
  MixBackward<T> mix(norm, scale, scores, stat, values, du, dweight, dvalues_mode, dvalues, start_mix);
  ScoresBackward<T> rest(norm, scale, scores, stat, x, keys, dx_mode, dx, dkeys_mode, dkeys, start_scores);
  mix.prepare();
  rest.prepare();
  over_superblocks(
      all_rows,
      [&](std::int64_t first, std::int64_t rows, std::int64_t offset) {
        T dots[kMostRows];
        T* here = d + offset * pitch;
        mix.block(first, rows, offset, here, pitch, dots);
        rest.block(first, rows, offset, here, pitch, dots, 1);
      },
      [&](std::int64_t start, std::int64_t rows) {
        parallel_blocks(mix.strips(), [&](std::int64_t strip) {
          mix.gradient(strip, start, rows);
          rest.gradient(strip, start, rows, d, pitch);
        });
      });
}

// ---------------------------------------------------------------------------------------------------- row scales

namespace {

/// The factor of a row of U; 0 for a floored one.
template <class T>
T normalizer(PattentionNorm norm, double scale, T weight) {
  if (norm == PattentionNorm::softmax) return static_cast<T>(scale / static_cast<double>(weight));
  return row_factor(scale, weight);
}

constexpr std::int64_t kRowsAtOnce = 64;

}  // namespace

template <class T>
std::int64_t row_normalize_forward(PattentionNorm norm, double scale, ConstTensorView u_view,
                                   ConstTensorView weight_view, TensorView y_view) {
  using V = Vec<T>;
  const Rows<const T> u(u_view);
  const Rows<const T> weight(weight_view);
  const Rows<T> y(y_view);
  std::atomic<std::int64_t> floored = 0;
  parallel_blocks(blocks_of(u.count, kRowsAtOnce), [&](std::int64_t block) {
    const std::int64_t last = std::min(u.count, (block + 1) * kRowsAtOnce);
    for (std::int64_t i = block * kRowsAtOnce; i < last; ++i) {
      const T factor = normalizer<T>(norm, scale, *weight.row(i));
      if (factor == T(0)) {
        std::fill_n(y.row(i), y.columns, T(0));
        ++floored;
        continue;
      }
      for_vectors<V>(u.columns, [&](std::int64_t j, auto... rest) {
        (V::all(factor) * V::load(u.row(i) + j, rest...)).store(y.row(i) + j, rest...);
      });
    }
  });
  return floored;
}

template <class T>
void row_normalize_backward(PattentionNorm norm, double scale, ConstTensorView u_view, ConstTensorView weight_view,
                            ConstTensorView dy_view, TensorView du_view, TensorView dweight_view) {
  using V = Vec<T>;
  const Rows<const T> u(u_view);
  const Rows<const T> weight(weight_view);
  const Rows<const T> dy(dy_view);
  const Rows<T> du(du_view);
  const Rows<T> dweight(dweight_view);
  const double power = norm == PattentionNorm::softmax ? -1. : -0.5;  // the factor goes as weight^power
  parallel_blocks(blocks_of(u.count, kRowsAtOnce), [&](std::int64_t block) {
    const std::int64_t last = std::min(u.count, (block + 1) * kRowsAtOnce);
    for (std::int64_t i = block * kRowsAtOnce; i < last; ++i) {
      const T factor = normalizer<T>(norm, scale, *weight.row(i));
      if (factor == T(0)) {
        std::fill_n(du.row(i), du.columns, T(0));
        *dweight.row(i) = T(0);
        continue;
      }
      V sum = V::all(0);
      for_vectors<V>(u.columns, [&](std::int64_t j, auto... rest) {
        const V g = V::load(dy.row(i) + j, rest...);
        sum = fma(g, V::load(u.row(i) + j, rest...), sum);
        (V::all(factor) * g).store(du.row(i) + j, rest...);
      });
      *dweight.row(i) = static_cast<T>(power * static_cast<double>(factor) * static_cast<double>(sum_lanes(sum)) /
                                       static_cast<double>(*weight.row(i)));
    }
  });
}

#define TFORGE_INSTANTIATE(T)                                                                                          \
  template void pattention_scores_forward<T>(PattentionNorm, ConstTensorView, ConstTensorView, TensorView, TensorView, \
                                             TensorView);                                                              \
  template std::int64_t pattention_mix_forward<T>(PattentionNorm, double, ConstTensorView, ConstTensorView,            \
                                                  ConstTensorView, TensorView, TensorView, TensorView);                \
  template std::int64_t pattention_forward<T>(PattentionNorm, double, ConstTensorView, ConstTensorView,                \
                                              ConstTensorView, TensorView, TensorView, TensorView, TensorView,         \
                                              TensorView);                                                             \
  template void pattention_mix_backward<T>(PattentionNorm, double, ConstTensorView, ConstTensorView, ConstTensorView,  \
                                           ConstTensorView, ConstTensorView, GradMode, TensorView, TensorView,         \
                                           TensorView, TensorView);                                                    \
  template void pattention_scores_backward<T>(PattentionNorm, double, ConstTensorView, ConstTensorView,                \
                                              ConstTensorView, ConstTensorView, ConstTensorView, TensorView, GradMode, \
                                              TensorView, GradMode, TensorView, TensorView);                           \
  template void pattention_backward<T>(PattentionNorm, double, ConstTensorView, ConstTensorView, ConstTensorView,      \
                                       ConstTensorView, ConstTensorView, ConstTensorView, ConstTensorView, GradMode,   \
                                       TensorView, GradMode, TensorView, GradMode, TensorView, TensorView);            \
  template std::int64_t row_normalize_forward<T>(PattentionNorm, double, ConstTensorView, ConstTensorView,             \
                                                 TensorView);                                                          \
  template void row_normalize_backward<T>(PattentionNorm, double, ConstTensorView, ConstTensorView, ConstTensorView,   \
                                          TensorView, TensorView)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cpu
