// Causal attention in bf16 over tensor cores, after FlashAttention-2 (Dao, arXiv 2307.08691). The walks, their order
// and what they promise are those of attention.cu; products are of bf16 with sums in f32, where P and dS = P (dP - dot)
// are rounded to bf16 as operands. dot, the row's maximum and sum, and all else are f32, and the sum is of P before it
// is rounded.
//
// A block has kTile rows of its own (of queries forward and for dQ, of keys for dK and dV), 16 a warp, and walks over
// the other side's in steps of kStep, of which the next is copied (cp.async) while one is computed with. A warp's P and
// dS are sums that it has in registers, and are the left operands of its next products as they lie there: for dK and dV
// it computes their transposes, keys down and queries across. Four warps of 16 rows and steps of 64 leave registers for
// two blocks on a multiprocessor or more; heads wider than 64 take steps of 32, for registers and shared memory alike.
// Positions within a sequence are int, which spares instructions: 2^31 of them would keep a device for days.
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mma.cuh"

namespace tforge::kernels::cuda {

namespace {

constexpr int kTile = 64, kWarpRows = 16, kThreads = kTile / kWarpRows * kWarp;
constexpr int kPack = kWhole<bf16>;
constexpr float kLog2E = 1.44269504088896341F;

template <int kWidth>
constexpr int kStep = kWidth <= 64 ? 64 : 32;

/// Whether every row of every head is whole packs of 16 bytes.
enum class Access { packs, elements };

/// Blocks that a multiprocessor shall have registers for; 0 leaves it to the compiler, which would have five of heads
/// of 80 and spill.
template <int kWidth, Access kAccess>
constexpr int kForwardBlocks = (kAccess == Access::packs && kWidth == 80) ? 4 : 0;

/// Where the lane's part of a 16-row sum lies: at[2 h + e] of column group n is row(h), column(n, e).
struct Place {
  int warp_row, g, t;
  __device__ Place()
      : warp_row(static_cast<int>(threadIdx.x) / kWarp * kWarpRows),
        g(static_cast<int>(threadIdx.x) % kWarp / 4),
        t(static_cast<int>(threadIdx.x) % 4) {}
  __device__ int row(int h) const { return warp_row + g + 8 * h; }  // of the block's tile
  __device__ int column(int n, int e) const { return 8 * n + 2 * t + e; }
  /// column(n, e) <= row(h) + x where 8 n + e, which the compiler knows, is no more than this.
  __device__ int limit(int h, int x) const { return row(h) - 2 * t + x; }
};

/// Rows [first, first + kRows) of a head, zeros from row `rows` and column head_dim on, into shared memory. By packs
/// they are there behind a wait, else behind a barrier. A thread has one pack of every kDown-th row: from one to the
/// next an addition leads.
template <int kWidth, Access kAccess, int kRows>
__device__ void fetch_tile(const Head<const bf16>& head, int first, int rows, int head_dim, bf16* tile) {
  constexpr int kPitch = tile_pitch(kWidth);
  constexpr int kAcross = std::bit_ceil(static_cast<unsigned>(kWidth / kPack)), kDown = kThreads / kAcross;
  static_assert(kRows % kDown == 0);
  const int top = static_cast<int>(threadIdx.x) / kAcross, c = static_cast<int>(threadIdx.x) % kAcross * kPack;
  if (kAcross * kPack > kWidth && c >= kWidth) return;
  const bf16* from = head.data + top * head.stride + c + first * head.stride;
  bf16* const to = tile + top * kPitch + c;
  const int inside = (c < head_dim ? rows - top : 0) - first;
  if constexpr (kAccess == Access::packs) {
    TFORGE_UNROLL
    for (int r = 0; r < kRows; r += kDown, from += kDown * head.stride) {
      start_copy(to + r * kPitch, from, r < inside ? Copied::data : Copied::zeros);
    }
  } else {
    for (int r = 0; r < kRows; r += kDown, from += kDown * head.stride) {
      Pack<bf16, kPack> pack{};
      TFORGE_UNROLL
      for (int k = 0; k < kPack; ++k) {
        if (r < inside && c + k < head_dim) pack.element[k] = from[k];
      }
      *reinterpret_cast<Pack<bf16, kPack>*>(to + r * kPitch) = pack;
    }
  }
}

/// s = a b^T of the warp's 16 rows of a and kRows rows of b.
template <int kWidth, int kRows>
__device__ void multiply_transposed(const bf16* a, const bf16* b, FragmentC (&s)[kRows / 8]) {
  constexpr int kPitch = tile_pitch(kWidth);
  TFORGE_UNROLL
  for (int n = 0; n < kRows / 8; ++n) s[n] = {};
  TFORGE_UNROLL
  for (int k = 0; k < kWidth; k += 16) {
    const FragmentA left = a_of_rows(a + k, kPitch);
    TFORGE_UNROLL
    for (int j = 0; j < kRows; j += 16) {
      const TwoB right = b_of_columns(b + j * kPitch + k, kPitch);
      add_product(s[j / 8], left, right.left);
      add_product(s[j / 8 + 1], left, right.right);
    }
  }
}

/// sum += p b: p, of 16 rows and kRows columns, is rounded to bf16; b has kRows rows.
template <int kWidth, int kRows>
__device__ void add_rounded_product(const FragmentC (&p)[kRows / 8], const bf16* b, FragmentC (&sum)[kWidth / 8]) {
  constexpr int kPitch = tile_pitch(kWidth);
  TFORGE_UNROLL
  for (int k = 0; k < kRows; k += 16) {
    const FragmentA left = a_of_sums(p[k / 8], p[k / 8 + 1]);
    TFORGE_UNROLL
    for (int c = 0; c < kWidth; c += 16) {
      const TwoB right = b_of_rows(b + k * kPitch + c, kPitch);
      add_product(sum[c / 8], left, right.left);
      add_product(sum[c / 8 + 1], left, right.right);
    }
  }
}

/// `value` in place of the numbers of keys that a row does not see. The tile's first query sees `ahead` keys behind the
/// first one of the step; where every row sees all, nothing is looked at.
template <int kColumns>
__device__ void cover(const Place& place, int ahead, float value, FragmentC (&s)[kColumns]) {
  if (ahead >= 8 * kColumns - 1) return;
  const int last[2] = {place.limit(0, ahead), place.limit(1, ahead)};
  TFORGE_UNROLL
  for (int n = 0; n < kColumns; ++n) {
    TFORGE_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (8 * n + i % 2 > last[i / 2]) s[n].at[i] = value;
    }
  }
}

/// Of a and b, and NaN only of two. (Where a score is NaN, so is the power of two of it, and with it the row's sum.)
struct LargestNumber {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

inline constexpr int kRowLanes = 4;  // that have a row

/// The warp's 16 rows of a result, row(h) times factor[h], to rows of a head from `first` on, up to row `rows`. On the
/// way they lie in `tile`, in rows that no other warp reads or writes.
template <int kWidth, Access kAccess>
__device__ void store_rows(const FragmentC (&sum)[kWidth / 8], const float (&factor)[2], const Head<bf16>& head,
                           int first, int rows, int head_dim, bf16* tile) {
  constexpr int kPitch = tile_pitch(kWidth), kAcross = kWidth / kPack;
  const Place place;
  TFORGE_UNROLL
  for (int n = 0; n < kWidth / 8; ++n) {
    TFORGE_UNROLL
    for (int h = 0; h < 2; ++h) {
      *reinterpret_cast<unsigned*>(tile + place.row(h) * kPitch + place.column(n, 0)) =
          pair_of(sum[n].at[2 * h] * factor[h], sum[n].at[2 * h + 1] * factor[h]);
    }
  }
  __syncwarp();
  for (int i = static_cast<int>(threadIdx.x) % kWarp; i < kWarpRows * kAcross; i += kWarp) {
    const int r = place.warp_row + i / kAcross, c = i % kAcross * kPack;
    if (first + r >= rows || c >= head_dim) continue;
    const auto pack = *reinterpret_cast<const Pack<bf16, kPack>*>(tile + r * kPitch + c);
    bf16* const to = head.data + (first + r) * head.stride + c;
    if constexpr (kAccess == Access::packs) {
      *reinterpret_cast<Pack<bf16, kPack>*>(to) = pack;
    } else {
      TFORGE_UNROLL
      for (int k = 0; k < kPack; ++k) {
        if (c + k < head_dim) to[k] = pack.element[k];
      }
    }
  }
}

/// Walks over rows [first, end) in steps of kStep: fetch(row, stage) of a step happens while use(row, stage) of the one
/// before computes. The stages are 0 and 1 in turn. What was fetched before the walk is there too.
template <int kWidth, class Fetch, class Use>
__device__ void walk(int first, int end, const Fetch& fetch, const Use& use) {
  int stage = 0;
  fetch(first, stage);
  end_group();
  for (; first < end; first += kStep<kWidth>, stage = 1 - stage) {
    wait_for_groups<0>();
    __syncthreads();  // all threads' copies are there, and none computes with the other stage any more
    if (first + kStep<kWidth> < end) fetch(first + kStep<kWidth>, 1 - stage);
    end_group();
    use(first, stage);
  }
}

/// Tiles of kStep rows of the two operands that a block walks over, in two stages.
template <int kWidth>
struct Stages {
  static constexpr int kElements = kStep<kWidth> * tile_pitch(kWidth);
  bf16* tiles;
  __device__ bf16* first(int stage) const { return tiles + 2 * stage * kElements; }
  __device__ bf16* second(int stage) const { return first(stage) + kElements; }
  __device__ void* end() const { return tiles + 4 * kElements; }
};

template <int kWidth, Access kAccess>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<kWidth, kAccess>)
    forward(Heads shape, float scale, Rows<const bf16> q, Rows<const bf16> k, Rows<const bf16> v, Rows<bf16> out,
            float* lse) {
  constexpr int kPitch = tile_pitch(kWidth), kColumns = kStep<kWidth> / 8;
  bf16* const queries = dynamic_shared<bf16>();
  const Stages<kWidth> stages{queries + kTile * kPitch};
  const Work work(shape, static_cast<std::int64_t>(gridDim.x - 1 - blockIdx.x) * kTile);  // the longest walks first
  const Place place;
  const int head_dim = static_cast<int>(shape.head_dim);
  const int tile = static_cast<int>(work.first), q_seq = static_cast<int>(shape.q_seq);
  const int kv_seq = static_cast<int>(shape.kv_seq), earlier = kv_seq - q_seq;
  const std::int64_t column = work.head * head_dim;
  const auto key_head = head_of(k, work.sequence * shape.kv_stride, column);
  const auto value_head = head_of(v, work.sequence * shape.kv_stride, column);
  fetch_tile<kWidth, kAccess, kTile>(head_of(q, work.sequence * shape.q_seq, column), tile, q_seq, head_dim, queries);

  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  const float scale2 = scale * kLog2E;  // 2^(scale2 s) = e^(scale s)
  FragmentC sum[kWidth / 8] = {};
  float most[2] = {kLowest, kLowest}, total[2] = {0, 0};  // total: of the lane's columns
  const auto fetch = [&](int first, int stage) {
    fetch_tile<kWidth, kAccess, kStep<kWidth>>(key_head, first, kv_seq, head_dim, stages.first(stage));
    fetch_tile<kWidth, kAccess, kStep<kWidth>>(value_head, first, kv_seq, head_dim, stages.second(stage));
  };
  const int end = min(kv_seq, earlier + tile + kTile);  // keys that some row sees
  walk<kWidth>(0, end, fetch, [&](int first, int stage) {
    FragmentC s[kColumns];
    multiply_transposed<kWidth, kStep<kWidth>>(queries + place.warp_row * kPitch, stages.first(stage), s);
    cover(place, earlier + tile - first, kLowest, s);
    TFORGE_UNROLL
    for (int h = 0; h < 2; ++h) {
      float here = kLowest;
      TFORGE_UNROLL
      for (int n = 0; n < kColumns; ++n) {
        TFORGE_UNROLL
        for (int e = 0; e < 2; ++e) here = fmaxf(here, s[n].at[2 * h + e]);
      }
      const float now = fmaxf(most[h], over_lanes<LargestNumber, kRowLanes>(here));
      const float shrink = power_of_two((most[h] - now) * scale2);  // 0 at the first step
      const float now2 = now * scale2;
      float added = 0;
      TFORGE_UNROLL
      for (int n = 0; n < kColumns; ++n) {
        TFORGE_UNROLL
        for (int e = 0; e < 2; ++e) {
          float& p = s[n].at[2 * h + e];
          p = power_of_two(p * scale2 - now2);
          added += p;
        }
      }
      total[h] = total[h] * shrink + added;
      most[h] = now;
      TFORGE_UNROLL
      for (int n = 0; n < kWidth / 8; ++n) {
        sum[n].at[2 * h] *= shrink;
        sum[n].at[2 * h + 1] *= shrink;
      }
    }
    add_rounded_product<kWidth, kStep<kWidth>>(s, stages.second(stage), sum);
  });
  float factor[2];
  for (int h = 0; h < 2; ++h) {
    total[h] = over_lanes<Sum, kRowLanes>(total[h]);
    factor[h] = 1 / total[h];
    const int r = tile + place.row(h);
    if (lse != nullptr && place.t == 0 && r < q_seq) {
      lse[(work.sequence * shape.q_seq + r) * shape.heads + work.head] = most[h] * scale + logf(total[h]);
    }
  }
  store_rows<kWidth, kAccess>(sum, factor, head_of(out, work.sequence * shape.q_seq, column), tile, q_seq, head_dim,
                              queries);
}

/// What backward knows of a query: its lse in powers of two, and dot. Infinite behind the last query: then P = 0.
struct Numbers {
  float lse, dot;
};
__device__ Numbers numbers_of(const Heads& shape, const Work& work, int query, const float* lse, const float* dots) {
  if (query >= static_cast<int>(shape.q_seq)) return {std::numeric_limits<float>::infinity(), 0};
  const std::int64_t at = (work.sequence * shape.q_seq + query) * shape.heads + work.head;
  return {lse[at] * kLog2E, dots[at]};
}

/// From a score and dP to P and dS / scale.
__device__ void to_gradients(float& score, float& dp, float scale2, const Numbers& numbers) {
  score = power_of_two(score * scale2 - numbers.lse);
  dp = score * (dp - numbers.dot);
}

template <int kWidth, Access kAccess>
__global__ void __launch_bounds__(kThreads)
    key_gradients(Heads shape, float scale, Rows<const bf16> q, Rows<const bf16> k, Rows<const bf16> v,
                  Rows<const bf16> dout, const float* lse, const float* dots, Rows<bf16> dk, Rows<bf16> dv) {
  constexpr int kPitch = tile_pitch(kWidth), kColumns = kStep<kWidth> / 8;
  bf16* const keys = dynamic_shared<bf16>();
  bf16* const values = keys + kTile * kPitch;
  const Stages<kWidth> stages{values + kTile * kPitch};
  auto* const numbers = static_cast<Numbers*>(stages.end());  // kStep a stage
  const Work work(shape, static_cast<std::int64_t>(blockIdx.x) * kTile);
  const Place place;
  const int head_dim = static_cast<int>(shape.head_dim);
  const int tile = static_cast<int>(work.first), q_seq = static_cast<int>(shape.q_seq);
  const int kv_seq = static_cast<int>(shape.kv_seq), earlier = kv_seq - q_seq;
  const std::int64_t column = work.head * head_dim;
  const std::int64_t key_row = work.sequence * shape.kv_stride, query_row = work.sequence * shape.q_seq;
  const auto query_head = head_of(q, query_row, column), gradient_head = head_of(dout, query_row, column);
  fetch_tile<kWidth, kAccess, kTile>(head_of(k, key_row, column), tile, kv_seq, head_dim, keys);
  fetch_tile<kWidth, kAccess, kTile>(head_of(v, key_row, column), tile, kv_seq, head_dim, values);

  const float scale2 = scale * kLog2E;
  FragmentC key_sum[kWidth / 8] = {}, value_sum[kWidth / 8] = {};
  const auto fetch = [&](int first, int stage) {
    fetch_tile<kWidth, kAccess, kStep<kWidth>>(query_head, first, q_seq, head_dim, stages.first(stage));
    fetch_tile<kWidth, kAccess, kStep<kWidth>>(gradient_head, first, q_seq, head_dim, stages.second(stage));
    const int i = static_cast<int>(threadIdx.x);
    if (i < kStep<kWidth>) numbers[stage * kStep<kWidth> + i] = numbers_of(shape, work, first + i, lse, dots);
  };
  // From the first step of queries that see a key of the tile.
  const int begin = tile > earlier ? (tile - earlier) / kStep<kWidth> * kStep<kWidth> : 0;
  walk<kWidth>(begin, q_seq, fetch, [&](int first, int stage) {
    FragmentC p[kColumns], ds[kColumns];  // keys down, queries across
    multiply_transposed<kWidth, kStep<kWidth>>(keys + place.warp_row * kPitch, stages.first(stage), p);
    multiply_transposed<kWidth, kStep<kWidth>>(values + place.warp_row * kPitch, stages.second(stage), ds);
    TFORGE_UNROLL
    for (int n = 0; n < kColumns; ++n) {
      TFORGE_UNROLL
      for (int e = 0; e < 2; ++e) {
        const Numbers of_query = numbers[stage * kStep<kWidth> + place.column(n, e)];
        TFORGE_UNROLL
        for (int h = 0; h < 2; ++h) to_gradients(p[n].at[2 * h + e], ds[n].at[2 * h + e], scale2, of_query);
      }
    }
    const int behind = tile - earlier - first;  // the step's first query does not see so many keys
    if (behind > 1 - kTile) {
      const int first_seen[2] = {place.limit(0, behind), place.limit(1, behind)};
      TFORGE_UNROLL
      for (int n = 0; n < kColumns; ++n) {
        TFORGE_UNROLL
        for (int i = 0; i < 4; ++i) {
          if (8 * n + i % 2 < first_seen[i / 2]) p[n].at[i] = ds[n].at[i] = 0;
        }
      }
    }
    add_rounded_product<kWidth, kStep<kWidth>>(p, stages.second(stage), value_sum);
    add_rounded_product<kWidth, kStep<kWidth>>(ds, stages.first(stage), key_sum);
  });
  store_rows<kWidth, kAccess>(key_sum, {scale, scale}, head_of(dk, key_row, column), tile, kv_seq, head_dim, keys);
  store_rows<kWidth, kAccess>(value_sum, {1, 1}, head_of(dv, key_row, column), tile, kv_seq, head_dim, values);
}

template <int kWidth, Access kAccess>
__global__ void __launch_bounds__(kThreads)
    query_gradients(Heads shape, float scale, Rows<const bf16> q, Rows<const bf16> k, Rows<const bf16> v,
                    Rows<const bf16> dout, const float* lse, const float* dots, Rows<bf16> dq) {
  constexpr int kPitch = tile_pitch(kWidth), kColumns = kStep<kWidth> / 8;
  bf16* const queries = dynamic_shared<bf16>();
  bf16* const gradients = queries + kTile * kPitch;
  const Stages<kWidth> stages{gradients + kTile * kPitch};
  const Work work(shape, static_cast<std::int64_t>(gridDim.x - 1 - blockIdx.x) * kTile);
  const Place place;
  const int head_dim = static_cast<int>(shape.head_dim);
  const int tile = static_cast<int>(work.first), q_seq = static_cast<int>(shape.q_seq);
  const int kv_seq = static_cast<int>(shape.kv_seq), earlier = kv_seq - q_seq;
  const std::int64_t column = work.head * head_dim;
  const std::int64_t key_row = work.sequence * shape.kv_stride, query_row = work.sequence * shape.q_seq;
  const auto key_head = head_of(k, key_row, column), value_head = head_of(v, key_row, column);
  fetch_tile<kWidth, kAccess, kTile>(head_of(q, query_row, column), tile, q_seq, head_dim, queries);
  fetch_tile<kWidth, kAccess, kTile>(head_of(dout, query_row, column), tile, q_seq, head_dim, gradients);

  const float scale2 = scale * kLog2E;
  FragmentC sum[kWidth / 8] = {};
  Numbers numbers[2];
  for (int h = 0; h < 2; ++h) numbers[h] = numbers_of(shape, work, tile + place.row(h), lse, dots);
  const auto fetch = [&](int first, int stage) {
    fetch_tile<kWidth, kAccess, kStep<kWidth>>(key_head, first, kv_seq, head_dim, stages.first(stage));
    fetch_tile<kWidth, kAccess, kStep<kWidth>>(value_head, first, kv_seq, head_dim, stages.second(stage));
  };
  const int end = min(kv_seq, earlier + tile + kTile);  // keys that some row sees
  walk<kWidth>(0, end, fetch, [&](int first, int stage) {
    FragmentC p[kColumns], ds[kColumns];
    multiply_transposed<kWidth, kStep<kWidth>>(queries + place.warp_row * kPitch, stages.first(stage), p);
    multiply_transposed<kWidth, kStep<kWidth>>(gradients + place.warp_row * kPitch, stages.second(stage), ds);
    TFORGE_UNROLL
    for (int n = 0; n < kColumns; ++n) {
      TFORGE_UNROLL
      for (int i = 0; i < 4; ++i) to_gradients(p[n].at[i], ds[n].at[i], scale2, numbers[i / 2]);
    }
    cover(place, earlier + tile - first, 0, ds);
    add_rounded_product<kWidth, kStep<kWidth>>(ds, stages.first(stage), sum);
  });
  store_rows<kWidth, kAccess>(sum, {scale, scale}, head_of(dq, query_row, column), tile, q_seq, head_dim, queries);
}

/// Bytes of `tiles` tiles of a block's own rows and two stages of the other side's.
template <int kWidth>
constexpr std::size_t shared_bytes(int tiles) {
  return static_cast<std::size_t>((tiles * kTile + 4 * kStep<kWidth>)*tile_pitch(kWidth)) * sizeof(bf16);
}

/// Calls f(constant<access>, constant<width>) for the narrowest tile that holds a head.
template <Access kAccess, class F>
void with_width(std::int64_t head_dim, const F& f) {
  constexpr std::integral_constant<Access, kAccess> kConstant;
  if (head_dim <= 32) f(kConstant, std::integral_constant<int, 32>());
  else if (head_dim <= 64) f(kConstant, std::integral_constant<int, 64>());
  else if (head_dim <= 80) f(kConstant, std::integral_constant<int, 80>());
  else if (head_dim <= 96) f(kConstant, std::integral_constant<int, 96>());
  else f(kConstant, std::integral_constant<int, kMostHeadDim>());
}

template <class F, class... Matrix>
void with_access(const Heads& shape, const F& f, const Matrix&... m) {
  if (shape.head_dim % kPack == 0 && (packs<kPack>(m) && ...)) with_width<Access::packs>(shape.head_dim, f);
  else with_width<Access::elements>(shape.head_dim, f);
}

}  // namespace

template <>
void causal_attention_forward<bf16>(const Stream& stream, const Heads& shape, Rows<const bf16> q, Rows<const bf16> k,
                                    Rows<const bf16> v, Rows<bf16> out, float* lse) {
  if (shape.batch == 0) return;
  const auto start = [&](auto access, auto width) {
    constexpr int kWidth = decltype(width)::value;
    launch(stream, grid_of(shape, shape.q_seq, kTile), kThreads, shared_bytes<kWidth>(1),
           forward<kWidth, decltype(access)::value>, shape, score_scale<float>(shape), q, k, v, out, lse);
  };
  with_access(shape, start, q, k, v, out);
}

template <>
void causal_attention_backward<bf16>(const Stream& stream, const Heads& shape, Rows<const bf16> q, Rows<const bf16> k,
                                     Rows<const bf16> v, Rows<const bf16> out, const float* lse, Rows<const bf16> dout,
                                     Rows<bf16> dq, Rows<bf16> dk, Rows<bf16> dv, float* dots) {
  if (shape.batch == 0) return;
  const auto scale = score_scale<float>(shape);
  queue_row_dots(stream, shape, out, dout, dots);
  const auto start = [&](auto access, auto width) {
    constexpr int kWidth = decltype(width)::value;
    constexpr Access kAccess = decltype(access)::value;
    launch(stream, grid_of(shape, shape.kv_seq, kTile), kThreads,
           shared_bytes<kWidth>(2) + 2 * kStep<kWidth> * sizeof(Numbers), key_gradients<kWidth, kAccess>, shape, scale,
           q, k, v, dout, lse, dots, dk, dv);
    launch(stream, grid_of(shape, shape.q_seq, kTile), kThreads, shared_bytes<kWidth>(2),
           query_gradients<kWidth, kAccess>, shape, scale, q, k, v, dout, lse, dots, dq);
  };
  with_access(shape, start, q, k, v, dout, dq, dk, dv);
}

}  // namespace tforge::kernels::cuda
