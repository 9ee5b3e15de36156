#pragma once
// How every kernel of ours is started, and the sums and loads that they share.
#include <cuda_runtime.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "core/bf16.h"
#include "core/cuda/runtime.h"
#include "core/device.h"

namespace tforge::kernels::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffU;

/// Queues one kernel. Throws DeviceError when it cannot be started.
template <class... Parameters, class... Arguments>
void launch(const Stream& stream, dim3 grid, dim3 block, std::size_t shared_bytes, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  constexpr std::size_t kSharedWithoutAsking = 48 << 10;
  if (shared_bytes > kSharedWithoutAsking) {
    tforge::cuda::check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
        "shared memory of a kernel");
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream.native());
  tforge::cuda::check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...),
                      "the start of a kernel");
}

/// The dynamic shared memory of the running block.
template <class T>
__device__ T* dynamic_shared() {
#ifdef TFORGE_CUDA_EMULATOR
  return reinterpret_cast<T*>(tforge_emulator::dynamic_shared_memory());
#else
  extern __shared__ __align__(16) unsigned char tforge_shared[];
  return reinterpret_cast<T*>(tforge_shared);
#endif
}

/// Blocks of `per_block` pieces of work for `count` of them, no more than a device has use for.
inline unsigned blocks_for(std::int64_t count, std::int64_t per_block, std::int64_t most = std::int64_t{1} << 20) {
  const std::int64_t blocks = (count + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < most ? blocks : most);
}

/// Two numbers as bf16, each rounded to nearest, ties to even; `first` in the lower half. A NaN becomes 0x7fff.
__device__ inline unsigned pair_of(float first, float second) {
#ifdef TFORGE_CUDA_EMULATOR
  const auto rounded = [](float x) { return x == x ? unsigned{bf16(x).bits} : 0x7fffU; };
  return rounded(first) | rounded(second) << 16;
#else
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
#endif
}

/// What is computed with, of a stored number, and back. The bits of core/bf16.h, but for those of a NaN.
__device__ inline float computed(float x) { return x; }
__device__ inline double computed(double x) { return x; }
__device__ inline float computed(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
template <class T>
__device__ T stored(Compute<T> x) {
  if constexpr (std::is_same_v<T, bf16>) {
    T y;
    y.bits = static_cast<std::uint16_t>(pair_of(x, 0));
    return y;
  } else {
    return x;
  }
}

/// kCount neighbours, loaded and stored at once: 16 bytes where the operands allow it, else one element.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T element[kCount];
};
template <int kCount, class T>
__device__ Pack<Compute<T>, kCount> load(T* from) {
  using Stored = Pack<std::remove_const_t<T>, kCount>;
  const Stored pack = *reinterpret_cast<const Stored*>(from);
  if constexpr (std::is_same_v<Stored, Pack<Compute<T>, kCount>>) {
    return pack;
  } else {
    Pack<Compute<T>, kCount> wide;
    for (int k = 0; k < kCount; ++k) wide.element[k] = computed(pack.element[k]);
    return wide;
  }
}
/// Stores a pack as it is, in global memory. By the names of the instructions: a structure whose elements were computed
/// one by one the compiler would store one by one.
template <class T, int kCount>
__device__ void store_whole(T* to, const Pack<T, kCount>& pack) {
#ifdef TFORGE_CUDA_EMULATOR
  *reinterpret_cast<Pack<T, kCount>*>(to) = pack;
#else
  if constexpr (sizeof(pack) == sizeof(uint4)) {
    const auto x = std::bit_cast<uint4>(pack);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(x.x), "r"(x.y),
                 "r"(x.z), "r"(x.w)
                 : "memory");
  } else if constexpr (sizeof(pack) == sizeof(uint2)) {
    const auto x = std::bit_cast<uint2>(pack);
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(x.x), "r"(x.y) : "memory");
  } else {
    *reinterpret_cast<Pack<T, kCount>*>(to) = pack;
  }
#endif
}
template <int kCount, class T>
__device__ void store(T* to, const Pack<Compute<T>, kCount>& pack) {
  if constexpr (std::is_same_v<T, Compute<T>>) {
    store_whole(to, pack);
  } else if constexpr (kCount % 2 == 0) {
    Pack<unsigned, kCount / 2> pairs;
    for (int k = 0; k < kCount; k += 2) pairs.element[k / 2] = pair_of(pack.element[k], pack.element[k + 1]);
    store_whole(to, std::bit_cast<Pack<T, kCount>>(pairs));
  } else {
    static_assert(kCount == 1);
    *to = stored<T>(pack.element[0]);
  }
}

/// Elements of 16 bytes.
template <class T>
inline constexpr int kWhole = 16 / sizeof(T);

/// Calls f(c) for the packs of kCount columns, from c on, of a row that are this thread's, when a block has the row.
/// Whatever kCount, a thread has the same columns, so that it does not show in sums.
template <class T, int kCount, int kThreads, class F>
__device__ void over_row(std::int64_t columns, const F& f) {
  for (std::int64_t first = threadIdx.x * kWhole<T>; first < columns; first += kThreads * kWhole<T>) {
    for (int k = 0; k < kWhole<T>; k += kCount) {
      if (first + k < columns) f(first + k);
    }
  }
}

/// Threads of a block that has a row of `columns` elements: those that over_row() of `most` threads has work for, in
/// whole warps. The others would add nothing: over_block() has the same bits without them.
template <class T>
unsigned row_threads(std::int64_t columns, int most) {
  const std::int64_t warps = (columns + kWhole<T> * kWarp - 1) / (kWhole<T> * kWarp);
  return static_cast<unsigned>(warps < 1 ? kWarp : warps * kWarp < most ? warps * kWarp : most);
}

/// Every row of a matrix starts where a pack of kCount may start, and holds whole packs.
template <int kCount, class Matrix>
bool packs(const Matrix& m) {
  constexpr std::size_t kBytes = kCount * sizeof(*m.data);
  return reinterpret_cast<std::uintptr_t>(m.data) % kBytes == 0 && (m.rows <= 1 || m.stride % kCount == 0) &&
         m.columns % kCount == 0;
}

struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Largest {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

/// Folds one value of each lane of a warp, in one order; every lane gets the result.
template <class Fold, class T>
__device__ T over_warp(T value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = Fold()(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

/// The same over a block of at most kThreads threads (whole warps); every thread gets the result. All threads take
/// part.
template <class Fold, int kThreads, class T>
__device__ T over_block(T value) {
  constexpr int kWarps = kThreads / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  __shared__ T of_warp[kWarps];
  value = over_warp<Fold>(value);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = of_warp[0];
  for (int i = 1; i < kWarps; ++i) {
    if (i < warps) value = Fold()(value, of_warp[i]);
  }
  __syncthreads();  // the next call writes the same memory
  return value;
}

}  // namespace tforge::kernels::cuda
