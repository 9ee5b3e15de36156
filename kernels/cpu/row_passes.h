#pragma once
// Passes over one row between the products of Pattention, attention and the head, where the transcendental functions
// are. Each is compiled for two processor families and gives the same bits on both (line_math.inc).
#include <cstdint>

#include "core/device.h"
#include "core/pattention_norm.h"

namespace tforge::kernels::cpu {

template <class T>
struct Softmax {
  T max;
  T sum;
};

/// All passes of one processor family. Rows hold `count` elements in order; sums take element j into lane j modulo a
/// line, so that appended zeros leave every bit of a sum.
template <class T>
struct RowPasses {
  T (*sum_of_squares)(const T* a, std::int64_t count);
  double (*sum_of_squares_in_f64)(const T* a, std::int64_t count);
  /// -inf for no elements. A NaN may be passed over: the exponential finds it again.
  T (*largest)(const T* a, std::int64_t count);
  T (*dot)(const T* a, const T* b, std::int64_t count);
  /// y = factor * x; y may be x.
  void (*scale)(T factor, const T* x, std::int64_t count, T* y);

  // Products of a few rows with a matrix that is read once, where it lies. The bits of an element do not depend on how
  // many rows there are.
  /// out[i, j] = x_i . b_j for rows x_i of `count` elements and b_rows rows b_j; `out_row` elements a row of out.
  void (*dots)(std::int64_t rows, const T* x, std::int64_t x_row, std::int64_t b_rows, const T* b, std::int64_t b_row,
               std::int64_t count, T* out, std::int64_t out_row);
  /// out[i, c] = sum_k p[i, k] v[k, c] for k < terms and c < count: one chain of multiply-adds in order of k.
  void (*weighted_rows)(std::int64_t rows, const T* p, std::int64_t p_row, std::int64_t terms, const T* v,
                        std::int64_t v_row, std::int64_t count, T* out, std::int64_t out_row);

  /// P of scores (pattention.h). parameter: scale / r (l2_norm_gelu; 0 for a floored row, whose P is 0 whatever the
  /// scores), the largest score (softmax), unused (gelu_l2_norm). Returns their part of the row's weight.
  T (*activate)(PattentionNorm norm, T parameter, const T* scores, std::int64_t count, T* p);
  /// From dP (in `d`) to dscores in place, and P again. Returns sum_j dB_j B_j for l2_norm_gelu.
  T (*activate_backward)(PattentionNorm norm, T parameter, T dweight, const T* scores, std::int64_t count, T* d, T* p);
  /// d = factor * (d + along * scores); all 0 for factor 0.
  void (*through_row_norm)(T factor, T along, const T* scores, std::int64_t count, T* d);

  /// row[j] = exp(scale row[j] - max), where max is the largest scaled element; zeros behind them up to `reach`
  /// elements, for which the row has room up to the next whole line.
  Softmax<T> (*exponentials)(T* row, std::int64_t count, std::int64_t reach, T scale);
  /// p[j] = exp(scale p[j] - lse) and ds[j] = p[j] (ds[j] - dot); zeros behind them as above.
  void (*score_gradients)(T* p, T* ds, std::int64_t count, std::int64_t reach, T scale, T lse, T dot);

  /// sum_j exp(z_j - shift); pieces of a fixed length join in f64.
  T (*sum_of_exponentials)(const T* z, std::int64_t count, T shift);
  /// z_j = factor * exp(z_j - shift)
  void (*scaled_exponentials)(T* z, std::int64_t count, T shift, T factor);

  void (*gelu)(const T* x, std::int64_t count, T* y);
  /// dx {=, +=} dy * slope of gelu at x
  void (*gelu_backward)(const T* x, const T* dy, std::int64_t count, GradMode mode, T* dx);
};

/// For any x86-64-v3 processor, and for those with AVX-512 F and DQ.
template <class T>
const RowPasses<T>& row_passes_avx2();
template <class T>
const RowPasses<T>& row_passes_avx512();

/// The faster one that this processor has.
template <class T>
const RowPasses<T>& row_passes();

}  // namespace tforge::kernels::cpu
