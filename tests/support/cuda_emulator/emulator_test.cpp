// That the emulator computes as a device does, and finds what it says it finds.
#include "emulator.h"

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "memory.h"

namespace {

template <class... Parameters, class... Arguments>
void launch(dim3 grid, dim3 block, void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchConfig_t config;
  config.gridDim = grid;
  config.blockDim = block;
  cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

__global__ void add_up(const int* x, int* sums) {
  __shared__ int of_warp[2];
  int value = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffU, value, distance);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) sums[blockIdx.x] = of_warp[0] + of_warp[1];
}

TEST(CudaEmulator, RunsBarriersAndExchanges) {
  Memory<int> x(3 * 64), sums(3);
  std::vector<int> numbers(3 * 64), want(3);
  for (std::size_t i = 0; i < numbers.size(); ++i) want[i / 64] += numbers[i] = static_cast<int>(i * i);
  x.set(numbers);
  launch(dim3(3), dim3(64), add_up, x.data, sums.data);
  EXPECT_EQ(sums.get(), want);
}

__global__ void indices(unsigned* out) {
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned lane_before = __shfl_sync(0xffffffffU, threadIdx.x, 0);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = 1000 * block + thread + (lane_before == 0 ? 0 : 1000000);
}

TEST(CudaEmulator, NumbersBlocksAndThreads) {
  const dim3 grid(2, 3, 2), block(4, 2, 4);
  Memory<unsigned> out(12 * 32);
  launch(grid, block, indices, out.data);
  const std::vector<unsigned> got = out.get();
  for (unsigned b = 0; b < 12; ++b) {
    for (unsigned t = 0; t < 32; ++t) EXPECT_EQ(got[b * 32 + t], 1000 * b + t);
  }
}

__global__ void ballot(unsigned* out) { out[threadIdx.x] = __ballot_sync(0xffffffffU, threadIdx.x % 3 == 0); }

TEST(CudaEmulator, Ballots) {
  Memory<unsigned> out(32);
  launch(dim3(1), dim3(32), ballot, out.data);
  EXPECT_EQ(out.get(), std::vector<unsigned>(32, 0x49249249U));
}

__global__ void match(unsigned* lanes, int* count) {
  lanes[threadIdx.x] = __match_any_sync(0xffffffffU, threadIdx.x == 7 ? -1 : static_cast<int>(threadIdx.x % 3));
  count[threadIdx.x] = __popc(lanes[threadIdx.x]);
}

TEST(CudaEmulator, FindsLanesOfOneValue) {
  Memory<unsigned> lanes(32);
  Memory<int> count(32);
  launch(dim3(1), dim3(32), match, lanes.data, count.data);
  for (unsigned i = 0; i < 32; ++i) {
    EXPECT_EQ(lanes.get()[i], i == 7 ? 1U << 7 : (i % 3 == 1 ? 0x92492412U : 0x49249249U << i % 3));
    EXPECT_EQ(count.get()[i], i == 7 ? 1 : (i % 3 == 0 ? 11 : 10));
  }
}

__global__ void some_leave() {
  if (threadIdx.x == 40) return;
  __syncthreads();
}
__global__ void two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void lane_leaves(int* out) {
  if (threadIdx.x == 5) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffU, 1, 1);
}

TEST(CudaEmulator, StopsWhereThreadsOfABlockPart) {
  EXPECT_DEATH(launch(dim3(1), dim3(64), some_leave), "a thread ended while others wait in __syncthreads");
  EXPECT_DEATH(launch(dim3(1), dim3(64), two_barriers), "threads wait at different __syncthreads");
  Memory<int> out(32);
  EXPECT_DEATH(launch(dim3(1), dim3(32), lane_leaves, out.data), "a lane is missing");
}

__global__ void missing_barrier(int* out) {
  __shared__ int of_warp[2];
  const unsigned warp = threadIdx.x / 32;
  of_warp[warp] = 0;
  __syncthreads();
  of_warp[warp] = __shfl_xor_sync(0xffffffffU, 1, 1);
  __syncwarp();
  out[threadIdx.x] = of_warp[1 - warp];
}

TEST(CudaEmulator, AWarpGoesOnAlone) {
  Memory<int> out(64);
  launch(dim3(1), dim3(64), missing_barrier, out.data);
  EXPECT_NE(out.get(), std::vector<int>(64, 1));
}

__global__ void write_behind(float* x, int at) { x[at] = 1; }

TEST(CudaEmulator, FindsWritesBesideAnAllocation) {
  for (const int at : {-1, 10}) {
    EXPECT_DEATH(
        {
          Memory<float> x(10);
          launch(dim3(1), dim3(1), write_behind, x.data, at);
          cudaStreamSynchronize(nullptr);
        },
        "a write outside an allocation|AddressSanitizer");
  }
}

TEST(CudaEmulator, MemoryIsBornNaN) {
  for (int again = 0; again < 2; ++again) {
    Memory<float> x(3);
    for (const float number : x.get()) EXPECT_TRUE(std::isnan(number));
    x.set({1, 2, 3});
  }
}

TEST(CudaEmulator, ReadsTheHostsMemoryLate) {
  Memory<float> x(1);
  float number = 1;
  cudaMemcpyAsync(x.data, &number, sizeof(number), {}, nullptr);
  number = 2;
  EXPECT_EQ(x.get()[0], 2);
}

TEST(CudaEmulator, TheHostMayNotTouchIt) {
  Memory<float> x(3);
  x.set({1, 2, 3});
  EXPECT_EQ(x.get()[1], 2);
  EXPECT_DEATH(x.data[1] = 4, "the host touched memory of the device|AddressSanitizer");
  EXPECT_DEATH(std::fprintf(stderr, "%f", static_cast<double>(x.data[1])), "the host touched|AddressSanitizer");
}

TEST(CudaEmulator, MemoryIsGivenOutAgain) {
  std::vector<float*> places;
  for (int again = 0; again < 2; ++again) {
    Memory<float> a(100), b(3000), c(7);
    places.insert(places.end(), {a.data, b.data, c.data});
    EXPECT_TRUE(a.data + a.count <= b.data && b.data + b.count <= c.data);
  }
  for (int i = 0; i < 3; ++i) EXPECT_EQ(places[static_cast<std::size_t>(i)], places[static_cast<std::size_t>(i) + 3]);
  int on_the_stack = 0;
  EXPECT_EQ(cudaFree(&on_the_stack), cudaErrorInvalidValue);
}

/// A race: the last writer wins.
__global__ void who_is_last(unsigned* out) { *out = 100 * blockIdx.x + threadIdx.x; }

TEST(CudaEmulator, ShufflesBlocksAndThreads) {
  Memory<unsigned> out(1);
  launch(dim3(7), dim3(50), who_is_last, out.data);
  EXPECT_EQ(out.get()[0] == 649U, std::getenv("TFORGE_EMULATOR_ORDER") == nullptr);
}

}  // namespace
