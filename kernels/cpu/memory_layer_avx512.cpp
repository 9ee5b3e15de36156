// Passes of the Memory Layer for processors with AVX-512.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq")
// GCC 12 warns of its own intrinsics (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include "kernels/cpu/line_avx512.inc"
// clang-format off: the passes are written for the lines above
#include "kernels/cpu/memory_layer_passes.inc"
// clang-format on

namespace tforge::kernels::cpu {

template <>
const MemoryPasses<float>& memory_passes_avx512<float>() {
  return kMemoryPasses<float>;
}
template <>
const MemoryPasses<double>& memory_passes_avx512<double>() {
  return kMemoryPasses<double>;
}

}  // namespace tforge::kernels::cpu

#ifdef __clang__
#pragma clang attribute pop
#endif
