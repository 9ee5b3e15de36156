// Tile products for processors with AVX2 and FMA (6 rows by 2 vectors fill 12 of the 16 registers), and the choice.
#include <immintrin.h>

#include "kernels/cpu/tile_kernel.h"

namespace tforge::kernels::cpu {
namespace {

struct F32x8 {
  using Scalar = float;
  static constexpr int kLanes = 8;
  __m256 v;
  static F32x8 zero() { return {_mm256_setzero_ps()}; }
  static F32x8 all(float x) { return {_mm256_set1_ps(x)}; }
  static F32x8 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  static F32x8 add(F32x8 a, F32x8 b) { return {_mm256_add_ps(a.v, b.v)}; }
  static F32x8 fma(F32x8 a, F32x8 b, F32x8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
};

struct F64x4 {
  using Scalar = double;
  static constexpr int kLanes = 4;
  __m256d v;
  static F64x4 zero() { return {_mm256_setzero_pd()}; }
  static F64x4 all(double x) { return {_mm256_set1_pd(x)}; }
  static F64x4 load(const double* p) { return {_mm256_loadu_pd(p)}; }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  static F64x4 add(F64x4 a, F64x4 b) { return {_mm256_add_pd(a.v, b.v)}; }
  static F64x4 fma(F64x4 a, F64x4 b, F64x4 c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
};

constexpr int kRowsInRegisters = 6;

}  // namespace

template <>
TileProduct<float> tile_product_avx2<float>() {
  return tile<F32x8, kRowsInRegisters>;
}
template <>
TileProduct<double> tile_product_avx2<double>() {
  return tile<F64x4, kRowsInRegisters>;
}

template <class T>
TileProduct<T> tile_product() {
  static const TileProduct<T> chosen =
      __builtin_cpu_supports("avx512f") ? tile_product_avx512<T>() : tile_product_avx2<T>();
  return chosen;
}
template TileProduct<float> tile_product<float>();
template TileProduct<double> tile_product<double>();

}  // namespace tforge::kernels::cpu
