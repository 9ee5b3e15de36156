#pragma once
// Positions listed by their keys, for sums over all positions of one key in their order, without atomics on numbers.
#include "kernels/cuda/launch.cuh"

namespace tforge::kernels::cuda {

inline constexpr int kSortThreads = 1024;

/// The sum of the values of the threads before this one, over the block.
__device__ inline std::int32_t sum_before(std::int32_t value, std::int32_t* scratch) {
  const int i = static_cast<int>(threadIdx.x);
  scratch[i] = value;
  __syncthreads();
  for (int distance = 1; distance < kSortThreads; distance *= 2) {
    const std::int32_t other = i >= distance ? scratch[i - distance] : 0;
    __syncthreads();
    scratch[i] += other;
    __syncthreads();
  }
  const std::int32_t before = scratch[i] - value;
  __syncthreads();
  return before;
}

/// Counting sort by one block of kSortThreads threads: `order` lists the positions below `count` by key_of(position),
/// those of a key in order; end[key] is one past the last of the key. Positions whose key is not in [0, keys) are left
/// out.
template <class KeyOf>
__device__ void sort_positions(const KeyOf& key_of, std::int64_t count, std::int64_t keys, std::int32_t* end,
                               std::int32_t* order) {
  __shared__ std::int32_t shared[kSortThreads];
  const int thread = static_cast<int>(threadIdx.x);
  for (std::int64_t key = thread; key < keys; key += kSortThreads) end[key] = 0;
  __syncthreads();
  for (std::int64_t t = thread; t < count; t += kSortThreads) {
    const std::int64_t key = key_of(t);
    if (key >= 0 && key < keys) atomicAdd(end + key, 1);  // whole numbers: the order does not show
  }
  __syncthreads();
  // end[key] becomes the first entry of the key; each thread has a run of keys.
  const std::int64_t run = (keys + kSortThreads - 1) / kSortThreads;
  const std::int64_t from = min(keys, thread * run), to = min(keys, from + run);
  std::int32_t total = 0;
  for (std::int64_t key = from; key < to; ++key) total += end[key];
  total = sum_before(total, shared);
  for (std::int64_t key = from; key < to; ++key) {
    const std::int32_t here = end[key];
    end[key] = total;
    total += here;
  }
  __syncthreads();
  // A block's worth of positions at a time, and of these a warp's at a time: a position comes after those before it in
  // its warp. Of the turns of the warps only the look at end[] is left, what takes time is done before and behind them.
  const int lane = thread % kWarp, warp = thread / kWarp;
  for (std::int64_t batch = 0; batch < count; batch += kSortThreads) {
    const std::int64_t t = batch + thread;
    std::int64_t key = t < count ? key_of(t) : -1;
    if (key < 0 || key >= keys) key = -1;
    const unsigned same = __match_any_sync(kAllLanes, static_cast<std::int32_t>(key));
    const int before = __popc(same & ((1U << lane) - 1));
    std::int32_t first = 0;
    for (int turn = 0; turn < kSortThreads / kWarp; ++turn) {
      if (turn == warp) {
        if (key >= 0) first = end[key];
        __syncwarp();
        if (key >= 0 && before == 0) end[key] = first + __popc(same);
      }
      __syncthreads();
    }
    if (key >= 0) order[first + before] = static_cast<std::int32_t>(t);
  }
}

}  // namespace tforge::kernels::cuda
