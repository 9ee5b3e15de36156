#pragma once
// A CUDA device made of the processor: the part of the language and of the runtime that our .cu files use, so that the
// host's compiler builds them and their logic is tested where there is no device. What it is and is not: see
// tests/support/cuda_emulator/emulator.h.
#include <math.h>  // NOLINT(modernize-deprecated-headers): kernels call expf without std::

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>

#define TFORGE_CUDA_EMULATOR 1

// C++ linkage throughout: no clash with a real runtime in the same program.
// NOLINTBEGIN: the names are CUDA's

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorNotReady = 600,
};
struct cudaEmulatedStream;
using cudaStream_t = cudaEmulatedStream*;
enum cudaMemcpyKind { cudaMemcpyDefault };
constexpr unsigned cudaStreamNonBlocking = 1;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaSetDevice(int number);
struct cudaUUID_t {
  char bytes[16];
};
struct cudaDeviceProp {
  cudaUUID_t uuid;
  char name[256];
  int multiProcessorCount;
};
cudaError_t cudaGetDevice(int* number);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int number);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaMalloc(void** memory, std::size_t bytes);
cudaError_t cudaFree(void* memory);
cudaError_t cudaMallocHost(void** memory, std::size_t bytes);
cudaError_t cudaFreeHost(void* memory);
enum cudaMemoryType { cudaMemoryTypeUnregistered = 0, cudaMemoryTypeHost = 1, cudaMemoryTypeDevice = 2 };
struct cudaPointerAttributes {
  cudaMemoryType type;
};
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* memory);
cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream);
cudaError_t cudaMemset2DAsync(void* to, std::size_t pitch, int value, std::size_t row_bytes, std::size_t rows,
                              cudaStream_t stream);
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemcpy2DAsync(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch,
                              std::size_t row_bytes, std::size_t rows, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority);
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest);
struct cudaEmulatedEvent;
using cudaEvent_t = cudaEmulatedEvent*;
cudaError_t cudaEventCreate(cudaEvent_t* event);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace tforge_emulator {

/// While one lives, the host may touch memory of the device.
struct DeviceAccess {
  DeviceAccess();
  ~DeviceAccess();
  DeviceAccess(const DeviceAccess&) = delete;
  DeviceAccess& operator=(const DeviceAccess&) = delete;
};

/// Makes events after this one look so much later.
void pass_time(double milliseconds);

/// Runs every thread of every block.
void run(const cudaLaunchConfig_t& config, const std::function<void()>& thread);

/// Of the running block.
std::byte* dynamic_shared_memory();

/// Waits for all threads of the block.
void block_barrier(unsigned line);
/// Hands 8 bytes to the warp, waits for all of its threads, and returns what each of them handed.
const std::uint64_t* warp_exchange(std::uint64_t mine, unsigned line);
/// Hands `mine` to the warp, waits for all 32 lanes, and has f(what each of them handed) called once.
void warp_operation(void* mine, void (*f)(void* const* lanes), unsigned line);

/// The instructions of kernels/cuda/mma.cuh.
namespace ptx {
void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], unsigned line = __builtin_LINE());
void ldmatrix_x4(unsigned (&x)[4], const void* row, unsigned line = __builtin_LINE());
void ldmatrix_x4_trans(unsigned (&x)[4], const void* row, unsigned line = __builtin_LINE());
void cp_async_16(void* to, const void* from, int bytes);
void cp_async_commit();
void cp_async_wait(std::size_t groups);
template <int kGroups>
void cp_async_wait() {
  cp_async_wait(std::size_t{kGroups});
}
float ex2_approx_ftz(float x);
}  // namespace ptx

template <class T>
std::uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
T from_bits(std::uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T>
T shuffle(T value, int lane, unsigned line) {
  const std::uint64_t* all = warp_exchange(to_bits(value), line);
  return from_bits<T>(all[lane & 31]);
}
int lane();

}  // namespace tforge_emulator

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<Parameters...> copies(arguments...);
  tforge_emulator::run(*config, [&] { std::apply(kernel, copies); });
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
  return bytes <= 227 << 10 ? cudaSuccess : cudaErrorInvalidValue;
}

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static  // blocks run one after another
#define __launch_bounds__(...)

inline void __syncthreads(unsigned line = __builtin_LINE()) { tforge_emulator::block_barrier(line); }
inline void __syncwarp(unsigned = 0xffffffffU, unsigned line = __builtin_LINE()) {
  tforge_emulator::warp_exchange(0, line);
}
template <class T>
T __shfl_sync(unsigned, T value, int lane, unsigned line = __builtin_LINE()) {
  return tforge_emulator::shuffle(value, lane, line);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask, unsigned line = __builtin_LINE()) {
  return tforge_emulator::shuffle(value, tforge_emulator::lane() ^ mask, line);
}
inline unsigned __ballot_sync(unsigned, int predicate, unsigned line = __builtin_LINE()) {
  const std::uint64_t* all = tforge_emulator::warp_exchange(predicate != 0 ? 1 : 0, line);
  unsigned ballot = 0;
  for (int i = 0; i < 32; ++i) ballot |= static_cast<unsigned>(all[i] & 1) << i;
  return ballot;
}
/// The lanes that hand the same bits.
template <class T>
unsigned __match_any_sync(unsigned, T value, unsigned line = __builtin_LINE()) {
  const std::uint64_t mine = tforge_emulator::to_bits(value);
  const std::uint64_t* all = tforge_emulator::warp_exchange(mine, line);
  unsigned lanes = 0;
  for (int i = 0; i < 32; ++i) lanes |= (all[i] == mine ? 1U : 0U) << i;
  return lanes;
}
inline int __popc(unsigned x) { return std::popcount(x); }

template <class T>
T atomicAdd(T* to, T value) {  // one thread runs at a time
  const T before = *to;
  *to = before + value;
  return before;
}

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
using std::max;
using std::min;

// NOLINTEND
