#include "kernels/cpu/pattention.h"

#include <algorithm>
#include <array>
#include <optional>

#include "kernels/cpu/packed_product.h"
#include "kernels/cpu/pattention_blocks.h"
#include "kernels/cpu/row_passes.h"

namespace tforge::kernels::cpu {
namespace {

constexpr std::int64_t kTokenStrip = 2 * kTileRows;  // tokens of one piece of a weight gradient

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
    if (packs_) {
      pack_rows(right_.row(first), right_.stride, offset, rows, depth_, right_.columns, panels_);
    }
  }
  /// Takes R packed by another gradient's pack(), which runs before add().
  void share(const WeightGradient& other) {
    panels_ = other.panels_;
    packs_ = false;
  }
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
  bool packs_ = true;
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
      dots[i] = passes_.activate_backward(norm_, row_parameter<T>(norm_, scale_, stat_, first + i),
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
  const RowPasses<T>& passes_ = row_passes<T>();
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

  /// For another layer of the same X, whose block() runs first.
  void share_packed_x(const ScoresBackward& other) { dkeys_.share(other.dkeys_); }
  void prepare() {
    if (dx_) pack_matrix(keys_.data, keys_.stride, n_, keys_.columns, panels_);
  }
  /// The rest of dscores in place, given the rows' dots (dot_stride apart), then dX.
  void block(std::int64_t first, std::int64_t rows, std::int64_t offset, T* d, std::int64_t pitch, const T* dots,
             std::int64_t dot_stride) const {
    if (norm_ == PattentionNorm::l2_norm_gelu) {
      for (std::int64_t i = 0; i < rows; ++i) {
        // dA = s (dB - B dot / scale^2) with s = scale / r, B = s A
        const T factor = row_factor(scale_, *stat_.row(first + i));
        const double along =
            -static_cast<double>(factor) * static_cast<double>(dots[i * dot_stride]) / (scale_ * scale_);
        passes_.through_row_norm(factor, static_cast<T>(along), scores_.row(first + i), n_, d + i * pitch);
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
  const RowPasses<T>& passes_ = row_passes<T>();
  PattentionNorm norm_;
  double scale_;
  Rows<const T> scores_, stat_, keys_;
  GradMode dx_mode_;
  Rows<T> dx_;
  std::int64_t n_;
  T* panels_;  // of K
  WeightGradient<T> dkeys_;
};
}  // namespace

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
void pattention_backward(PattentionNorm norm, ConstTensorView x, std::span<const PattentionBackward> layers,
                         GradMode dx_mode, TensorView dx, TensorView workspace) {
  struct Halves {
    MixBackward<T> mix;
    ScoresBackward<T> rest;
    T* d;  // dscores of a superblock
    std::int64_t pitch;
  };
  std::array<std::optional<Halves>, kMaxPattentionGroup> group;
  std::array<std::int64_t, kMaxPattentionGroup + 1> pieces{};  // of the weight gradients, before each layer
  T* start = start_of<T>(workspace);
  for (std::size_t g = 0; g < layers.size(); ++g) {
    const PattentionBackward& l = layers[g];
    const std::int64_t n = l.keys.rows(), rows = x.rows();
    T* const second = start + MixBackward<T>::scratch(rows, n, l.values.columns());
    T* const d = second + ScoresBackward<T>::scratch(rows, n, l.keys.columns());
    const GradMode mode = g == 0 ? dx_mode : GradMode::accumulate;
    group[g].emplace(
        Halves{{norm, l.scale, l.scores, l.stat, l.values, l.du, l.dweight, l.dvalues_mode, l.dvalues, start},
               {norm, l.scale, l.scores, l.stat, x, l.keys, mode, dx, l.dkeys_mode, l.dkeys, second},
               d,
               scratch_pitch(n)});
    if (g > 0) group[g]->rest.share_packed_x(group[0]->rest);
    pieces[g + 1] = pieces[g] + 2 * group[g]->mix.strips();
    start += pattention_backward_workspace(rows, n, l.keys.columns(), l.values.columns());
  }
  const auto for_each_layer = [&](const auto& f) {
    for (std::size_t g = 0; g < layers.size(); ++g) f(*group[g]);
  };
  for_each_layer([](Halves& layer) {
    layer.mix.prepare();
    layer.rest.prepare();
  });
  over_superblocks(
      x.rows(),
      [&](std::int64_t first, std::int64_t rows, std::int64_t offset) {
        for_each_layer([&](Halves& layer) {
          T dots[kMostRows];
          T* here = layer.d + offset * layer.pitch;
          layer.mix.block(first, rows, offset, here, layer.pitch, dots);
          layer.rest.block(first, rows, offset, here, layer.pitch, dots, 1);
        });
      },
      [&](std::int64_t first, std::int64_t rows) {
        parallel_blocks(pieces[layers.size()], [&](std::int64_t piece) {
          std::size_t g = 0;
          while (piece >= pieces[g + 1]) ++g;
          const Halves& layer = *group[g];
          const std::int64_t strip = piece - pieces[g], strips = layer.mix.strips();
          if (strip < strips) layer.mix.gradient(strip, first, rows);
          else layer.rest.gradient(strip - strips, first, rows, layer.d, layer.pitch);
        });
      });
}

#define TFORGE_INSTANTIATE(T)                                                                                          \
  template void pattention_mix_backward<T>(PattentionNorm, double, ConstTensorView, ConstTensorView, ConstTensorView,  \
                                           ConstTensorView, ConstTensorView, GradMode, TensorView, TensorView,         \
                                           TensorView, TensorView);                                                    \
  template void pattention_scores_backward<T>(PattentionNorm, double, ConstTensorView, ConstTensorView,                \
                                              ConstTensorView, ConstTensorView, ConstTensorView, TensorView, GradMode, \
                                              TensorView, GradMode, TensorView, TensorView);                           \
  template void pattention_backward<T>(PattentionNorm, ConstTensorView, std::span<const PattentionBackward>, GradMode, \
                                       TensorView, TensorView)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cpu
