// Causal attention after FlashAttention-2 (Dao, arXiv 2307.08691): a block has one tile of queries of one head and
// walks over the tiles of keys that they see, with a running maximum and sum of each row; no S x S matrix. Backward has
// two walks, so that nothing is added by more than one block: tiles of keys over the queries for dK and dV, tiles of
// queries over the keys for dQ.
//
// Tiles begin at multiples of kTile from key 0, a row adds them in order, and a tile that it does not see leaves its
// bits, so a row's bits depend neither on q_seq nor on the batch.
//
// For f32 and f64, whose products tensor cores would round (f32 to tf32) or do slowly where a head is narrow; bf16 has
// its own kernels (attention_bf16.cu).
//
// A tile is kTile x kTile. Thread (y, x) of 16 x 8 has the rows 2 y and 2 y + 1 of it and the columns x, x + 8, ...;
// of the width of a head likewise. A row's eight threads are neighbours in one warp.
#include "kernels/cuda/attention.h"

#include <limits>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/launch.cuh"

namespace tforge::kernels::cuda {

namespace {

constexpr int kTile = 32;
constexpr int kAcross = 8, kDown = 16, kThreads = kAcross * kDown;
constexpr int kRows = kTile / kDown;       // of a thread
constexpr int kColumns = kTile / kAcross;  // of a thread

/// Shared tiles have one more column than they need: rows then start in different banks.
__device__ int pitch_of(int columns) { return columns + 1; }

/// Rows [first, first + kTile) of a head, zeros from row `rows` on, into shared memory.
template <class T>
__device__ void load_tile(const Head<const T>& head, std::int64_t first, std::int64_t rows, int head_dim,
                          Compute<T>* tile) {
  const int pitch = pitch_of(head_dim);
  for (int i = static_cast<int>(threadIdx.x); i < kTile * head_dim; i += kThreads) {
    const int r = i / head_dim, c = i % head_dim;
    tile[r * pitch + c] = first + r < rows ? computed(head.data[(first + r) * head.stride + c]) : Compute<T>(0);
  }
}

/// What a thread has of a kTile x kTile product.
template <class T>
struct Square {
  T at[kRows][kColumns];
};
/// What a thread has of a kTile x head_dim product, of at most kWide * kAcross columns.
template <class T, int kWide>
struct Strip {
  T at[kRows][kWide];
};

struct Place {
  int y, x;
  __device__ Place() : y(static_cast<int>(threadIdx.x) / kAcross), x(static_cast<int>(threadIdx.x) % kAcross) {}
  __device__ int row(int i) const { return y * kRows + i; }
  __device__ int column(int j) const { return x + j * kAcross; }
};

/// a b^T of two tiles of rows.
template <class T>
__device__ Square<T> times_transposed(const T* a, const T* b, int head_dim) {
  const Place place;
  const int pitch = pitch_of(head_dim);
  Square<T> s{};
  for (int c = 0; c < head_dim; ++c) {
    T left[kRows], right[kColumns];
    for (int i = 0; i < kRows; ++i) left[i] = a[place.row(i) * pitch + c];
    for (int j = 0; j < kColumns; ++j) right[j] = b[place.column(j) * pitch + c];
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) s.at[i][j] += left[i] * right[j];
    }
  }
  return s;
}

/// sum += p b, where element (i, k) of p is p[i * row + k * column] in shared memory and b a tile of rows.
template <int kWide, class T>
__device__ void add_product(const T* p, int row, int column, const T* b, int head_dim, Strip<T, kWide>& sum) {
  const Place place;
  const int pitch = pitch_of(head_dim);
  for (int k = 0; k < kTile; ++k) {
    T left[kRows];
    for (int i = 0; i < kRows; ++i) left[i] = p[place.row(i) * row + k * column];
    for (int w = 0; w < kWide; ++w) {
      const int c = place.column(w);
      const T right = c < head_dim ? b[k * pitch + c] : T(0);
      for (int i = 0; i < kRows; ++i) sum.at[i][w] += left[i] * right;
    }
  }
}

/// A thread's part of a tile into shared memory.
template <class T>
__device__ void share(const Square<T>& s, T* tile) {
  const Place place;
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) tile[place.row(i) * pitch_of(kTile) + place.column(j)] = s.at[i][j];
  }
}

/// Rows [first, first + kTile) of a head, up to row `rows`.
template <int kWide, class T>
__device__ void store_strip(const Strip<Compute<T>, kWide>& strip, const Head<T>& head, std::int64_t first,
                            std::int64_t rows, int head_dim) {
  const Place place;
  for (int i = 0; i < kRows; ++i) {
    const std::int64_t r = first + place.row(i);
    if (r >= rows) continue;
    for (int w = 0; w < kWide; ++w) {
      const int c = place.column(w);
      if (c < head_dim) head.data[r * head.stride + c] = stored<T>(strip.at[i][w]);
    }
  }
}

template <int kWide, class T>
__global__ void __launch_bounds__(kThreads) forward(Heads shape, Compute<T> scale, Rows<const T> q, Rows<const T> k,
                                                    Rows<const T> v, Rows<T> out, Compute<T>* lse) {
  using C = Compute<T>;
  const int head_dim = static_cast<int>(shape.head_dim), pitch = pitch_of(head_dim);
  C* const queries = dynamic_shared<C>();
  C* const keys = queries + kTile * pitch;
  C* const values = keys + kTile * pitch;
  C* const p = values + kTile * pitch;
  const Work work(shape, (gridDim.x - 1 - blockIdx.x) * kTile);  // the longest walks first
  const Place place;
  const std::int64_t column = work.head * head_dim, earlier = shape.kv_seq - shape.q_seq;
  const auto key_head = head_of(k, work.sequence * shape.kv_stride, column);
  const auto value_head = head_of(v, work.sequence * shape.kv_stride, column);
  load_tile(head_of(q, work.sequence * shape.q_seq, column), work.first, shape.q_seq, head_dim, queries);

  Strip<C, kWide> sum{};
  C most[kRows], total[kRows];
  for (int i = 0; i < kRows; ++i) {
    most[i] = -std::numeric_limits<C>::infinity();
    total[i] = 0;
  }
  const std::int64_t end = min(shape.kv_seq, earlier + work.first + kTile);  // keys that some row sees
  for (std::int64_t first = 0; first < end; first += kTile) {
    __syncthreads();
    load_tile(key_head, first, shape.kv_seq, head_dim, keys);
    load_tile(value_head, first, shape.kv_seq, head_dim, values);
    __syncthreads();
    Square<C> s = times_transposed(queries, keys, head_dim);
    for (int i = 0; i < kRows; ++i) {
      const std::int64_t last = earlier + work.first + place.row(i);  // the last key that the row sees
      C here = -std::numeric_limits<C>::infinity();
      for (int j = 0; j < kColumns; ++j) {
        C& score = s.at[i][j];
        score = first + place.column(j) <= last ? score * scale : -std::numeric_limits<C>::infinity();
        here = Largest()(here, score);
      }
      const C now = Largest()(most[i], over_lanes<Largest, kAcross>(here));
      const C shrink = exp(most[i] - now);  // 0 at the first tile
      C added = 0;
      for (int j = 0; j < kColumns; ++j) {
        s.at[i][j] = exp(s.at[i][j] - now);
        added += s.at[i][j];
      }
      total[i] = total[i] * shrink + over_lanes<Sum, kAcross>(added);
      most[i] = now;
      for (int w = 0; w < kWide; ++w) sum.at[i][w] *= shrink;
    }
    share(s, p);
    __syncwarp();  // a row of p is written and read by one warp
    add_product<kWide>(p, pitch_of(kTile), 1, values, head_dim, sum);
  }
  for (int i = 0; i < kRows; ++i) {
    const C factor = C(1) / total[i];
    for (int w = 0; w < kWide; ++w) sum.at[i][w] *= factor;
    const std::int64_t r = work.first + place.row(i);
    if (lse != nullptr && place.x == 0 && r < shape.q_seq) {
      lse[(work.sequence * shape.q_seq + r) * shape.heads + work.head] = most[i] + log(total[i]);
    }
  }
  store_strip<kWide>(sum, head_of(out, work.sequence * shape.q_seq, column), work.first, shape.q_seq, head_dim);
}

/// P and dS = P (dP - dot) scale of a tile of queries against a tile of keys, 0 where a query does not see the key.
template <class T>
struct Gradients {
  Square<T> p, ds;
};
template <class T>
__device__ Gradients<T> score_gradients(const T* queries, const T* keys, const T* values, const T* gradients,
                                        std::int64_t first_query, std::int64_t first_key, const Heads& shape, T scale,
                                        const T* lse, const T* dots) {
  const Place place;
  const int head_dim = static_cast<int>(shape.head_dim);
  Gradients<T> g{times_transposed(queries, keys, head_dim), times_transposed(gradients, values, head_dim)};
  for (int i = 0; i < kRows; ++i) {
    const std::int64_t query = first_query + place.row(i);
    for (int j = 0; j < kColumns; ++j) {
      const bool sees = query < shape.q_seq && first_key + place.column(j) <= shape.kv_seq - shape.q_seq + query;
      T& p = g.p.at[i][j];
      p = sees ? exp(p * scale - lse[place.row(i)]) : T(0);
      g.ds.at[i][j] = sees ? p * (g.ds.at[i][j] - dots[place.row(i)]) * scale : T(0);
    }
  }
  return g;
}

/// lse and dots of a tile of queries.
template <class T>
__device__ void load_numbers(const Heads& shape, const Work& work, std::int64_t first, const T* lse, const T* dots,
                             T* lse_tile, T* dot_tile) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= kTile || first + i >= shape.q_seq) return;
  const std::int64_t at = (work.sequence * shape.q_seq + first + i) * shape.heads + work.head;
  lse_tile[i] = lse[at];
  dot_tile[i] = dots[at];
}

template <int kWide, class T>
__global__ void __launch_bounds__(kThreads)
    key_gradients(Heads shape, Compute<T> scale, Rows<const T> q, Rows<const T> k, Rows<const T> v, Rows<const T> dout,
                  const Compute<T>* lse, const Compute<T>* dots, Rows<T> dk, Rows<T> dv) {
  using C = Compute<T>;
  const int head_dim = static_cast<int>(shape.head_dim), pitch = pitch_of(head_dim);
  C* const keys = dynamic_shared<C>();
  C* const values = keys + kTile * pitch;
  C* const queries = values + kTile * pitch;
  C* const gradients = queries + kTile * pitch;
  C* const p = gradients + kTile * pitch;
  C* const ds = p + kTile * pitch_of(kTile);
  C* const lse_tile = ds + kTile * pitch_of(kTile);
  C* const dot_tile = lse_tile + kTile;
  const Work work(shape, blockIdx.x * kTile);
  const std::int64_t column = work.head * head_dim, earlier = shape.kv_seq - shape.q_seq;
  const std::int64_t key_row = work.sequence * shape.kv_stride, query_row = work.sequence * shape.q_seq;
  load_tile(head_of(k, key_row, column), work.first, shape.kv_seq, head_dim, keys);
  load_tile(head_of(v, key_row, column), work.first, shape.kv_seq, head_dim, values);
  Strip<C, kWide> key_sum{}, value_sum{};
  // From the first tile of queries that see a key of this one.
  const std::int64_t begin = work.first > earlier ? (work.first - earlier) / kTile * kTile : 0;
  for (std::int64_t first = begin; first < shape.q_seq; first += kTile) {
    __syncthreads();
    load_tile(head_of(q, query_row, column), first, shape.q_seq, head_dim, queries);
    load_tile(head_of(dout, query_row, column), first, shape.q_seq, head_dim, gradients);
    load_numbers(shape, work, first, lse, dots, lse_tile, dot_tile);
    __syncthreads();
    const Gradients<C> g =
        score_gradients(queries, keys, values, gradients, first, work.first, shape, scale, lse_tile, dot_tile);
    share(g.p, p);
    share(g.ds, ds);
    __syncthreads();
    add_product<kWide>(p, 1, pitch_of(kTile), gradients, head_dim, value_sum);
    add_product<kWide>(ds, 1, pitch_of(kTile), queries, head_dim, key_sum);
  }
  store_strip<kWide>(key_sum, head_of(dk, key_row, column), work.first, shape.kv_seq, head_dim);
  store_strip<kWide>(value_sum, head_of(dv, key_row, column), work.first, shape.kv_seq, head_dim);
}

template <int kWide, class T>
__global__ void __launch_bounds__(kThreads)
    query_gradients(Heads shape, Compute<T> scale, Rows<const T> q, Rows<const T> k, Rows<const T> v,
                    Rows<const T> dout, const Compute<T>* lse, const Compute<T>* dots, Rows<T> dq) {
  using C = Compute<T>;
  const int head_dim = static_cast<int>(shape.head_dim), pitch = pitch_of(head_dim);
  C* const queries = dynamic_shared<C>();
  C* const gradients = queries + kTile * pitch;
  C* const keys = gradients + kTile * pitch;
  C* const values = keys + kTile * pitch;
  C* const ds = values + kTile * pitch;
  C* const lse_tile = ds + kTile * pitch_of(kTile);
  C* const dot_tile = lse_tile + kTile;
  const Work work(shape, (gridDim.x - 1 - blockIdx.x) * kTile);
  const std::int64_t column = work.head * head_dim, earlier = shape.kv_seq - shape.q_seq;
  const std::int64_t key_row = work.sequence * shape.kv_stride, query_row = work.sequence * shape.q_seq;
  load_tile(head_of(q, query_row, column), work.first, shape.q_seq, head_dim, queries);
  load_tile(head_of(dout, query_row, column), work.first, shape.q_seq, head_dim, gradients);
  load_numbers(shape, work, work.first, lse, dots, lse_tile, dot_tile);
  Strip<C, kWide> sum{};
  const std::int64_t end = min(shape.kv_seq, earlier + work.first + kTile);  // keys that some row sees
  for (std::int64_t first = 0; first < end; first += kTile) {
    __syncthreads();
    load_tile(head_of(k, key_row, column), first, shape.kv_seq, head_dim, keys);
    load_tile(head_of(v, key_row, column), first, shape.kv_seq, head_dim, values);
    __syncthreads();
    const Gradients<C> g =
        score_gradients(queries, keys, values, gradients, work.first, first, shape, scale, lse_tile, dot_tile);
    share(g.ds, ds);
    __syncwarp();  // a row of ds is written and read by one warp
    add_product<kWide>(ds, pitch_of(kTile), 1, keys, head_dim, sum);
  }
  store_strip<kWide>(sum, head_of(dq, query_row, column), work.first, shape.q_seq, head_dim);
}

/// Bytes of `strips` tiles of rows, `squares` of scores and the numbers of a tile's rows.
template <class T>
std::size_t shared_bytes(std::int64_t head_dim, int strips, int squares) {
  return static_cast<std::size_t>(kTile * (strips * (head_dim + 1) + squares * (kTile + 1) + 2)) * sizeof(T);
}

/// Calls f(constant<columns of a thread>) for the narrowest strip that holds a head.
template <class F>
void with_width(std::int64_t head_dim, const F& f) {
  if (head_dim <= 4 * kAcross) f(std::integral_constant<int, 4>());
  else if (head_dim <= 8 * kAcross) f(std::integral_constant<int, 8>());
  else f(std::integral_constant<int, kMostHeadDim / kAcross>());
}

}  // namespace

template <class T>
void causal_attention_forward(const Stream& stream, const Heads& shape, Rows<const T> q, Rows<const T> k,
                              Rows<const T> v, Rows<T> out, Compute<T>* lse) {
  if (shape.batch == 0) return;
  with_width(shape.head_dim, [&](auto wide) {
    launch(stream, grid_of(shape, shape.q_seq, kTile), kThreads, shared_bytes<Compute<T>>(shape.head_dim, 3, 1),
           forward<decltype(wide)::value, T>, shape, score_scale<Compute<T>>(shape), q, k, v, out, lse);
  });
}

template <class T>
void causal_attention_backward(const Stream& stream, const Heads& shape, Rows<const T> q, Rows<const T> k,
                               Rows<const T> v, Rows<const T> out, const Compute<T>* lse, Rows<const T> dout,
                               Rows<T> dq, Rows<T> dk, Rows<T> dv, Compute<T>* dots) {
  if (shape.batch == 0) return;
  const Compute<T> scale = score_scale<Compute<T>>(shape);
  queue_row_dots(stream, shape, out, dout, dots);
  with_width(shape.head_dim, [&](auto wide) {
    constexpr int kWide = decltype(wide)::value;
    launch(stream, grid_of(shape, shape.kv_seq, kTile), kThreads, shared_bytes<Compute<T>>(shape.head_dim, 4, 2),
           key_gradients<kWide, T>, shape, scale, q, k, v, dout, lse, dots, dk, dv);
    launch(stream, grid_of(shape, shape.q_seq, kTile), kThreads, shared_bytes<Compute<T>>(shape.head_dim, 4, 1),
           query_gradients<kWide, T>, shape, scale, q, k, v, dout, lse, dots, dq);
  });
}

#define TFORGE_INSTANTIATE(T)                                                                                          \
  template void causal_attention_forward<T>(const Stream&, const Heads&, Rows<const T>, Rows<const T>, Rows<const T>,  \
                                            Rows<T>, Compute<T>*);                                                     \
  template void causal_attention_backward<T>(const Stream&, const Heads&, Rows<const T>, Rows<const T>, Rows<const T>, \
                                             Rows<const T>, const Compute<T>*, Rows<const T>, Rows<T>, Rows<T>,        \
                                             Rows<T>, Compute<T>*)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cuda
