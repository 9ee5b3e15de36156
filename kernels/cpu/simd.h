#pragma once
// Vectors of eight floats or four doubles (AVX2 + FMA) behind one set of names, so that a kernel is written once as a
// template over its element type: `using V = Vec<T>`.
//
// Multiply-adds are written as fma(): the build forbids the compiler to make them up (-ffp-contract=off), so that a
// row's bits never depend on how a loop was compiled. Lane sums have a fixed order.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace tforge::kernels::cpu {

struct F32x8 {
  using Scalar = float;
  static constexpr int kLanes = 8;
  __m256 v;

  static F32x8 all(float x) { return {_mm256_set1_ps(x)}; }
  static F32x8 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  /// The first `count` < 8 elements, 0 in the other lanes; touches no memory past them.
  static F32x8 load(const float* p, std::int64_t count) { return {_mm256_maskload_ps(p, mask(count))}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(float* p, std::int64_t count) const { _mm256_maskstore_ps(p, mask(count), v); }
  /// All ones in the first `count` lanes.
  static __m256i mask(std::int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }

  friend F32x8 operator+(F32x8 a, F32x8 b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend F32x8 operator-(F32x8 a, F32x8 b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend F32x8 operator*(F32x8 a, F32x8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend F32x8 operator/(F32x8 a, F32x8 b) { return {_mm256_div_ps(a.v, b.v)}; }
};

struct F64x4 {
  using Scalar = double;
  static constexpr int kLanes = 4;
  __m256d v;

  static F64x4 all(double x) { return {_mm256_set1_pd(x)}; }
  static F64x4 load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static F64x4 load(const double* p, std::int64_t count) { return {_mm256_maskload_pd(p, mask(count))}; }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  void store(double* p, std::int64_t count) const { _mm256_maskstore_pd(p, mask(count), v); }
  static __m256i mask(std::int64_t count) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
  }

  friend F64x4 operator+(F64x4 a, F64x4 b) { return {_mm256_add_pd(a.v, b.v)}; }
  friend F64x4 operator-(F64x4 a, F64x4 b) { return {_mm256_sub_pd(a.v, b.v)}; }
  friend F64x4 operator*(F64x4 a, F64x4 b) { return {_mm256_mul_pd(a.v, b.v)}; }
  friend F64x4 operator/(F64x4 a, F64x4 b) { return {_mm256_div_pd(a.v, b.v)}; }
};

/// The vector of element type T.
template <class T>
using Vec = std::conditional_t<std::is_same_v<T, float>, F32x8, F64x4>;

/// a * b + c, rounded once.
inline F32x8 fma(F32x8 a, F32x8 b, F32x8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F64x4 fma(F64x4 a, F64x4 b, F64x4 c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
/// Lane-wise; a NaN in `b` is kept, one in `a` is not.
inline F32x8 max(F32x8 a, F32x8 b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F64x4 max(F64x4 a, F64x4 b) { return {_mm256_max_pd(a.v, b.v)}; }
inline F32x8 min(F32x8 a, F32x8 b) { return {_mm256_min_ps(a.v, b.v)}; }
inline F64x4 min(F64x4 a, F64x4 b) { return {_mm256_min_pd(a.v, b.v)}; }
inline F32x8 sqrt(F32x8 a) { return {_mm256_sqrt_ps(a.v)}; }
inline F64x4 sqrt(F64x4 a) { return {_mm256_sqrt_pd(a.v)}; }
/// `value` in the first `count` lanes, `other` in the rest.
inline F32x8 first_lanes(std::int64_t count, F32x8 value, F32x8 other) {
  return {_mm256_blendv_ps(other.v, value.v, _mm256_castsi256_ps(F32x8::mask(count)))};
}
inline F64x4 first_lanes(std::int64_t count, F64x4 value, F64x4 other) {
  return {_mm256_blendv_pd(other.v, value.v, _mm256_castsi256_pd(F64x4::mask(count)))};
}

/// Sum of the lanes, always in the same order.
inline float sum_lanes(F32x8 a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline double sum_lanes(F64x4 a) {
  const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}
inline float max_lanes(F32x8 a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
inline double max_lanes(F64x4 a) {
  const __m128d m = _mm_max_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_max_sd(m, _mm_unpackhi_pd(m, m)));
}

/// Calls `f` lane by lane: how f64 reaches the C library.
template <class F>
F64x4 map_lanes(F64x4 x, F f) {
  alignas(32) double lane[F64x4::kLanes];
  _mm256_store_pd(lane, x.v);
  for (double& value : lane) value = f(value);
  return {_mm256_load_pd(lane)};
}

/// exp(x) for x in [-87.3, 88.3] (not checked), relative error < 1e-7: x = n ln 2 + r, |r| <= ln 2 / 2, with ln 2 in
/// two parts; exp(r) by the polynomial of the Cephes library (S. Moshier).
inline F32x8 exp_in_range(F32x8 x) {
  const F32x8 magic = F32x8::all(12582912.F);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const F32x8 shifted = fma(x, F32x8::all(1.44269504F), magic);
  const F32x8 n = shifted - magic;
  F32x8 r = fma(n, F32x8::all(-0.693359375F), x);
  r = fma(n, F32x8::all(2.12194440e-4F), r);
  F32x8 p = F32x8::all(1.9875691500e-4F);
  p = fma(p, r, F32x8::all(1.3981999507e-3F));
  p = fma(p, r, F32x8::all(8.3334519073e-3F));
  p = fma(p, r, F32x8::all(4.1665795894e-2F));
  p = fma(p, r, F32x8::all(1.6666665459e-1F));
  p = fma(p, r, F32x8::all(5.0000001201e-1F));
  p = fma(p, r * r, r) + F32x8::all(1.F);
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted.v), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p.v), exponent))};
}

/// exp(x). f32: relative error < 1e-7, 0 below -87.3 (no subnormal results), inf above 88.7; NaN stays NaN.
inline F32x8 exp(F32x8 x) {
  const F32x8 low = F32x8::all(-87.3F);
  const F32x8 high = F32x8::all(88.722F);
  const F32x8 e = exp_in_range(min(high, max(low, x)));
  const __m256 overflow = _mm256_cmp_ps(x.v, high.v, _CMP_GT_OQ);
  const __m256 kept = _mm256_andnot_ps(_mm256_cmp_ps(x.v, low.v, _CMP_LT_OQ), e.v);
  return {_mm256_blendv_ps(kept, _mm256_set1_ps(std::numeric_limits<float>::infinity()), overflow)};
}
inline F64x4 exp(F64x4 x) {
  return map_lanes(x, [](double value) { return std::exp(value); });
}

/// Of the standard normal distribution at x: `cdf` Phi(x), and exp(-x^2/2), which both gelu and its slope need.
template <class V>
struct Normal {
  V cdf;
  V bell;
};

/// |error of cdf| < 2e-7, relative error 1.1e-5 in the lower tail. exp(x^2/2) Phi(-|x|) is a polynomial in
/// t = 1 / (1 + 0.34 |x|) (own weighted minimax fit, error 1.1e-8).
inline Normal<F32x8> normal(F32x8 x) {
  const F32x8 size{_mm256_andnot_ps(_mm256_set1_ps(-0.F), x.v)};
  const F32x8 bell = exp_in_range(max(F32x8::all(-87.3F), F32x8::all(-0.5F) * x * x));
  const F32x8 one = F32x8::all(1.F);
  const F32x8 t = one / fma(size, F32x8::all(0.34F), one);
  F32x8 p = F32x8::all(0.04422994833F);
  p = fma(p, t, F32x8::all(-0.1978146146F));
  p = fma(p, t, F32x8::all(0.2590957642F));
  p = fma(p, t, F32x8::all(-0.02602581671F));
  p = fma(p, t, F32x8::all(0.1542017436F));
  p = fma(p, t, F32x8::all(0.1303464376F));
  p = fma(p, t, F32x8::all(0.1359665486F));
  const F32x8 tail = p * t * bell;  // Phi(-|x|)
  return {{_mm256_blendv_ps((one - tail).v, tail.v, x.v)}, bell};
}
inline Normal<F64x4> normal(F64x4 x) {
  return {map_lanes(x, [](double value) { return 0.5 * std::erfc(-value * 0.70710678118654752440); }),
          map_lanes(x, [](double value) { return std::exp(-0.5 * value * value); })};
}

/// x Phi(x)
template <class V>
V gelu(V x) {
  return x * normal(x).cdf;
}
/// x Phi(x) and its slope Phi(x) + x phi(x)
template <class V>
struct GeluAndSlope {
  V value;
  V slope;
};
template <class V>
GeluAndSlope<V> gelu_and_slope(V x) {
  const Normal<V> n = normal(x);
  const V inverse_sqrt_2pi = V::all(static_cast<typename V::Scalar>(0.39894228040143267794));
  return {x * n.cdf, fma(x * inverse_sqrt_2pi, n.bell, n.cdf)};
}

}  // namespace tforge::kernels::cpu
