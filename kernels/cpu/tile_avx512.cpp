// Tile products for processors with AVX-512: 12 rows by 2 vectors fill 24 of the 32 registers.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f"))), apply_to = function)
#else
#pragma GCC target("avx512f")
#endif
#include <immintrin.h>

#include "kernels/cpu/tile_kernel.h"

namespace tforge::kernels::cpu {
namespace {

struct F32x16 {
  using Scalar = float;
  static constexpr int kLanes = 16;
  __m512 v;
  static F32x16 zero() { return {_mm512_setzero_ps()}; }
  static F32x16 all(float x) { return {_mm512_set1_ps(x)}; }
  static F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  static F32x16 add(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
  static F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
};

struct F64x8 {
  using Scalar = double;
  static constexpr int kLanes = 8;
  __m512d v;
  static F64x8 zero() { return {_mm512_setzero_pd()}; }
  static F64x8 all(double x) { return {_mm512_set1_pd(x)}; }
  static F64x8 load(const double* p) { return {_mm512_loadu_pd(p)}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  static F64x8 add(F64x8 a, F64x8 b) { return {_mm512_add_pd(a.v, b.v)}; }
  static F64x8 fma(F64x8 a, F64x8 b, F64x8 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
};

}  // namespace

template <>
TileProduct<float> tile_product_avx512<float>() {
  return tile<F32x16, kTileRows>;
}
template <>
TileProduct<double> tile_product_avx512<double>() {
  return tile<F64x8, kTileRows>;
}

}  // namespace tforge::kernels::cpu

#ifdef __clang__
#pragma clang attribute pop
#endif
