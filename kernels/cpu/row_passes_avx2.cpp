// Passes over rows for processors with AVX2 and FMA, and the choice.
#include "kernels/cpu/line_avx2.inc"
// clang-format off: the passes are written for the lines above
#include "kernels/cpu/row_passes.inc"
// clang-format on

namespace tforge::kernels::cpu {

template <>
const RowPasses<float>& row_passes_avx2<float>() {
  return kPasses<float>;
}
template <>
const RowPasses<double>& row_passes_avx2<double>() {
  return kPasses<double>;
}

template <class T>
const RowPasses<T>& row_passes() {
  static const RowPasses<T>& chosen = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")
                                          ? row_passes_avx512<T>()
                                          : row_passes_avx2<T>();
  return chosen;
}
template const RowPasses<float>& row_passes<float>();
template const RowPasses<double>& row_passes<double>();

}  // namespace tforge::kernels::cpu
