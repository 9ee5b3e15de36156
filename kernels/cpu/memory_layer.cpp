#include "kernels/cpu/memory_layer.h"

#include <algorithm>
#include <array>
#include <limits>

#include "kernels/cpu/memory_layer_passes.h"
#include "kernels/cpu/parallel.h"

namespace tforge::kernels::cpu {
namespace {

// Sizes of blocks do not show in the results, since each element is one chain over the tables or over the rows of text.
constexpr std::int64_t kHashed = 1 << 13;        // coordinates of a block of rows
constexpr std::int64_t kFewRows = 32;            // at most, tables are read where a row of text points
constexpr std::int64_t kAhead = 6;               // tables; then a row has come from memory when its turn is
constexpr std::int64_t kWorthForking = 1 << 15;  // elements to read; below, one thread is faster
constexpr std::int64_t kMostRows = 1024;         // of a block that goes through a group of tables
constexpr std::int64_t kLeastRows = 64;
constexpr std::int64_t kBlocks = 8;                // of a layer, where its rows allow
constexpr std::int64_t kTablesBytes = 512 * 1024;  // of a strip of a group of tables: half of a second-level cache

template <class T>
HashSpec<T> spec_of(const MemoryHash& hash) {
  return {hash.weight,
          static_cast<T>(-2 / hash.temperature),
          hash.coordinates.rows(),
          hash.weight_bits,
          hash.coordinates.columns(),
          hash.coordinates.as<std::int32_t>(),
          hash.coordinates.row_stride};
}

/// f(row) for rows of x that are hashed.
template <class F>
void over_hashed_rows(const MemoryHash& hash, std::int64_t rows, const F& f) {
  const std::int64_t step = std::max<std::int64_t>(1, kHashed / std::max<std::int64_t>(1, hash.coordinates.elements()));
  parallel_blocks(blocks_of(rows, step), [&](std::int64_t b) {
    for (std::int64_t t = b * step; t < std::min(rows, (b + 1) * step); ++t) f(t);
  });
}

/// Columns of a matrix in strips of a pass.
struct Strips {
  std::int64_t columns, width;
  std::int64_t count() const { return blocks_of(columns, width); }
  std::int64_t first(std::int64_t s) const { return s * width; }
  std::int64_t size(std::int64_t s) const { return std::min(width, columns - s * width); }
};

template <class T>
struct Lookup {
  const MemoryPasses<T>& passes;
  LookupSpec<T> spec;
  std::int64_t rows;

  LookupSpec<T> part(std::int64_t row, std::int64_t table, std::int64_t tables) const {
    LookupSpec<T> p = spec;
    p.codes += row * p.codes_row + table;
    p.weights += row * p.weights_row + table;
    p.tables = tables;
    return p;
  }
  /// Columns [first, first + columns) of rows [row, row + count), a group of tables at a time, so that what is read of
  /// them stays in cache.
  void block(const MemoryForward& layer, std::int64_t row, std::int64_t count, std::int64_t first, std::int64_t columns,
             std::int64_t group, std::int64_t ahead) const {
    const ConstTensorView& tables = layer.tables;
    T* const out = layer.y.as<T>() + row * layer.y.row_stride + first;
    std::int64_t k = 0;
    do {  // once for no tables too: y is then 0
      const std::int64_t here = std::min(group, spec.tables - k);
      passes.lookup(part(row, k, here), count, tables.as<T>() + (k << spec.bits) * tables.row_stride + first,
                    tables.row_stride, columns, k > 0 ? GradMode::accumulate : GradMode::overwrite, out,
                    layer.y.row_stride, ahead);
      k += here;
    } while (k < spec.tables);
  }
};

}  // namespace

template <class T>
void memory_hash_forward(const MemoryHash& hash, ConstTensorView x, TensorView codes, TensorView weights) {
  const HashSpec<T> spec = spec_of<T>(hash);
  const MemoryPasses<T>& passes = memory_passes<T>();
  over_hashed_rows(hash, x.rows(), [&](std::int64_t t) {
    passes.hash(spec, x.as<T>() + t * x.row_stride, codes.as<std::int32_t>() + t * codes.row_stride,
                weights.as<T>() + t * weights.row_stride);
  });
}

template <class T>
void memory_hash_backward(const MemoryHash& hash, ConstTensorView x, ConstTensorView dweights, GradMode mode,
                          TensorView dx) {
  const HashSpec<T> spec = spec_of<T>(hash);
  const MemoryPasses<T>& passes = memory_passes<T>();
  over_hashed_rows(hash, x.rows(), [&](std::int64_t t) {
    T* const to = dx.as<T>() + t * dx.row_stride;
    if (mode == GradMode::overwrite) std::fill_n(to, dx.columns(), T(0));
    passes.hash_backward(spec, x.as<T>() + t * x.row_stride, dweights.as<T>() + t, dweights.row_stride, to);
  });
}

template <class T>
void memory_lookup_forward(std::int64_t bits, ConstTensorView codes, ConstTensorView weights,
                           std::span<const MemoryForward> layers) {
  const MemoryPasses<T>& passes = memory_passes<T>();
  const std::int64_t rows = codes.rows(), tables = codes.columns();
  const Lookup<T> lookup{
      passes, {bits, tables, codes.as<std::int32_t>(), codes.row_stride, weights.as<T>(), weights.row_stride}, rows};
  const bool few = rows <= kFewRows;
  std::int64_t columns = 0;
  for (const MemoryForward& l : layers) columns += l.y.columns();

  // Blocks of rows times strips of columns of every layer; of few rows all rows and all tables at once.
  std::array<Strips, kMaxMemoryGroup> strips;
  std::int64_t total_strips = 0;
  for (std::size_t g = 0; g < layers.size(); ++g) {
    strips[g] = {layers[g].y.columns(), passes.strip};
    total_strips += strips[g].count();
  }
  const std::int64_t row_blocks_wanted =
      std::max(blocks_of(rows, kMostRows), blocks_of(kBlocks, std::max<std::int64_t>(total_strips, 1)));
  const std::int64_t step =
      few ? std::max<std::int64_t>(rows, 1) : std::max(kLeastRows, blocks_of(rows, row_blocks_wanted));
  const std::int64_t table_bytes = (passes.strip << bits) * static_cast<std::int64_t>(sizeof(T));
  const std::int64_t group =
      few ? std::max<std::int64_t>(tables, 1) : std::clamp<std::int64_t>(kTablesBytes / table_bytes, 1, 16);
  const std::int64_t row_blocks = blocks_of(rows, step);
  const auto body = [&](std::int64_t block) {
    std::size_t g = 0;
    std::int64_t s = block % total_strips;
    while (s >= strips[g].count()) s -= strips[g++].count();
    const std::int64_t row = block / total_strips * step;
    lookup.block(layers[g], row, std::min(step, rows - row), strips[g].first(s), strips[g].size(s), group,
                 few ? kAhead : 0);
  };
  const std::int64_t blocks = row_blocks * total_strips;
  if (rows * tables * columns >= kWorthForking) return parallel_blocks(blocks, body);
  for (std::int64_t b = 0; b < blocks; ++b) body(b);
}

std::int64_t memory_lookup_workspace(std::int64_t rows, std::int64_t bits) {
  return omp_get_max_threads() * (rows + (std::int64_t{1} << bits));
}

template <class T>
void memory_lookup_backward(std::int64_t bits, ConstTensorView codes, ConstTensorView weights,
                            std::span<const MemoryBackward> layers, TensorView dweights, TensorView order) {
  const MemoryPasses<T>& passes = memory_passes<T>();
  const std::int64_t rows = codes.rows(), table_rows = std::int64_t{1} << bits;
  parallel_blocks(codes.columns(), [&](std::int64_t k) {
    // Counting sort: `hit` lists the rows of text by the row of table k that they hit, in order. While it is filled,
    // end[c] runs from the first to one past the last of c.
    std::int32_t* const end = order.as<std::int32_t>() + omp_get_thread_num() * (rows + table_rows);
    std::int32_t* const hit = end + table_rows;
    const std::int32_t* const code = codes.as<std::int32_t>() + k;
    std::fill_n(end, table_rows, 0);
    for (std::int64_t t = 0; t < rows; ++t) ++end[code[t * codes.row_stride]];
    std::int32_t total = 0;
    for (std::int64_t c = 0; c < table_rows; ++c) {
      const std::int32_t here = end[c];
      end[c] = total;
      total += here;
    }
    for (std::int64_t t = 0; t < rows; ++t) hit[end[code[t * codes.row_stride]]++] = static_cast<std::int32_t>(t);

    GradMode dots_mode = GradMode::overwrite;
    for (const MemoryBackward& l : layers) {
      const Strips strips{l.dy.columns(), passes.strip};
      for (std::int64_t s = 0; s < strips.count(); ++s) {
        const std::int64_t first = strips.first(s);
        for (std::int64_t c = 0; c < table_rows; ++c) {
          const std::int32_t begin = c == 0 ? 0 : end[c - 1];
          if (begin == end[c] && (!l.dtables || l.dtables_mode == GradMode::accumulate)) continue;
          const std::int64_t row = k * table_rows + c;
          const TableRow<T> table{l.tables.as<T>() + row * l.tables.row_stride + first,
                                  l.dtables ? l.dtables.as<T>() + row * l.dtables.row_stride + first : nullptr,
                                  l.dtables_mode};
          passes.hits(end[c] - begin, hit + begin, weights.as<T>() + k, weights.row_stride, l.dy.as<T>() + first,
                      l.dy.row_stride, strips.size(s), table, dots_mode,
                      dweights ? dweights.as<T>() + k * dweights.row_stride : nullptr);
          if (first == 0 && table.gradient != nullptr && begin < end[c] && *table.gradient == T(0)) {
            *table.gradient = std::numeric_limits<T>::min();
          }
        }
        dots_mode = GradMode::accumulate;
      }
    }
  });
}

#define TFORGE_INSTANTIATE(T)                                                                       \
  template void memory_hash_forward<T>(const MemoryHash&, ConstTensorView, TensorView, TensorView); \
  template void memory_lookup_forward<T>(std::int64_t, ConstTensorView, ConstTensorView,            \
                                         std::span<const MemoryForward>);                           \
  template void memory_lookup_backward<T>(std::int64_t, ConstTensorView, ConstTensorView,           \
                                          std::span<const MemoryBackward>, TensorView, TensorView); \
  template void memory_hash_backward<T>(const MemoryHash&, ConstTensorView, ConstTensorView, GradMode, TensorView)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cpu
