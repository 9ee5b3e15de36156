#include "kernels/cuda/pattention_scores.h"

#include <limits>
#include <type_traits>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mma.cuh"

namespace tforge::kernels::cuda {

namespace {

constexpr int kTile = 128;     // rows of x, and tokens, of a block
constexpr int kDepth = 32;     // columns of a stage
constexpr int kStages = 3;     // of which one is computed with and the others are on their way
constexpr int kThreads = 256;  // 2 x 4 warps, each of 64 rows and 32 tokens
constexpr int kWarpsAcross = 4, kWarpRows = 64, kWarpTokens = 32;
constexpr int kChunk = kWhole<bf16>;  // elements of 16 bytes
constexpr int kPitch = tile_pitch(kDepth), kScoresPitch = tile_pitch(kTile);
constexpr int kOperand = kTile * kPitch, kStage = 2 * kOperand;  // rows of x, then tokens
constexpr std::size_t kSharedBytes = sizeof(bf16) * kStages * kStage;
static_assert(sizeof(bf16) * kTile * kScoresPitch + sizeof(float) * kWarpsAcross * kTile <= kSharedBytes);

template <PattentionNorm kNorm>
struct Statistic {
  static constexpr bool kLargest = kNorm == PattentionNorm::softmax;
  using Fold = std::conditional_t<kLargest, Largest, Sum>;
  __device__ static float of_none() { return kLargest ? -std::numeric_limits<float>::infinity() : 0.F; }
  __device__ static float with(float value, float score) {
    return kLargest ? Largest()(value, score) : value + score * score;
  }
};

/// 16 bytes of a row into a stage, those at and behind column `columns` as zeros. kWholeChunks: rows are of such runs.
template <bool kWholeChunks>
__device__ void bring(const bf16* row, std::int64_t column, std::int64_t columns, bf16* to) {
  if constexpr (kWholeChunks) {
    start_copy(to, column < columns ? row + column : row, column < columns ? Copied::data : Copied::zeros);
  } else {
    Pack<bf16, kChunk> pack;
    for (int k = 0; k < kChunk; ++k) pack.element[k] = column + k < columns ? row[column + k] : bf16{};
    *reinterpret_cast<Pack<bf16, kChunk>*>(to) = pack;
  }
}

template <bool kWholeChunks, PattentionNorm kNorm>
__global__ void __launch_bounds__(kThreads, 2)
    scores_of_tile(Rows<const bf16> x, Rows<const bf16> keys, Rows<bf16> scores, float* partials) {
  using Stat = Statistic<kNorm>;
  bf16* shared = dynamic_shared<bf16>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int warp_row = warp / kWarpsAcross * kWarpRows, warp_token = warp % kWarpsAcross * kWarpTokens;
  const std::int64_t first_token = static_cast<std::int64_t>(blockIdx.x) * kTile;
  const std::int64_t first_row = static_cast<std::int64_t>(blockIdx.y) * kTile;
  const std::int64_t depth = x.columns, steps = (depth + kDepth - 1) / kDepth;

  // A thread brings the same chunk of four rows, kThreads / 4 apart: two of x, two of keys.
  constexpr int kChunks = kDepth / kChunk, kRowsAtOnce = kThreads / kChunks;
  const int chunk = thread % kChunks, row = thread / kChunks;
  const auto load_step = [&](std::int64_t step) {
    bf16* stage = shared + step % kStages * kStage;
    const std::int64_t column = step * kDepth + chunk * kChunk;
    TFORGE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int r = row + i * kRowsAtOnce;
      const std::int64_t t = first_row + r, j = first_token + r;
      bring<kWholeChunks>(x.row(t < x.rows ? t : 0), column, t < x.rows ? depth : 0,
                          stage + r * kPitch + chunk * kChunk);
      bring<kWholeChunks>(keys.row(j < keys.rows ? j : 0), column, j < keys.rows ? depth : 0,
                          stage + kOperand + r * kPitch + chunk * kChunk);
    }
  };

  FragmentC sums[4][4] = {};  // of 16 rows and 8 tokens each
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) load_step(s);
    end_group();
  }
  for (std::int64_t step = 0; step < steps; ++step) {
    wait_for_groups<kStages - 2>();
    __syncthreads();  // this stage is there for all, and that of the step before is free
    if (step + kStages - 1 < steps) load_step(step + kStages - 1);
    end_group();
    const bf16* of_x = shared + step % kStages * kStage + warp_row * kPitch;
    const bf16* of_keys = shared + step % kStages * kStage + kOperand + warp_token * kPitch;
    TFORGE_UNROLL
    for (int k = 0; k < kDepth; k += 16) {
      FragmentA a[4];
      TwoB b[2];
      TFORGE_UNROLL
      for (int i = 0; i < 4; ++i) a[i] = a_of_rows(of_x + 16 * i * kPitch + k, kPitch);
      TFORGE_UNROLL
      for (int j = 0; j < 2; ++j) b[j] = b_of_columns(of_keys + 16 * j * kPitch + k, kPitch);
      TFORGE_UNROLL
      for (int i = 0; i < 4; ++i) {
        TFORGE_UNROLL
        for (int j = 0; j < 2; ++j) {
          add_product(sums[i][2 * j], a[i], b[j].left);
          add_product(sums[i][2 * j + 1], a[i], b[j].right);
        }
      }
    }
  }

  // Round, and take the statistic of what was rounded: a lane's eight numbers of a row, then four lanes, then four
  // warps.
  wait_for_groups<0>();
  __syncthreads();
  bf16* tile = shared;
  auto* of_warps = reinterpret_cast<float*>(shared + kTile * kScoresPitch);
  TFORGE_UNROLL
  for (int i = 0; i < 4; ++i) {
    TFORGE_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int r = warp_row + 16 * i + 8 * h + lane / 4;
      float value = Stat::of_none();
      TFORGE_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int c = warp_token + 8 * j + lane % 4 * 2;
        const unsigned pair = pair_of(sums[i][j].at[2 * h], sums[i][j].at[2 * h + 1]);
        if (first_token + c < scores.columns) value = Stat::with(value, __uint_as_float(pair << 16));
        if (first_token + c + 1 < scores.columns) value = Stat::with(value, __uint_as_float(pair & 0xffff0000U));
        *reinterpret_cast<unsigned*>(tile + r * kScoresPitch + c) = pair;
      }
      for (int distance = 1; distance < 4; distance *= 2) {
        value = typename Stat::Fold()(value, __shfl_xor_sync(kAllLanes, value, distance));
      }
      if (lane % 4 == 0) of_warps[warp % kWarpsAcross * kTile + r] = value;
    }
  }
  __syncthreads();
  if (thread < kTile && first_row + thread < scores.rows) {
    float value = of_warps[thread];
    for (int w = 1; w < kWarpsAcross; ++w) value = typename Stat::Fold()(value, of_warps[w * kTile + thread]);
    partials[blockIdx.x * scores.rows + first_row + thread] = value;
  }

  constexpr int kAcross = kTile / kChunk;
  const int c = thread % kAcross;
  const std::int64_t left = scores.columns - first_token - c * kChunk;
  for (int r = thread / kAcross; r < kTile && first_row + r < scores.rows; r += kThreads / kAcross) {
    const auto pack = *reinterpret_cast<const Pack<bf16, kChunk>*>(tile + r * kScoresPitch + c * kChunk);
    bf16* to = scores.row(first_row + r) + first_token + c * kChunk;
    if (left >= kChunk && reinterpret_cast<std::uintptr_t>(to) % sizeof(pack) == 0) {
      store_whole(to, pack);
    } else {
      for (int k = 0; k < kChunk && k < left; ++k) to[k] = pack.element[k];
    }
  }
}

/// One thread a row.
template <PattentionNorm kNorm>
__global__ void __launch_bounds__(kThreads) join(std::int64_t tiles, const float* partials, Rows<float> stat) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= stat.rows) return;
  float value = Statistic<kNorm>::of_none();
  for (std::int64_t i = 0; i < tiles; ++i) {
    value = typename Statistic<kNorm>::Fold()(value, partials[i * stat.rows + row]);
  }
  *stat.row(row) = value;
}

std::int64_t tiles_of(std::int64_t count) { return (count + kTile - 1) / kTile; }

template <PattentionNorm kNorm>
void run(const Stream& stream, const Rows<const bf16>& x, const Rows<const bf16>& keys, const Rows<bf16>& scores,
         const Rows<float>& stat, float* partials) {
  const std::int64_t tiles = tiles_of(keys.rows);
  if (tiles > 0) {
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(tiles_of(x.rows)));
    launch(stream, grid, kThreads, kSharedBytes,
           packs<kChunk>(x) && packs<kChunk>(keys) ? scores_of_tile<true, kNorm> : scores_of_tile<false, kNorm>, x,
           keys, scores, partials);
  }
  launch(stream, blocks_for(x.rows, kThreads), kThreads, 0, join<kNorm>, tiles, partials, stat);
}

}  // namespace

void pattention_scores_fused(const Stream& stream, PattentionNorm norm, Rows<const bf16> x, Rows<const bf16> keys,
                             Rows<bf16> scores, Rows<float> stat, float* partials) {
  if (x.rows == 0) return;
  if (norm == PattentionNorm::softmax) run<PattentionNorm::softmax>(stream, x, keys, scores, stat, partials);
  else run<PattentionNorm::l2_norm_gelu>(stream, x, keys, scores, stat, partials);
}

}  // namespace tforge::kernels::cuda
