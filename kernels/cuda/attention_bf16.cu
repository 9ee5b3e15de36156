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

/// Where the lane's part of a 16-row sum lies: at[2 h + e] of column group n is row(h), column(n, e).
struct Place {
  int warp_row, g, t;
  __device__ Place()
      : warp_row(static_cast<int>(threadIdx.x) / kWarp * kWarpRows),
        g(static_cast<int>(threadIdx.x) % kWarp / 4),
        t(static_cast<int>(threadIdx.x) % 4) {}
  __device__ int row(int h) const { return warp_row + g + 8 * h; }  // of the block's tile
  __device__ int column(int n, int e) const { return 8 * n + 2 * t + e; }
};

/// Rows [first, first + kRows) of a head, zeros from row `rows` and column head_dim on, into shared memory. By packs
/// they are there behind a wait, else behind a barrier.
template <int kWidth, int kRows>
__device__ void fetch_tile(Access access, const Head<const bf16>& head, std::int64_t first, std::int64_t rows,
                           int head_dim, bf16* tile) {
  constexpr int kAcross = kWidth / kPack;
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kAcross; i += kThreads) {
    const int r = i / kAcross, c = i % kAcross * kPack;
    bf16* const to = tile + r * tile_pitch(kWidth) + c;
    const bool inside = first + r < rows && c < head_dim;
    const bf16* const from = inside ? head.data + (first + r) * head.stride + c : head.data;
    if (access == Access::packs) {
      start_copy(to, from, inside ? Copied::data : Copied::zeros);
    } else {
      Pack<bf16, kPack> pack{};
      TFORGE_UNROLL
      for (int k = 0; k < kPack; ++k) {
        if (inside && c + k < head_dim) pack.element[k] = from[k];
      }
      *reinterpret_cast<Pack<bf16, kPack>*>(to) = pack;
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

/// Over the four lanes of a row.
template <class Fold>
__device__ float over_row_lanes(float value) {
  value = Fold()(value, __shfl_xor_sync(kAllLanes, value, 2));
  return Fold()(value, __shfl_xor_sync(kAllLanes, value, 1));
}

/// The warp's 16 rows of a result, row(h) times factor[h], to rows of a head from `first` on, up to row `rows`. On the
/// way they lie in `tile`, in rows that no other warp reads or writes.
template <int kWidth>
__device__ void store_rows(Access access, const FragmentC (&sum)[kWidth / 8], const float (&factor)[2],
                           const Head<bf16>& head, std::int64_t first, std::int64_t rows, int head_dim, bf16* tile) {
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
    if (access == Access::packs) {
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
__device__ void walk(std::int64_t first, std::int64_t end, const Fetch& fetch, const Use& use) {
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

template <int kWidth>
__global__ void __launch_bounds__(kThreads)
    forward(Heads shape, float scale, Access access, Rows<const bf16> q, Rows<const bf16> k, Rows<const bf16> v,
            Rows<bf16> out, float* lse) {
  constexpr int kPitch = tile_pitch(kWidth), kColumns = kStep<kWidth> / 8;
  bf16* const queries = dynamic_shared<bf16>();
  const Stages<kWidth> stages{queries + kTile * kPitch};
  const Work work(shape, static_cast<std::int64_t>(gridDim.x - 1 - blockIdx.x) * kTile);  // the longest walks first
  const Place place;
  const int head_dim = static_cast<int>(shape.head_dim);
  const std::int64_t column = work.head * head_dim, earlier = shape.kv_seq - shape.q_seq;
  const auto key_head = head_of(k, work.sequence * shape.kv_stride, column);
  const auto value_head = head_of(v, work.sequence * shape.kv_stride, column);
  fetch_tile<kWidth, kTile>(access, head_of(q, work.sequence * shape.q_seq, column), work.first, shape.q_seq, head_dim,
                            queries);

  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  const float scale2 = scale * kLog2E;  // 2^(scale2 s) = e^(scale s)
  FragmentC sum[kWidth / 8] = {};
  float most[2] = {kLowest, kLowest}, total[2] = {0, 0};  // total: of the lane's columns
  const auto fetch = [&](std::int64_t first, int stage) {
    fetch_tile<kWidth, kStep<kWidth>>(access, key_head, first, shape.kv_seq, head_dim, stages.first(stage));
    fetch_tile<kWidth, kStep<kWidth>>(access, value_head, first, shape.kv_seq, head_dim, stages.second(stage));
  };
  const std::int64_t end = min(shape.kv_seq, earlier + work.first + kTile);  // keys that some row sees
  walk<kWidth>(0, end, fetch, [&](std::int64_t first, int stage) {
    FragmentC s[kColumns];
    multiply_transposed<kWidth, kStep<kWidth>>(queries + place.warp_row * kPitch, stages.first(stage), s);
    const bool all_seen = first + kStep<kWidth> - 1 <= earlier + work.first;
    TFORGE_UNROLL
    for (int h = 0; h < 2; ++h) {
      const std::int64_t last = earlier + work.first + place.row(h);  // the last key that the row sees
      float here = kLowest;
      TFORGE_UNROLL
      for (int n = 0; n < kColumns; ++n) {
        TFORGE_UNROLL
        for (int e = 0; e < 2; ++e) {
          float& score = s[n].at[2 * h + e];
          if (!all_seen && first + place.column(n, e) > last) score = kLowest;
          here = Largest()(here, score);
        }
      }
      const float now = Largest()(most[h], over_row_lanes<Largest>(here));
      const float shrink = exp2f((most[h] - now) * scale2);  // 0 at the first step
      const float now2 = now * scale2;
      float added = 0;
      TFORGE_UNROLL
      for (int n = 0; n < kColumns; ++n) {
        TFORGE_UNROLL
        for (int e = 0; e < 2; ++e) {
          float& p = s[n].at[2 * h + e];
          p = exp2f(p * scale2 - now2);
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
    total[h] = over_row_lanes<Sum>(total[h]);
    factor[h] = 1 / total[h];
    const std::int64_t r = work.first + place.row(h);
    if (lse != nullptr && place.t == 0 && r < shape.q_seq) {
      lse[(work.sequence * shape.q_seq + r) * shape.heads + work.head] = most[h] * scale + logf(total[h]);
    }
  }
  store_rows<kWidth>(access, sum, factor, head_of(out, work.sequence * shape.q_seq, column), work.first, shape.q_seq,
                     head_dim, queries);
}

/// What backward knows of a query: its lse in powers of two, and dot. Infinite behind the last query: then P = 0.
struct Numbers {
  float lse, dot;
};
__device__ Numbers numbers_of(const Heads& shape, const Work& work, std::int64_t query, const float* lse,
                              const float* dots) {
  if (query >= shape.q_seq) return {std::numeric_limits<float>::infinity(), 0};
  const std::int64_t at = (work.sequence * shape.q_seq + query) * shape.heads + work.head;
  return {lse[at] * kLog2E, dots[at]};
}

/// From a score and dP to P and dS / scale.
__device__ void to_gradients(float& score, float& dp, bool seen, float scale2, const Numbers& numbers) {
  score = seen ? exp2f(score * scale2 - numbers.lse) : 0;
  dp = seen ? score * (dp - numbers.dot) : 0;
}

template <int kWidth>
__global__ void __launch_bounds__(kThreads)
    key_gradients(Heads shape, float scale, Access access, Rows<const bf16> q, Rows<const bf16> k, Rows<const bf16> v,
                  Rows<const bf16> dout, const float* lse, const float* dots, Rows<bf16> dk, Rows<bf16> dv) {
  constexpr int kPitch = tile_pitch(kWidth), kColumns = kStep<kWidth> / 8;
  bf16* const keys = dynamic_shared<bf16>();
  bf16* const values = keys + kTile * kPitch;
  const Stages<kWidth> stages{values + kTile * kPitch};
  auto* const numbers = static_cast<Numbers*>(stages.end());  // kStep a stage
  const Work work(shape, static_cast<std::int64_t>(blockIdx.x) * kTile);
  const Place place;
  const int head_dim = static_cast<int>(shape.head_dim);
  const std::int64_t column = work.head * head_dim, earlier = shape.kv_seq - shape.q_seq;
  const std::int64_t key_row = work.sequence * shape.kv_stride, query_row = work.sequence * shape.q_seq;
  const auto query_head = head_of(q, query_row, column), gradient_head = head_of(dout, query_row, column);
  fetch_tile<kWidth, kTile>(access, head_of(k, key_row, column), work.first, shape.kv_seq, head_dim, keys);
  fetch_tile<kWidth, kTile>(access, head_of(v, key_row, column), work.first, shape.kv_seq, head_dim, values);

  const float scale2 = scale * kLog2E;
  FragmentC key_sum[kWidth / 8] = {}, value_sum[kWidth / 8] = {};
  const auto fetch = [&](std::int64_t first, int stage) {
    fetch_tile<kWidth, kStep<kWidth>>(access, query_head, first, shape.q_seq, head_dim, stages.first(stage));
    fetch_tile<kWidth, kStep<kWidth>>(access, gradient_head, first, shape.q_seq, head_dim, stages.second(stage));
    const int i = static_cast<int>(threadIdx.x);
    if (i < kStep<kWidth>) numbers[stage * kStep<kWidth> + i] = numbers_of(shape, work, first + i, lse, dots);
  };
  // From the first step of queries that see a key of the tile.
  const std::int64_t begin = work.first > earlier ? (work.first - earlier) / kStep<kWidth> * kStep<kWidth> : 0;
  walk<kWidth>(begin, shape.q_seq, fetch, [&](std::int64_t first, int stage) {
    FragmentC p[kColumns], ds[kColumns];  // keys down, queries across
    multiply_transposed<kWidth, kStep<kWidth>>(keys + place.warp_row * kPitch, stages.first(stage), p);
    multiply_transposed<kWidth, kStep<kWidth>>(values + place.warp_row * kPitch, stages.second(stage), ds);
    const bool all_see = earlier + first >= work.first + kTile - 1;
    TFORGE_UNROLL
    for (int n = 0; n < kColumns; ++n) {
      TFORGE_UNROLL
      for (int e = 0; e < 2; ++e) {
        const Numbers of_query = numbers[stage * kStep<kWidth> + place.column(n, e)];
        TFORGE_UNROLL
        for (int h = 0; h < 2; ++h) {
          const bool seen = all_see || work.first + place.row(h) <= earlier + first + place.column(n, e);
          to_gradients(p[n].at[2 * h + e], ds[n].at[2 * h + e], seen, scale2, of_query);
        }
      }
    }
    add_rounded_product<kWidth, kStep<kWidth>>(p, stages.second(stage), value_sum);
    add_rounded_product<kWidth, kStep<kWidth>>(ds, stages.first(stage), key_sum);
  });
  store_rows<kWidth>(access, key_sum, {scale, scale}, head_of(dk, key_row, column), work.first, shape.kv_seq, head_dim,
                     keys);
  store_rows<kWidth>(access, value_sum, {1, 1}, head_of(dv, key_row, column), work.first, shape.kv_seq, head_dim,
                     values);
}

template <int kWidth>
__global__ void __launch_bounds__(kThreads)
    query_gradients(Heads shape, float scale, Access access, Rows<const bf16> q, Rows<const bf16> k, Rows<const bf16> v,
                    Rows<const bf16> dout, const float* lse, const float* dots, Rows<bf16> dq) {
  constexpr int kPitch = tile_pitch(kWidth), kColumns = kStep<kWidth> / 8;
  bf16* const queries = dynamic_shared<bf16>();
  bf16* const gradients = queries + kTile * kPitch;
  const Stages<kWidth> stages{gradients + kTile * kPitch};
  const Work work(shape, static_cast<std::int64_t>(gridDim.x - 1 - blockIdx.x) * kTile);
  const Place place;
  const int head_dim = static_cast<int>(shape.head_dim);
  const std::int64_t column = work.head * head_dim, earlier = shape.kv_seq - shape.q_seq;
  const std::int64_t key_row = work.sequence * shape.kv_stride, query_row = work.sequence * shape.q_seq;
  const auto key_head = head_of(k, key_row, column), value_head = head_of(v, key_row, column);
  fetch_tile<kWidth, kTile>(access, head_of(q, query_row, column), work.first, shape.q_seq, head_dim, queries);
  fetch_tile<kWidth, kTile>(access, head_of(dout, query_row, column), work.first, shape.q_seq, head_dim, gradients);

  const float scale2 = scale * kLog2E;
  FragmentC sum[kWidth / 8] = {};
  Numbers numbers[2];
  for (int h = 0; h < 2; ++h) numbers[h] = numbers_of(shape, work, work.first + place.row(h), lse, dots);
  const auto fetch = [&](std::int64_t first, int stage) {
    fetch_tile<kWidth, kStep<kWidth>>(access, key_head, first, shape.kv_seq, head_dim, stages.first(stage));
    fetch_tile<kWidth, kStep<kWidth>>(access, value_head, first, shape.kv_seq, head_dim, stages.second(stage));
  };
  const std::int64_t end = min(shape.kv_seq, earlier + work.first + kTile);  // keys that some row sees
  walk<kWidth>(0, end, fetch, [&](std::int64_t first, int stage) {
    FragmentC p[kColumns], ds[kColumns];
    multiply_transposed<kWidth, kStep<kWidth>>(queries + place.warp_row * kPitch, stages.first(stage), p);
    multiply_transposed<kWidth, kStep<kWidth>>(gradients + place.warp_row * kPitch, stages.second(stage), ds);
    const bool all_seen = first + kStep<kWidth> - 1 <= earlier + work.first;
    TFORGE_UNROLL
    for (int n = 0; n < kColumns; ++n) {
      TFORGE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const bool seen = all_seen || first + place.column(n, i % 2) <= earlier + work.first + place.row(i / 2);
        to_gradients(p[n].at[i], ds[n].at[i], seen, scale2, numbers[i / 2]);
      }
    }
    add_rounded_product<kWidth, kStep<kWidth>>(ds, stages.first(stage), sum);
  });
  store_rows<kWidth>(access, sum, {scale, scale}, head_of(dq, query_row, column), work.first, shape.q_seq, head_dim,
                     queries);
}

/// Bytes of `tiles` tiles of a block's own rows and two stages of the other side's.
template <int kWidth>
constexpr std::size_t shared_bytes(int tiles) {
  return static_cast<std::size_t>((tiles * kTile + 4 * kStep<kWidth>)*tile_pitch(kWidth)) * sizeof(bf16);
}

/// Calls f(constant<width>) for the narrowest tile that holds a head.
template <class F>
void with_width(std::int64_t head_dim, const F& f) {
  if (head_dim <= 32) f(std::integral_constant<int, 32>());
  else if (head_dim <= 64) f(std::integral_constant<int, 64>());
  else if (head_dim <= 80) f(std::integral_constant<int, 80>());
  else if (head_dim <= 96) f(std::integral_constant<int, 96>());
  else f(std::integral_constant<int, kMostHeadDim>());
}

template <class... Matrix>
Access access_of(const Heads& shape, const Matrix&... m) {
  return shape.head_dim % kPack == 0 && (packs<kPack>(m) && ...) ? Access::packs : Access::elements;
}

}  // namespace

template <>
void causal_attention_forward<bf16>(const Stream& stream, const Heads& shape, Rows<const bf16> q, Rows<const bf16> k,
                                    Rows<const bf16> v, Rows<bf16> out, float* lse) {
  if (shape.batch == 0) return;
  const Access access = access_of(shape, q, k, v, out);
  with_width(shape.head_dim, [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    launch(stream, grid_of(shape, shape.q_seq, kTile), kThreads, shared_bytes<kWidth>(1), forward<kWidth>, shape,
           score_scale<float>(shape), access, q, k, v, out, lse);
  });
}

template <>
void causal_attention_backward<bf16>(const Stream& stream, const Heads& shape, Rows<const bf16> q, Rows<const bf16> k,
                                     Rows<const bf16> v, Rows<const bf16> out, const float* lse, Rows<const bf16> dout,
                                     Rows<bf16> dq, Rows<bf16> dk, Rows<bf16> dv, float* dots) {
  if (shape.batch == 0) return;
  const auto scale = score_scale<float>(shape);
  const Access access = access_of(shape, q, k, v, dout, dq, dk, dv);
  queue_row_dots(stream, shape, out, dout, dots);
  with_width(shape.head_dim, [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    launch(stream, grid_of(shape, shape.kv_seq, kTile), kThreads,
           shared_bytes<kWidth>(2) + 2 * kStep<kWidth> * sizeof(Numbers), key_gradients<kWidth>, shape, scale, access,
           q, k, v, dout, lse, dots, dk, dv);
    launch(stream, grid_of(shape, shape.q_seq, kTile), kThreads, shared_bytes<kWidth>(2), query_gradients<kWidth>,
           shape, scale, access, q, k, v, dout, lse, dots, dq);
  });
}

}  // namespace tforge::kernels::cuda
