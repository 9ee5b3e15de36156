// Passes of the Memory Layer for processors with AVX2 and FMA, and the choice.
#ifndef __clang__
// GCC 12 warns of its own intrinsics (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "kernels/cpu/line_avx2.inc"
// clang-format off: the passes are written for the lines above
#include "kernels/cpu/memory_layer_passes.inc"
// clang-format on

namespace tforge::kernels::cpu {

template <>
const MemoryPasses<float>& memory_passes_avx2<float>() {
  return kMemoryPasses<float>;
}
template <>
const MemoryPasses<double>& memory_passes_avx2<double>() {
  return kMemoryPasses<double>;
}

template <class T>
const MemoryPasses<T>& memory_passes() {
  static const MemoryPasses<T>& chosen = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")
                                             ? memory_passes_avx512<T>()
                                             : memory_passes_avx2<T>();
  return chosen;
}
template const MemoryPasses<float>& memory_passes<float>();
template const MemoryPasses<double>& memory_passes<double>();

}  // namespace tforge::kernels::cpu
