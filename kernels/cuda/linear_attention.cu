// Causal attention by features, chunk by chunk (kernels/linear_attention.h). A block has one head of one sequence and
// walks over its chunks with the sums of those before; backward has two walks, each with sums of its own: from the
// first chunk on for dq, from the last one back for dk and dv. So no sums of other chunks are kept, and nobody adds to
// what another block adds to.
//
// Every element of a product is one chain of multiply-adds of one thread, the sums of earlier chunks first, then the
// keys of its own chunk from the first on; keys that it does not see have weight 0 and leave the chain as it is. So the
// bits of a row do not depend on the rows it is computed with: a sequence that goes on from a state gives the bits of
// the whole.
#include "kernels/cuda/linear_attention.h"

#include <limits>

#include "kernels/cuda/launch.cuh"

namespace tforge::kernels::cuda {

namespace {

constexpr int kThreads = 256;
constexpr double kFeatureFloor = 1e-6;  // added to every feature of random_exponential
constexpr double kSumFloor = 1e-6;      // of the sum of weights of relu_cosine

enum class Role : std::uint8_t { query, key };

/// put(i, j, sum over k < depth of a(i, k) b(k, j)) for all of [rows, columns], by all threads of the block, four rows
/// and four columns each: neighbours in a warp have neighbouring columns.
template <class C, class A, class B, class Put>
__device__ void block_product(int rows, int columns, int depth, const A& a, const B& b, const Put& put) {
  constexpr int kEach = 4;
  const int high = (rows + kEach - 1) / kEach, wide = (columns + kEach - 1) / kEach;
  for (int t = static_cast<int>(threadIdx.x); t < high * wide; t += kThreads) {
    const int i0 = t / wide, j0 = t % wide;
    C sum[kEach][kEach] = {};
    for (int k = 0; k < depth; ++k) {
      C left[kEach], right[kEach];
      for (int r = 0; r < kEach; ++r) left[r] = i0 + r * high < rows ? a(i0 + r * high, k) : C(0);
      for (int c = 0; c < kEach; ++c) right[c] = j0 + c * wide < columns ? b(k, j0 + c * wide) : C(0);
      for (int r = 0; r < kEach; ++r) {
        for (int c = 0; c < kEach; ++c) sum[r][c] += left[r] * right[c];
      }
    }
    for (int r = 0; r < kEach; ++r) {
      for (int c = 0; c < kEach; ++c) {
        if (i0 + r * high < rows && j0 + c * wide < columns) put(i0 + r * high, j0 + c * wide, sum[r][c]);
      }
    }
  }
}

/// f(i) for the rows of a chunk, a warp each.
template <class F>
__device__ void warp_per_row(int rows, const F& f) {
  for (int i = static_cast<int>(threadIdx.x) / kWarp; i < rows; i += kThreads / kWarp) f(i);
}

/// The sum of f(k) over k < count by one warp: lane l has l, l + 32, ... in order.
template <class C, class F>
__device__ C warp_sum(int count, const F& f) {
  C sum = 0;
  for (int k = static_cast<int>(threadIdx.x) % kWarp; k < count; k += kWarp) sum += f(k);
  return over_warp<Sum>(sum);
}

/// The largest f(k) and the least k that has it.
template <class C>
struct Peak {
  C value;
  int at;
};
template <class C, class F>
__device__ Peak<C> warp_peak(int count, const F& f) {
  Peak<C> best{-std::numeric_limits<C>::infinity(), count};
  const auto take = [&](C value, int at) {
    if (value > best.value || (value == best.value && at < best.at)) best = {value, at};
  };
  for (int k = static_cast<int>(threadIdx.x) % kWarp; k < count; k += kWarp) take(f(k), k);
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const C value = __shfl_xor_sync(kAllLanes, best.value, distance);
    const int at = __shfl_xor_sync(kAllLanes, best.at, distance);
    take(value, at);
  }
  return best;
}

/// The rows of one head of one sequence.
template <class T>
struct Head {
  T* data;
  std::int64_t stride;
  __device__ Head(const Rows<T>& m, std::int64_t first_row, std::int64_t column)
      : data(m.row(first_row) + column), stride(m.stride) {}
  __device__ T* row(std::int64_t i) const { return data + i * stride; }
};

/// Hands out pieces of memory.
template <class C>
struct Pieces {
  C* next;
  __device__ C* take(std::int64_t elements) {
    C* const piece = next;
    next += elements;
    return piece;
  }
};

/// The feature map. f and df are [rows, features] of a chunk.
template <class T>
struct Map {
  using C = Compute<T>;
  const LinearHeads<C>& shape;

  __device__ C half_square() const { return C(0.5) / sqrt(static_cast<C>(shape.head_dim)); }
  __device__ C floored(C sum) const {
    return shape.kind == FeatureKind::relu_cosine && sum < static_cast<C>(kSumFloor) ? static_cast<C>(kSumFloor) : sum;
  }

  /// f of rows of x that stand at `position` and after it. All threads; f is whole behind the next barrier.
  __device__ void apply(Role role, std::int64_t position, int rows, const Head<const T>& x, C* f) const {
    const int d = shape.head_dim, m = shape.features;
    if (shape.kind == FeatureKind::relu_cosine) {
      for (int e = static_cast<int>(threadIdx.x); e < rows * d; e += kThreads) {
        const int i = e / d, c = e % d;
        const C* const angle = shape.table.row(position + i);
        const C value = computed(x.row(i)[c]), positive = value < C(0) ? C(0) : value;  // a NaN stays one
        f[i * m + c] = positive * angle[0];
        f[i * m + d + c] = positive * angle[1];
      }
      return;
    }
    block_product<C>(
        rows, m, d, [&](int i, int c) { return computed(x.row(i)[c]); },
        [&](int c, int r) { return shape.table.row(c)[r]; }, [&](int i, int r, C sum) { f[i * m + r] = sum; });
    __syncthreads();
    warp_per_row(rows, [&](int i) {
      C* const row = f + i * m;
      const C shift = role == Role::query ? warp_peak<C>(m, [&](int r) { return row[r]; }).value
                                          : half_square() * warp_sum<C>(d, [&](int c) {
                                              const C value = computed(x.row(i)[c]);
                                              return value * value;
                                            });
      for (int r = static_cast<int>(threadIdx.x) % kWarp; r < m; r += kWarp) {
        row[r] = exp(row[r] - shift) + static_cast<C>(kFeatureFloor);
      }
    });
  }

  /// The gradients `to` of x from f and df, both of which it changes. `totals` is shared memory for a number a row.
  __device__ void backward(Role role, std::int64_t position, int rows, const Head<const T>& x, C* f, C* df, C* totals,
                           const Head<T>& to) const {
    const int d = shape.head_dim, m = shape.features;
    if (shape.kind == FeatureKind::relu_cosine) {
      for (int e = static_cast<int>(threadIdx.x); e < rows * d; e += kThreads) {
        const int i = e / d, c = e % d;
        const C* const angle = shape.table.row(position + i);
        const C slope = df[i * m + c] * angle[0] + df[i * m + d + c] * angle[1];
        to.row(i)[c] = stored<T>(computed(x.row(i)[c]) > C(0) ? slope : C(0));
      }
      return;
    }
    warp_per_row(rows, [&](int i) {
      C* const row = f + i * m;
      C* const g = df + i * m;
      for (int r = static_cast<int>(threadIdx.x) % kWarp; r < m; r += kWarp) {
        row[r] -= static_cast<C>(kFeatureFloor);
        g[r] *= row[r];
      }
      __syncwarp();
      const C total = warp_sum<C>(m, [&](int r) { return g[r]; });
      const int largest = warp_peak<C>(m, [&](int r) { return row[r]; }).at;
      if (threadIdx.x % kWarp == 0) {
        totals[i] = total;
        if (role == Role::query && largest < m) g[largest] -= total;  // through the maximum
      }
    });
    __syncthreads();
    block_product<C>(
        rows, d, m, [&](int i, int r) { return df[i * m + r]; }, [&](int r, int c) { return shape.table.row(c)[r]; },
        [&](int i, int c, C sum) {
          const C along = role == Role::query ? C(0) : -2 * half_square() * totals[i];
          to.row(i)[c] = stored<T>(sum + along * computed(x.row(i)[c]));
        });
  }
};

/// Shared memory: products of pairs of a chunk, rows in different banks, and numbers of its rows.
__device__ inline int pitch_of(int chunk) { return chunk + 1; }
template <class C>
std::size_t shared_bytes(int chunk, int squares) {
  return static_cast<std::size_t>(chunk) * static_cast<std::size_t>(squares * (chunk + 1) + 2) * sizeof(C);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    forward(LinearHeads<Compute<T>> shape, Rows<const T> q, Rows<const T> k, Rows<const T> v, Rows<T> out,
            Compute<T>* den, Compute<T>* state, std::int64_t state_size, Compute<T>* workspace) {
  using C = Compute<T>;
  const int d = shape.head_dim, m = shape.features, chunk = shape.chunk, pitch = pitch_of(chunk);
  const std::int64_t b = blockIdx.x / shape.heads, h = blockIdx.x % shape.heads, row0 = b * shape.seq;
  const Head<const T> queries(q, row0, h * d), keys(k, row0, h * d), values(v, row0, h * d);
  const Head<T> outputs(out, row0, h * d);
  const Map<T> map{shape};
  Pieces<C> scratch{workspace + blockIdx.x * linear_forward_workspace(d, m, chunk)};
  C* const fq = scratch.take(chunk * m);
  Pieces<C> kept{state != nullptr ? state + blockIdx.x * state_size : scratch.next};
  C* const sums = kept.take(m * d);              // [m, d], of the chunks that are complete
  C* const totals = kept.take(m);                // of their features
  C* const chunk_keys = kept.take(chunk * m);    // [chunk, m], the features of this chunk's keys
  C* const chunk_values = kept.take(chunk * d);  // [chunk, d]
  C* const w = dynamic_shared<C>();
  C* const row_sums = w + chunk * pitch;
  if (shape.first == 0) {
    for (int e = static_cast<int>(threadIdx.x); e < m * d + m; e += kThreads) sums[e] = C(0);  // and the totals
  }
  for (std::int64_t row = 0; row < shape.seq;) {
    const std::int64_t position = shape.first + row;
    const int at = static_cast<int>(position % chunk);
    const int n = static_cast<int>(min(static_cast<std::int64_t>(chunk - at), shape.seq - row)), seen = at + n;
    const int before = position >= chunk ? m : 0;  // depth of the part that the sums have
    map.apply(Role::query, position, n, {q, row0 + row, h * d}, fq);
    map.apply(Role::key, position, n, {k, row0 + row, h * d}, chunk_keys + at * m);
    for (int e = static_cast<int>(threadIdx.x); e < n * d; e += kThreads) {
      chunk_values[at * d + e] = computed(values.row(row + e / d)[e % d]);
    }
    __syncthreads();
    block_product<C>(
        n, seen, m, [&](int i, int r) { return fq[i * m + r]; }, [&](int r, int j) { return chunk_keys[j * m + r]; },
        [&](int i, int j, C sum) { w[i * pitch + j] = j <= at + i ? sum : C(0); });
    __syncthreads();
    warp_per_row(n, [&](int i) {
      C sum = warp_sum<C>(seen, [&](int j) { return w[i * pitch + j]; });
      if (before > 0) sum += warp_sum<C>(m, [&](int r) { return fq[i * m + r] * totals[r]; });
      if (threadIdx.x % kWarp != 0) return;
      row_sums[i] = sum;
      if (den != nullptr) den[(row0 + row + i) * shape.heads + h] = sum;
    });
    __syncthreads();
    block_product<C>(
        n, d, before + seen, [&](int i, int x) { return x < before ? fq[i * m + x] : w[i * pitch + x - before]; },
        [&](int x, int c) { return x < before ? sums[x * d + c] : chunk_values[(x - before) * d + c]; },
        [&](int i, int c, C sum) { outputs.row(row + i)[c] = stored<T>(C(1) / map.floored(row_sums[i]) * sum); });
    __syncthreads();
    row += n;
    if (seen < chunk || (row == shape.seq && state == nullptr)) continue;
    block_product<C>(
        m, d, chunk, [&](int r, int j) { return chunk_keys[j * m + r]; },
        [&](int j, int c) { return chunk_values[j * d + c]; }, [&](int r, int c, C sum) { sums[r * d + c] += sum; });
    for (int r = static_cast<int>(threadIdx.x); r < m; r += kThreads) {
      C sum = 0;
      for (int j = 0; j < chunk; ++j) sum += chunk_keys[j * m + r];
      totals[r] += sum;
    }
    __syncthreads();
  }
}

/// What both walks of backward have of a chunk: features, g = dout / den and the gradient of den.
template <class T>
struct Chunk {
  using C = Compute<T>;
  C *fq, *fk, *g, *dden;

  __device__ void load(const LinearHeads<C>& shape, std::int64_t b, std::int64_t h, std::int64_t row, int n,
                       const Rows<const T>& q, const Rows<const T>& k, const Rows<const T>& out, const C* den,
                       const Rows<const T>& dout) const {
    const Map<T> map{shape};
    const int d = shape.head_dim;
    const std::int64_t first = b * shape.seq + row;
    map.apply(Role::query, row, n, {q, first, h * d}, fq);
    map.apply(Role::key, row, n, {k, first, h * d}, fk);
    const Head<const T> results(out, first, h * d), gradients(dout, first, h * d);
    warp_per_row(n, [&](int i) {
      const C sum = den[(first + i) * shape.heads + h], floored = map.floored(sum);
      const C dot = warp_sum<C>(d, [&](int c) { return computed(gradients.row(i)[c]) * computed(results.row(i)[c]); });
      if (threadIdx.x % kWarp == 0) dden[i] = sum < floored ? C(0) : -dot / floored;
      for (int c = static_cast<int>(threadIdx.x) % kWarp; c < d; c += kWarp) {
        g[i * d + c] = C(1) / floored * computed(gradients.row(i)[c]);
      }
    });
    __syncthreads();
  }
};

/// dw[i, j] = g_i . v_j + dden_i of the pairs that see each other, else 0.
template <class T, class C>
__device__ void weight_gradients(int n, int d, const C* g, const Head<const T>& values, const C* dden, int pitch,
                                 C* dw) {
  block_product<C>(
      n, n, d, [&](int i, int c) { return g[i * d + c]; }, [&](int c, int j) { return computed(values.row(j)[c]); },
      [&](int i, int j, C sum) { dw[i * pitch + j] = j <= i ? sum + dden[i] : C(0); });
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    query_gradients(LinearHeads<Compute<T>> shape, Rows<const T> q, Rows<const T> k, Rows<const T> v, Rows<const T> out,
                    const Compute<T>* den, Rows<const T> dout, Rows<T> dq, Compute<T>* workspace) {
  using C = Compute<T>;
  const int d = shape.head_dim, m = shape.features, chunk = shape.chunk, pitch = pitch_of(chunk);
  const std::int64_t b = blockIdx.x / shape.heads, h = blockIdx.x % shape.heads, row0 = b * shape.seq;
  Pieces<C> scratch{workspace + blockIdx.x * (linear_backward_workspace(d, m, chunk) / 2)};
  C* const sums = scratch.take(d * m);  // [d, m], transposed: of the chunks before
  C* const totals = scratch.take(m);    // its row d, so to say
  C* const dfq = scratch.take(chunk * m);
  C* const dw = dynamic_shared<C>();
  C* const dden = dw + chunk * pitch;
  C* const of_rows = dden + chunk;
  const Chunk<T> c{scratch.take(chunk * m), scratch.take(chunk * m), scratch.take(chunk * d), dden};
  for (int e = static_cast<int>(threadIdx.x); e < d * m + m; e += kThreads) sums[e] = C(0);  // and the totals
  for (std::int64_t row = 0; row < shape.seq; row += chunk) {
    const int n = static_cast<int>(min(static_cast<std::int64_t>(chunk), shape.seq - row));
    const int before = row > 0 ? d + 1 : 0;  // depth of the part through the sums and totals
    const Head<const T> values(v, row0 + row, h * d);
    c.load(shape, b, h, row, n, q, k, out, den, dout);
    weight_gradients<T>(n, d, c.g, values, dden, pitch, dw);
    __syncthreads();
    block_product<C>(
        n, m, before + n,
        [&](int i, int x) {
          if (x >= before) return dw[i * pitch + x - before];
          return x < d ? c.g[i * d + x] : dden[i];
        },
        [&](int x, int r) { return x < before ? sums[x * m + r] : c.fk[(x - before) * m + r]; },
        [&](int i, int r, C sum) { dfq[i * m + r] = sum; });
    __syncthreads();
    Map<T>{shape}.backward(Role::query, row, n, {q, row0 + row, h * d}, c.fq, dfq, of_rows, {dq, row0 + row, h * d});
    block_product<C>(
        d, m, n, [&](int x, int j) { return computed(values.row(j)[x]); },
        [&](int j, int r) { return c.fk[j * m + r]; }, [&](int x, int r, C sum) { sums[x * m + r] += sum; });
    for (int r = static_cast<int>(threadIdx.x); r < m; r += kThreads) {
      for (int j = 0; j < n; ++j) totals[r] += c.fk[j * m + r];
    }
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    key_gradients(LinearHeads<Compute<T>> shape, Rows<const T> q, Rows<const T> k, Rows<const T> v, Rows<const T> out,
                  const Compute<T>* den, Rows<const T> dout, Rows<T> dk, Rows<T> dv, Compute<T>* workspace) {
  using C = Compute<T>;
  const int d = shape.head_dim, m = shape.features, chunk = shape.chunk, pitch = pitch_of(chunk);
  const std::int64_t b = blockIdx.x / shape.heads, h = blockIdx.x % shape.heads, row0 = b * shape.seq;
  Pieces<C> scratch{workspace + (gridDim.x + blockIdx.x) * (linear_backward_workspace(d, m, chunk) / 2)};
  C* const dsums = scratch.take(m * d);  // [m, d], by the queries of later chunks
  C* const dtotals = scratch.take(m);
  C* const dfk = scratch.take(chunk * m);
  C* const w = dynamic_shared<C>();
  C* const dw = w + chunk * pitch;
  C* const dden = dw + chunk * pitch;
  C* const of_rows = dden + chunk;
  const Chunk<T> c{scratch.take(chunk * m), scratch.take(chunk * m), scratch.take(chunk * d), dden};
  for (int e = static_cast<int>(threadIdx.x); e < m * d + m; e += kThreads) dsums[e] = C(0);  // and the totals
  for (std::int64_t row = (shape.seq - 1) / chunk * chunk; row >= 0; row -= chunk) {
    const int n = static_cast<int>(min(static_cast<std::int64_t>(chunk), shape.seq - row));
    const bool has_later = row + chunk < shape.seq;
    const Head<const T> values(v, row0 + row, h * d);
    const Head<T> to_values(dv, row0 + row, h * d);
    c.load(shape, b, h, row, n, q, k, out, den, dout);
    weight_gradients<T>(n, d, c.g, values, dden, pitch, dw);
    block_product<C>(
        n, n, m, [&](int i, int r) { return c.fq[i * m + r]; }, [&](int r, int j) { return c.fk[j * m + r]; },
        [&](int i, int j, C sum) { w[i * pitch + j] = j <= i ? sum : C(0); });
    __syncthreads();
    const int through_sums = has_later ? d : 0, through_features = has_later ? m : 0;
    block_product<C>(
        n, m, n + through_sums,
        [&](int j, int x) { return x < n ? dw[x * pitch + j] : computed(values.row(j)[x - n]); },
        [&](int x, int r) { return x < n ? c.fq[x * m + r] : dsums[r * d + x - n]; },
        [&](int j, int r, C sum) { dfk[j * m + r] = has_later ? sum + dtotals[r] : sum; });
    block_product<C>(
        n, d, n + through_features, [&](int j, int x) { return x < n ? w[x * pitch + j] : c.fk[j * m + x - n]; },
        [&](int x, int e) { return x < n ? c.g[x * d + e] : dsums[(x - n) * d + e]; },
        [&](int j, int e, C sum) { to_values.row(j)[e] = stored<T>(sum); });
    __syncthreads();
    block_product<C>(
        m, d, n, [&](int r, int i) { return c.fq[i * m + r]; }, [&](int i, int e) { return c.g[i * d + e]; },
        [&](int r, int e, C sum) { dsums[r * d + e] += sum; });
    for (int r = static_cast<int>(threadIdx.x); r < m; r += kThreads) {
      for (int i = 0; i < n; ++i) dtotals[r] += dden[i] * c.fq[i * m + r];
    }
    Map<T>{shape}.backward(Role::key, row, n, {k, row0 + row, h * d}, c.fk, dfk, of_rows, {dk, row0 + row, h * d});
    __syncthreads();
  }
}

}  // namespace

template <class T>
void linear_attention_forward(const Stream& stream, const LinearHeads<Compute<T>>& shape, Rows<const T> q,
                              Rows<const T> k, Rows<const T> v, Rows<T> out, Compute<T>* den, Compute<T>* state,
                              std::int64_t state_size, Compute<T>* workspace) {
  if (shape.batch == 0) return;
  launch(stream, dim3(static_cast<unsigned>(shape.batch * shape.heads)), kThreads,
         shared_bytes<Compute<T>>(shape.chunk, 1), forward<T>, shape, q, k, v, out, den, state, state_size, workspace);
}

template <class T>
void linear_attention_backward(const Stream& stream, const LinearHeads<Compute<T>>& shape, Rows<const T> q,
                               Rows<const T> k, Rows<const T> v, Rows<const T> out, const Compute<T>* den,
                               Rows<const T> dout, Rows<T> dq, Rows<T> dk, Rows<T> dv, Compute<T>* workspace) {
  if (shape.batch == 0) return;
  const dim3 grid(static_cast<unsigned>(shape.batch * shape.heads));
  launch(stream, grid, kThreads, shared_bytes<Compute<T>>(shape.chunk, 1), query_gradients<T>, shape, q, k, v, out, den,
         dout, dq, workspace);
  launch(stream, grid, kThreads, shared_bytes<Compute<T>>(shape.chunk, 2), key_gradients<T>, shape, q, k, v, out, den,
         dout, dk, dv, workspace);
}

#define TFORGE_INSTANTIATE(T)                                                                                \
  template void linear_attention_forward<T>(const Stream&, const LinearHeads<Compute<T>>&, Rows<const T>,    \
                                            Rows<const T>, Rows<const T>, Rows<T>, Compute<T>*, Compute<T>*, \
                                            std::int64_t, Compute<T>*);                                      \
  template void linear_attention_backward<T>(const Stream&, const LinearHeads<Compute<T>>&, Rows<const T>,   \
                                             Rows<const T>, Rows<const T>, Rows<const T>, const Compute<T>*, \
                                             Rows<const T>, Rows<T>, Rows<T>, Rows<T>, Compute<T>*)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
TFORGE_INSTANTIATE(bf16);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cuda
