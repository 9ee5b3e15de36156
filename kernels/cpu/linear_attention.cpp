// Causal attention by features, one head at a time, chunk by chunk (kernels/linear_attention.h).
//
// All products run through the tiles of tile.h: an element is one chain of multiply-adds over features, keys or
// columns, from the first on, then added to what earlier chunks gave. Keys that a row does not see have weight 0 and
// leave a chain as it is. So the bits of a row do not depend on the rows it is computed with: a sequence that goes on
// from a state, row by row, gives the bits of the whole.
#include "kernels/cpu/linear_attention.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <string>
#include <vector>

#include "core/rng.h"
#include "kernels/cpu/head_products.h"
#include "kernels/cpu/packing.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/row_passes.h"

namespace tforge::kernels::cpu {
namespace {

constexpr std::int64_t kChunk = kLinearChunk;
constexpr std::int64_t kOffset = 16;  // of rows that are walked down, so that they do not share a cache set
constexpr std::int64_t kWeightsRow = padded(kChunk) + kOffset;
constexpr double kFeatureFloor = 1e-6;  // added to every feature of random_exponential
constexpr double kSumFloor = 1e-6;      // of the sum of weights of relu_cosine

constexpr std::int64_t features_row(std::int64_t m) { return padded(m) + kOffset; }

/// Extents in elements.
struct Extents {
  std::int64_t m, d, wide, rows, features, weights, sums, totals, chunks;
  Extents(std::int64_t head_dim, std::int64_t count, std::int64_t seq)
      : m(count),
        d(head_dim),
        wide(padded(head_dim)),
        rows(kChunk * wide),
        features(kChunk * features_row(count)),
        weights(kChunk * kWeightsRow),
        sums(count * wide),
        totals(padded(count)),
        chunks(blocks_of(seq, kChunk)) {}
  std::int64_t state() const { return sums + totals + m * kChunk + rows; }
  std::int64_t forward() const { return state() + 2 * features + weights + rows + kChunk; }
  /// The sums before each chunk; features of queries and keys and their gradients, keys transposed; w and dw; values,
  /// dout, and gradients of rows; values transposed; sums or their gradients transposed; dsums; the table.
  std::int64_t backward() const {
    return chunks * (sums + totals) + 4 * features + padded(kChunk) * m + 2 * weights + 3 * rows + padded(kChunk) * d +
           padded(m) * d + sums + totals + wide * m + kChunk;
  }
};

enum class Role : std::uint8_t { query, key };

/// The feature map of one pass.
template <class T>
class Map {
 public:
  Map(const FeatureMap& map, std::int64_t head_dim)
      : kind_(map.kind),
        m_(map.count),
        d_(head_dim),
        row_(features_row(map.count)),
        table_(map.table.as<T>()),
        table_row_(map.table.row_stride),
        half_square_(static_cast<T>(0.5 / std::sqrt(static_cast<double>(head_dim)))) {}

  /// f [rows, m] of the rows of x, which stand at `position` and after it.
  void apply(Role role, std::int64_t position, std::int64_t rows, Head<const T> x, T* f) const {
    if (kind_ == Features::relu_cosine) {
      for (std::int64_t i = 0; i < rows; ++i) {
        const T* const angle = table_ + (position + i) * table_row_;
        const T* const from = x.at(i);
        T* const to = f + i * row_;
        for (std::int64_t c = 0; c < d_; ++c) {
          const T positive = from[c] < 0 ? T(0) : from[c];  // a NaN stays one
          to[c] = positive * angle[0];
          to[d_ + c] = positive * angle[1];
        }
        std::fill(to + m_, to + padded(m_), T(0));
      }
      return;
    }
    product<T>(rows, d_, m_, {x.data, x.row, 1}, {table_, table_row_}, GradMode::overwrite, f, row_);
    for (std::int64_t i = 0; i < rows; ++i) {
      T* const to = f + i * row_;
      const T shift =
          role == Role::query ? passes_.largest(to, m_) : half_square_ * passes_.sum_of_squares(x.at(i), d_);
      passes_.scaled_exponentials(to, m_, shift, T(1));
      for (std::int64_t r = 0; r < m_; ++r) to[r] += static_cast<T>(kFeatureFloor);
    }
  }

  /// The transposed table, where backward needs it: m d elements of `to`, in panels.
  void transpose_table(T* to) const {
    if (kind_ == Features::relu_cosine) return;
    for (std::int64_t j = 0; j < d_; j += kPanelColumns<T>) {
      pack_transposed_panel(table_, table_row_, j, d_, m_, to + j * m_);
    }
  }

  /// The gradients `to` of x from the features f and their gradients df, both of which it changes. dx is scratch.
  void backward(Role role, std::int64_t position, std::int64_t rows, Head<const T> x, T* f, T* df, const T* transposed,
                T* dx, Head<T> to) const {
    if (kind_ == Features::relu_cosine) {
      for (std::int64_t i = 0; i < rows; ++i) {
        const T* const angle = table_ + (position + i) * table_row_;
        const T* const from = x.at(i);
        const T* const g = df + i * row_;
        for (std::int64_t c = 0; c < d_; ++c) {
          to.at(i)[c] = from[c] > 0 ? g[c] * angle[0] + g[d_ + c] * angle[1] : T(0);
        }
      }
      return;
    }
    T totals[kChunk];
    for (std::int64_t i = 0; i < rows; ++i) {
      T* const e = f + i * row_;
      T* const g = df + i * row_;
      for (std::int64_t r = 0; r < m_; ++r) e[r] -= static_cast<T>(kFeatureFloor);
      totals[i] = passes_.dot(g, e, m_);
      for (std::int64_t r = 0; r < m_; ++r) g[r] *= e[r];
      if (role == Role::query) g[std::max_element(e, e + m_) - e] -= totals[i];  // through the maximum
    }
    const std::int64_t wide = padded(d_);
    product<T>(rows, m_, d_, {df, row_, 1}, {transposed, kPanelColumns<T>, m_ * kPanelColumns<T>}, GradMode::overwrite,
               dx, wide);
    for (std::int64_t i = 0; i < rows; ++i) {
      const T along = role == Role::query ? T(0) : -2 * half_square_ * totals[i];
      for (std::int64_t c = 0; c < d_; ++c) to.at(i)[c] = dx[i * wide + c] + along * x.at(i)[c];
    }
  }

  T floored(T sum) const {
    return kind_ == Features::relu_cosine ? std::max(sum, static_cast<T>(kSumFloor)) : sum;  // a NaN stays one
  }

 private:
  Features kind_;
  std::int64_t m_, d_, row_;
  const T* table_;
  std::int64_t table_row_;
  T half_square_;
  const RowPasses<T>& passes_ = row_passes<T>();
};

/// to [rows, wide]: the rows of a head, 0 past their columns.
template <class T>
void copy_rows(Head<const T> from, std::int64_t rows, std::int64_t d, T* to, std::int64_t wide) {
  for (std::int64_t i = 0; i < rows; ++i)
    std::fill(std::copy_n(from.at(i), d, to + i * wide), to + (i + 1) * wide, T(0));
}

/// w[i, j] = a_i . b_j for the rows `first + i` of a chunk and the keys j <= first + i, 0 up to a tile's last row; b in
/// panels of `depth` rows, `panel` elements apart.
template <class T>
void weights_of(std::int64_t rows, std::int64_t first, std::int64_t depth, Left<T> a, Right<T> b, T* w) {
  for (std::int64_t j = 0; j < first + rows; j += kPanelColumns<T>) {
    const Panel<T> panel{b.data + j / kPanelColumns<T> * b.panel, b.row};
    for (std::int64_t i = std::max<std::int64_t>(0, j - first) / kTileRows * kTileRows; i < rows; i += kTileRows) {
      tile<T>(std::min(kTileRows, rows - i), depth, {a.data + i * a.row, a.row, a.step}, panel, GradMode::overwrite,
              w + i * kWeightsRow + j, kWeightsRow);
    }
  }
  for (std::int64_t i = 0; i < rows; ++i) {
    std::fill(w + i * kWeightsRow + first + i + 1, w + i * kWeightsRow + first + std::min(rows, i + kTileRows), T(0));
  }
}

/// y [rows, columns] {=, +=} w b over the keys that a row sees.
template <class T>
void mix(std::int64_t rows, std::int64_t first, std::int64_t columns, const T* w, const T* b, std::int64_t b_row,
         GradMode mode, T* y, std::int64_t y_row) {
  for (std::int64_t c = 0; c < columns; c += kPanelColumns<T>) {
    for (std::int64_t i = 0; i < rows; i += kTileRows) {
      const std::int64_t count = std::min(kTileRows, rows - i);
      tile<T>(count, first + i + count, {w + i * kWeightsRow, kWeightsRow, 1}, {b + c, b_row}, mode, y + i * y_row + c,
              y_row);
    }
  }
}

/// y [rows, columns] = w^T b over the queries that see a key, rows of a whole chunk.
template <class T>
void mix_transposed(std::int64_t rows, std::int64_t columns, const T* w, const T* b, std::int64_t b_row, T* y,
                    std::int64_t y_row) {
  for (std::int64_t c = 0; c < columns; c += kPanelColumns<T>) {
    for (std::int64_t j = 0; j < rows; j += kTileRows) {
      tile<T>(std::min(kTileRows, rows - j), rows - j, {w + j * kWeightsRow + j, 1, kWeightsRow},
              {b + j * b_row + c, b_row}, GradMode::overwrite, y + j * y_row + c, y_row);
    }
  }
}

/// The transpose of rows [n, depth] as panels.
template <class T>
Right<T> transposed(const T* rows, std::int64_t row, std::int64_t n, std::int64_t depth, T* to) {
  for (std::int64_t j = 0; j < n; j += kPanelColumns<T>) pack_transposed_panel(rows, row, j, n, depth, to + j * depth);
  return {to, kPanelColumns<T>, depth * kPanelColumns<T>};
}

}  // namespace

template <class T>
void orthogonal_features(std::uint64_t seed, std::string_view name, std::int64_t count, TensorView table) {
  const std::int64_t d = table.rows();
  const double scale = std::pow(static_cast<double>(d), -0.25);
  const Rng directions(seed, std::string(name) + " directions"), lengths(seed, std::string(name) + " lengths");
  std::vector<double> group(static_cast<std::size_t>(d * d));
  for (std::int64_t r = 0; r < count; ++r) {
    const std::int64_t in_group = r % d;
    double* const row = group.data() + in_group * d;
    double length = 0;
    for (std::int64_t c = 0; c < d; ++c) {
      row[c] = directions.normal(static_cast<std::uint64_t>(r * d + c));
      const double x = lengths.normal(static_cast<std::uint64_t>(r * d + c));
      length += x * x;
    }
    for (int again = 0; again < 2; ++again) {  // the second time takes off what rounding left
      for (std::int64_t other = 0; other < in_group; ++other) {
        const double* const q = group.data() + other * d;
        double dot = 0;
        for (std::int64_t c = 0; c < d; ++c) dot += q[c] * row[c];
        for (std::int64_t c = 0; c < d; ++c) row[c] -= dot * q[c];
      }
      double square = 0;
      for (std::int64_t c = 0; c < d; ++c) square += row[c] * row[c];
      for (std::int64_t c = 0; c < d; ++c) row[c] /= std::sqrt(square);
    }
    for (std::int64_t c = 0; c < d; ++c) {
      table.as<T>()[c * table.row_stride + r] = static_cast<T>(scale * std::sqrt(length) * row[c]);
    }
  }
  for (std::int64_t c = 0; c < d; ++c) {
    T* const row = table.as<T>() + c * table.row_stride;
    std::fill(row + count, row + table.columns(), T(0));
  }
}

template <class T>
void cosine_features(TensorView table) {
  for (std::int64_t i = 0; i < table.rows(); ++i) {
    const double angle = std::numbers::pi / 2 * static_cast<double>(i) / static_cast<double>(table.rows());
    T* const row = table.as<T>() + i * table.row_stride;
    row[0] = static_cast<T>(std::cos(angle));
    row[1] = static_cast<T>(std::sin(angle));
  }
}

template <class T>
void linear_attention_forward(const LinearShape& shape, const FeatureMap& features, ConstTensorView q,
                              ConstTensorView k, ConstTensorView v, TensorView out, TensorView den, TensorView state,
                              TensorView workspace) {
  const std::int64_t d = q.columns() / shape.heads, m = features.count, f_row = features_row(m);
  const Extents extents(d, m, shape.seq);
  const Map<T> map(features, d);
  const RowPasses<T>& passes = row_passes<T>();
  T* const scratch = workspace.as<T>();

  parallel_blocks(shape.batch * shape.heads, [&](std::int64_t index) {
    const std::int64_t b = index / shape.heads, h = index % shape.heads;
    const auto queries = head_of<T>(q, b * shape.seq, h * d), keys = head_of<T>(k, b * shape.seq, h * d),
               values = head_of<T>(v, b * shape.seq, h * d);
    const auto outputs = head_of<T>(out, b * shape.seq, h * d);
    Pieces<T> pieces(scratch + omp_get_thread_num() * extents.forward());
    T* const own = pieces.take(extents.state());
    T* const fq = pieces.take(extents.features);
    T* const fk = pieces.take(extents.features);
    T* const w = pieces.take(extents.weights);
    T* const y = pieces.take(extents.rows);
    T* const ones = pieces.take(kChunk);
    std::fill_n(ones, kChunk, T(1));
    Pieces<T> kept(state ? state.as<T>() + index * extents.state() : own);
    T* const sums = kept.take(extents.sums);          // [m, wide], of the chunks that are complete
    T* const totals = kept.take(extents.totals);      // [m], of their features
    T* const chunk_keys = kept.take(m * kChunk);      // [m, kChunk], the features of this chunk's keys
    T* const chunk_values = kept.take(extents.rows);  // [kChunk, wide]
    if (shape.first == 0) {
      std::fill_n(sums, extents.sums, T(0));
      std::fill_n(totals, extents.totals, T(0));
      std::fill_n(chunk_keys, m * kChunk, T(0));
    }
    for (std::int64_t row = 0; row < shape.seq;) {
      const std::int64_t position = shape.first + row, at = position % kChunk;
      const std::int64_t n = std::min(kChunk - at, shape.seq - row);
      const bool has_sums = position >= kChunk;
      map.apply(Role::query, position, n, queries.from(row), fq);
      map.apply(Role::key, position, n, keys.from(row), fk);
      for (std::int64_t j = 0; j < n; ++j) {
        for (std::int64_t r = 0; r < m; ++r) chunk_keys[r * kChunk + at + j] = fk[j * f_row + r];
      }
      copy_rows<T>(values.from(row), n, d, chunk_values + at * extents.wide, extents.wide);
      weights_of<T>(n, at, m, {fq, f_row, 1}, {chunk_keys, kChunk}, w);
      if (has_sums) {
        product<T>(n, m, d, {fq, f_row, 1}, {sums, extents.wide}, GradMode::overwrite, y, extents.wide);
      }
      mix<T>(n, at, d, w, chunk_values, extents.wide, has_sums ? GradMode::accumulate : GradMode::overwrite, y,
             extents.wide);
      for (std::int64_t i = 0; i < n; ++i) {
        T sum = passes.dot(w + i * kWeightsRow, ones, at + i + 1);
        if (has_sums) sum += passes.dot(fq + i * f_row, totals, m);
        passes.scale(T(1) / map.floored(sum), y + i * extents.wide, d, outputs.at(row + i));
        if (den) den.as<T>()[(b * shape.seq + row + i) * shape.heads + h] = sum;
      }
      row += n;
      if (at + n < kChunk || (row == shape.seq && !state)) continue;
      product<T>(m, kChunk, d, {chunk_keys, kChunk, 1}, {chunk_values, extents.wide}, GradMode::accumulate, sums,
                 extents.wide);
      for (std::int64_t r = 0; r < m; ++r) totals[r] += passes.dot(chunk_keys + r * kChunk, ones, kChunk);
    }
  });
}

template <class T>
void linear_attention_backward(const LinearShape& shape, const FeatureMap& features, ConstTensorView q,
                               ConstTensorView k, ConstTensorView v, ConstTensorView out, ConstTensorView den,
                               ConstTensorView dout, TensorView dq, TensorView dk, TensorView dv,
                               TensorView workspace) {
  const std::int64_t d = q.columns() / shape.heads, m = features.count, f_row = features_row(m), seq = shape.seq;
  const Extents extents(d, m, seq);
  const std::int64_t wide = extents.wide;
  const Map<T> map(features, d);
  const RowPasses<T>& passes = row_passes<T>();
  T* const scratch = workspace.as<T>();

  parallel_blocks(shape.batch * shape.heads, [&](std::int64_t index) {
    const std::int64_t b = index / shape.heads, h = index % shape.heads;
    const auto head = [&](const auto& view, std::int64_t row) { return head_of<T>(view, b * seq + row, h * d); };
    Pieces<T> pieces(scratch + omp_get_thread_num() * extents.backward());
    T* const sums = pieces.take(extents.chunks * extents.sums);  // before each chunk
    T* const totals = pieces.take(extents.chunks * extents.totals);
    T* const fq = pieces.take(extents.features);
    T* const fk = pieces.take(extents.features);
    T* const dfq = pieces.take(extents.features);
    T* const dfk = pieces.take(extents.features);
    T* const keys_transposed = pieces.take(padded(kChunk) * m);
    T* const w = pieces.take(extents.weights);
    T* const dw = pieces.take(extents.weights);
    T* const values = pieces.take(extents.rows);
    T* const g = pieces.take(extents.rows);  // dout / den, the gradient of sum_j w_ij v_j
    T* const dx = pieces.take(extents.rows);
    T* const values_transposed = pieces.take(padded(kChunk) * d);
    T* const sums_transposed = pieces.take(padded(m) * d);
    T* const dsums = pieces.take(extents.sums);  // by the queries of later chunks
    T* const dtotals = pieces.take(extents.totals);
    T* const table = pieces.take(wide * m);
    T* const ones = pieces.take(kChunk);
    std::fill_n(ones, kChunk, T(1));
    std::fill_n(sums, extents.sums, T(0));
    std::fill_n(totals, extents.totals, T(0));
    std::fill_n(dsums, extents.sums, T(0));
    std::fill_n(dtotals, extents.totals, T(0));
    map.transpose_table(table);

    for (std::int64_t c = 0; c + 1 < extents.chunks; ++c) {
      const std::int64_t row = c * kChunk;
      T* const next = sums + (c + 1) * extents.sums;
      T* const next_totals = totals + (c + 1) * extents.totals;
      map.apply(Role::key, row, kChunk, head(k, row), fk);
      copy_rows<T>(head(v, row), kChunk, d, values, wide);
      std::copy_n(sums + c * extents.sums, extents.sums, next);
      std::copy_n(totals + c * extents.totals, extents.totals, next_totals);
      product<T>(m, kChunk, d, {fk, 1, f_row}, {values, wide}, GradMode::accumulate, next, wide);
      for (std::int64_t j = 0; j < kChunk; ++j) {
        for (std::int64_t r = 0; r < m; ++r) next_totals[r] += fk[j * f_row + r];
      }
    }
    for (std::int64_t c = extents.chunks - 1; c >= 0; --c) {
      const std::int64_t row = c * kChunk, n = std::min(kChunk, seq - row);
      const bool has_sums = c > 0, has_later = c + 1 < extents.chunks;
      const T* const before = sums + c * extents.sums;
      const T* const totals_before = totals + c * extents.totals;
      T dden[kChunk];
      map.apply(Role::query, row, n, head(q, row), fq);
      map.apply(Role::key, row, n, head(k, row), fk);
      copy_rows<T>(head(v, row), n, d, values, wide);
      copy_rows<T>(head(dout, row), n, d, g, wide);
      for (std::int64_t i = 0; i < n; ++i) {
        const T sum = den.as<T>()[(b * seq + row + i) * shape.heads + h], floored = map.floored(sum);
        dden[i] = sum < floored ? T(0) : -passes.dot(g + i * wide, head(out, row).at(i), d) / floored;
        passes.scale(T(1) / floored, g + i * wide, d, g + i * wide);
      }
      weights_of<T>(n, 0, m, {fq, f_row, 1}, transposed(fk, f_row, n, m, keys_transposed), w);
      weights_of<T>(n, 0, d, {g, wide, 1}, transposed(values, wide, n, d, values_transposed), dw);
      for (std::int64_t i = 0; i < n; ++i) {
        for (std::int64_t j = 0; j <= i; ++j) dw[i * kWeightsRow + j] += dden[i];
      }

      if (has_sums) {
        product<T>(n, d, m, {g, wide, 1}, transposed(before, wide, m, d, sums_transposed), GradMode::overwrite, dfq,
                   f_row);
        for (std::int64_t i = 0; i < n; ++i) {
          for (std::int64_t r = 0; r < m; ++r) dfq[i * f_row + r] += dden[i] * totals_before[r];
        }
      }
      mix<T>(n, 0, m, dw, fk, f_row, has_sums ? GradMode::accumulate : GradMode::overwrite, dfq, f_row);
      mix_transposed<T>(n, m, dw, fq, f_row, dfk, f_row);
      mix_transposed<T>(n, d, w, g, wide, dx, wide);
      if (has_later) {
        product<T>(n, d, m, {values, wide, 1}, transposed(dsums, wide, m, d, sums_transposed), GradMode::accumulate,
                   dfk, f_row);
        for (std::int64_t j = 0; j < n; ++j) {
          for (std::int64_t r = 0; r < m; ++r) dfk[j * f_row + r] += dtotals[r];
        }
        product<T>(n, m, d, {fk, f_row, 1}, {dsums, wide}, GradMode::accumulate, dx, wide);
      }
      const auto to_values = head(dv, row);
      for (std::int64_t j = 0; j < n; ++j) std::copy_n(dx + j * wide, d, to_values.at(j));
      product<T>(m, n, d, {fq, 1, f_row}, {g, wide}, GradMode::accumulate, dsums, wide);
      for (std::int64_t i = 0; i < n; ++i) {
        for (std::int64_t r = 0; r < m; ++r) dtotals[r] += dden[i] * fq[i * f_row + r];
      }
      map.backward(Role::query, row, n, head(q, row), fq, dfq, table, dx, head(dq, row));
      map.backward(Role::key, row, n, head(k, row), fk, dfk, table, dx, head(dk, row));
    }
  });
}

std::int64_t linear_attention_state(std::int64_t head_dim, std::int64_t features) {
  return Extents(head_dim, features, 1).state();
}

std::int64_t linear_attention_workspace_per_thread(const LinearShape& shape, std::int64_t head_dim,
                                                   std::int64_t features, LinearPass pass) {
  const Extents extents(head_dim, features, shape.seq);
  return pass == LinearPass::forward ? extents.forward() : extents.backward();
}

#define TFORGE_INSTANTIATE(T)                                                                                         \
  template void orthogonal_features<T>(std::uint64_t, std::string_view, std::int64_t, TensorView);                    \
  template void cosine_features<T>(TensorView);                                                                       \
  template void linear_attention_forward<T>(const LinearShape&, const FeatureMap&, ConstTensorView, ConstTensorView,  \
                                            ConstTensorView, TensorView, TensorView, TensorView, TensorView);         \
  template void linear_attention_backward<T>(const LinearShape&, const FeatureMap&, ConstTensorView, ConstTensorView, \
                                             ConstTensorView, ConstTensorView, ConstTensorView, ConstTensorView,      \
                                             TensorView, TensorView, TensorView, TensorView)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cpu
