// Causal attention of one head at a time. Queries go in blocks of kBlock rows; a block's scores against the keys it
// sees lie in a [kBlock, keys] buffer that stays in L2, so a row's softmax needs no rescaling.
//
// All products run through the tiles of tile.h. An element of a product is a sum of chains of multiply-adds of kDepth
// keys each, from key 0 on, whatever the number of rows: a row's bits do not depend on the rows it is computed with,
// which makes generation from a cache equal to the full pass. Keys that a row does not see have probability 0 and leave
// a chain as it is.
#include "kernels/cpu/attention.h"

#include <omp.h>

#include <algorithm>
#include <cmath>

#include "kernels/cpu/head_products.h"
#include "kernels/cpu/packing.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/row_passes.h"
#include "kernels/cpu/tile.h"

namespace tforge::kernels::cpu {
namespace {

constexpr std::int64_t kBlock = 2 * kTileRows;  // query rows of a block
constexpr std::int64_t kDepth = 256;            // keys of a chain

/// Extents of the workspace of one thread, in elements.
struct Extents {
  std::int64_t transposed, packed, scores_row, scores, rows;
  Extents(const AttentionShape& shape, std::int64_t head_dim)
      : transposed(padded(shape.kv_seq) * padded(head_dim)),
        packed(padded(shape.kv_seq) * padded(head_dim)),
        scores_row(padded(shape.kv_seq) + kPad),  // never a power of two: walks down a column would share a cache set
        scores(kBlock * scores_row),
        rows(kBlock * padded(head_dim)) {}
  std::int64_t forward() const { return transposed + packed + scores + rows; }
  std::int64_t backward() const { return 2 * transposed + 3 * packed + 2 * scores + 3 * rows; }
};

/// scores[i, j] = x[i] . y[j] for the rows [row, row + m) of a block and the keys of one panel, where a row sees them:
/// row i sees the keys 0 .. seen + i.
template <class T>
void panel_of_scores(const T* x, std::int64_t x_row, std::int64_t m, std::int64_t seen, std::int64_t head_dim,
                     const T* panel, std::int64_t first_key, T* scores, std::int64_t scores_row) {
  const std::int64_t first = std::max<std::int64_t>(0, first_key - seen) / kTileRows * kTileRows;
  for (std::int64_t i = first; i < m; i += kTileRows) {
    tile<T>(std::min(kTileRows, m - i), head_dim, {x + i * x_row, x_row, 1}, {panel, kPanelColumns<T>},
            GradMode::overwrite, scores + i * scores_row + first_key, scores_row);
  }
}

/// y [m, padded head_dim] = p v, summed over the keys that each row sees.
template <class T>
void mix(const T* p, std::int64_t p_row, std::int64_t m, std::int64_t seen, std::int64_t head_dim, Panel<T> v,
         std::int64_t v_panel, T* y, std::int64_t y_row) {
  for (std::int64_t k = 0; k < seen + m; k += kDepth) {
    for (std::int64_t c = 0; c < head_dim; c += kPanelColumns<T>) {
      const Panel<T> panel{v.data + c / kPanelColumns<T> * v_panel + k * v.row, v.row};
      for (std::int64_t i = 0; i < m; i += kTileRows) {
        const std::int64_t rows = std::min(kTileRows, m - i);
        const std::int64_t depth = std::min(kDepth, seen + i + rows - k);
        if (depth <= 0) continue;
        tile<T>(rows, depth, {p + i * p_row + k, p_row, 1}, panel, k == 0 ? GradMode::overwrite : GradMode::accumulate,
                y + i * y_row + c, y_row);
      }
    }
  }
}

}  // namespace

template <class T>
void causal_attention_forward(const AttentionShape& shape, ConstTensorView q, ConstTensorView k, ConstTensorView v,
                              TensorView out, TensorView lse, TensorView workspace) {
  const std::int64_t head_dim = q.columns() / shape.heads;
  const std::int64_t wide = padded(head_dim);
  const std::int64_t earlier = shape.kv_seq - shape.q_seq;  // keys before the first query's own
  const Extents extents(shape, head_dim);
  const T scale = static_cast<T>(1 / std::sqrt(static_cast<double>(head_dim)));
  // With one block of queries a packed operand is used once: keys are packed panel by panel in one place, and values
  // are read where they lie when their columns fill whole panels.
  const bool one_block = shape.q_seq <= kBlock;
  const bool values_in_place = one_block && head_dim % kPanelColumns<T> == 0;
  T* const scratch = workspace.as<T>();
  T* const lses = lse ? lse.as<T>() : nullptr;
  const RowPasses<T>& passes = row_passes<T>();

  parallel_blocks(shape.batch * shape.heads, [&](std::int64_t index) {
    const std::int64_t b = index / shape.heads;
    const std::int64_t column = index % shape.heads * head_dim;
    const auto queries = head_of<T>(q, b * shape.q_seq, column);
    const auto keys = head_of<T>(k, b * shape.kv_stride, column);
    const auto values = head_of<T>(v, b * shape.kv_stride, column);
    const auto outputs = head_of<T>(out, b * shape.q_seq, column);
    Pieces<T> pieces(scratch + omp_get_thread_num() * extents.forward());
    T* const key_panels = pieces.take(extents.transposed);
    T* const value_panels = pieces.take(extents.packed);
    T* const scores = pieces.take(extents.scores);
    T* const y = pieces.take(extents.rows);
    std::int64_t keys_packed = 0, values_packed = 0;
    for (std::int64_t row = 0; row < shape.q_seq; row += kBlock) {
      const std::int64_t m = std::min(kBlock, shape.q_seq - row);
      const std::int64_t seen = earlier + row;  // row i of the block sees the keys 0 .. seen + i
      for (std::int64_t j = 0; j < seen + m; j += kPanelColumns<T>) {
        T* const panel = key_panels + (one_block ? 0 : j * head_dim);
        if (j >= keys_packed) {
          pack_transposed_panel(keys.data, keys.row, j, shape.kv_seq, head_dim, panel);
          keys_packed = j + kPanelColumns<T>;
        }
        panel_of_scores<T>(queries.data + row * queries.row, queries.row, m, seen, head_dim, panel, j, scores,
                           extents.scores_row);
      }
      if (!values_in_place) {
        pack_rows(values.data + values_packed * values.row, values.row, values_packed, seen + m - values_packed,
                  shape.kv_seq, head_dim, value_panels);
        values_packed = seen + m;
      }
      Softmax<T> softmax[kBlock];
      for (std::int64_t i = 0; i < m; ++i) {
        const std::int64_t count = seen + i + 1;
        softmax[i] = passes.exponentials(scores + i * extents.scores_row, count, count + kTileRows - 1, scale);
      }
      if (values_in_place) {
        mix<T>(scores, extents.scores_row, m, seen, head_dim, {values.data, values.row}, kPanelColumns<T>, y, wide);
      } else {
        mix<T>(scores, extents.scores_row, m, seen, head_dim, {value_panels, kPanelColumns<T>},
               shape.kv_seq * kPanelColumns<T>, y, wide);
      }
      for (std::int64_t i = 0; i < m; ++i) {
        passes.scale(T(1) / softmax[i].sum, y + i * wide, head_dim, outputs.data + (row + i) * outputs.row);
        if (lses != nullptr) {
          lses[(b * shape.q_seq + row + i) * shape.heads + index % shape.heads] =
              softmax[i].max + std::log(softmax[i].sum);
        }
      }
    }
  });
}

template <class T>
void causal_attention_backward(const AttentionShape& shape, ConstTensorView q, ConstTensorView k, ConstTensorView v,
                               ConstTensorView out, ConstTensorView lse, ConstTensorView dout, TensorView dq,
                               TensorView dk, TensorView dv, TensorView workspace) {
  const std::int64_t head_dim = q.columns() / shape.heads;
  const std::int64_t wide = padded(head_dim);
  const std::int64_t seq = shape.kv_seq;
  const std::int64_t earlier = seq - shape.q_seq;  // keys before the first query's own
  const Extents extents(shape, head_dim);
  const T scale = static_cast<T>(1 / std::sqrt(static_cast<double>(head_dim)));
  T* const scratch = workspace.as<T>();
  const RowPasses<T>& passes = row_passes<T>();

  parallel_blocks(shape.batch * shape.heads, [&](std::int64_t index) {
    const std::int64_t b = index / shape.heads;
    const std::int64_t h = index % shape.heads;
    const auto head = [&](const auto& view, std::int64_t stride) { return head_of<T>(view, b * stride, h * head_dim); };
    const auto queries = head(q, shape.q_seq), keys = head(k, shape.kv_stride), values = head(v, shape.kv_stride);
    const auto outputs = head(out, shape.q_seq), gradients = head(dout, shape.q_seq);
    Pieces<T> pieces(scratch + omp_get_thread_num() * extents.backward());
    T* const key_panels = pieces.take(extents.transposed);    // of K^T
    T* const value_panels = pieces.take(extents.transposed);  // of V^T
    T* const key_rows = pieces.take(extents.packed);
    T* const dkeys = pieces.take(extents.packed);
    T* const dvalues = pieces.take(extents.packed);
    T* const p = pieces.take(extents.scores);
    T* const ds = pieces.take(extents.scores);
    T* const query_rows = pieces.take(extents.rows);
    T* const gradient_rows = pieces.take(extents.rows);
    T* const dqueries = pieces.take(extents.rows);
    for (std::int64_t j = 0; j < seq; j += kPanelColumns<T>) {
      pack_transposed_panel(keys.data, keys.row, j, seq, head_dim, key_panels + j * head_dim);
      pack_transposed_panel(values.data, values.row, j, seq, head_dim, value_panels + j * head_dim);
    }
    pack_rows(keys.data, keys.row, 0, seq, seq, head_dim, key_rows);
    std::fill_n(dkeys, seq * wide, T(0));
    std::fill_n(dvalues, seq * wide, T(0));

    for (std::int64_t row = 0; row < shape.q_seq; row += kBlock) {
      const std::int64_t m = std::min(kBlock, shape.q_seq - row);
      const std::int64_t seen = earlier + row;  // row i of the block sees the keys 0 .. seen + i
      const T* const x = queries.data + row * queries.row;
      const T* const dy = gradients.data + row * gradients.row;
      for (std::int64_t j = 0; j < seen + m; j += kPanelColumns<T>) {
        panel_of_scores<T>(x, queries.row, m, seen, head_dim, key_panels + j * head_dim, j, p, extents.scores_row);
        panel_of_scores<T>(dy, gradients.row, m, seen, head_dim, value_panels + j * head_dim, j, ds,
                           extents.scores_row);
      }
      for (std::int64_t i = 0; i < m; ++i) {
        // sum_j P_j dP_j = <dout, out>
        const T* const y = outputs.data + (row + i) * outputs.row;
        const T dot = passes.dot(dy + i * gradients.row, y, head_dim);
        const std::int64_t count = seen + i + 1;
        passes.score_gradients(p + i * extents.scores_row, ds + i * extents.scores_row, count, count + kTileRows - 1,
                               scale, lse.as<T>()[(b * shape.q_seq + row + i) * shape.heads + h], dot);
      }
      mix<T>(ds, extents.scores_row, m, seen, head_dim, {key_rows, kPanelColumns<T>}, seq * kPanelColumns<T>, dqueries,
             wide);
      const auto to = head(dq, shape.q_seq);
      for (std::int64_t i = 0; i < m; ++i) {
        passes.scale(scale, dqueries + i * wide, head_dim, to.data + (row + i) * to.row);
      }
      // Keys gather over the rows of the block that see them, from `first` on.
      pack_rows(x, queries.row, 0, m, kBlock, head_dim, query_rows);
      pack_rows(dy, gradients.row, 0, m, kBlock, head_dim, gradient_rows);
      for (std::int64_t c = 0; c < head_dim; c += kPanelColumns<T>) {
        for (std::int64_t j = 0; j < seen + m; j += kTileRows) {
          const std::int64_t count = std::min(kTileRows, seen + m - j);
          const std::int64_t first = std::max<std::int64_t>(0, j - seen);
          const std::int64_t at = first * extents.scores_row + j;
          const std::int64_t panel = c * kBlock + first * kPanelColumns<T>;
          tile<T>(count, m - first, {ds + at, 1, extents.scores_row}, {query_rows + panel, kPanelColumns<T>},
                  GradMode::accumulate, dkeys + j * wide + c, wide);
          tile<T>(count, m - first, {p + at, 1, extents.scores_row}, {gradient_rows + panel, kPanelColumns<T>},
                  GradMode::accumulate, dvalues + j * wide + c, wide);
        }
      }
    }
    const auto to_k = head(dk, shape.kv_stride), to_v = head(dv, shape.kv_stride);
    for (std::int64_t j = 0; j < seq; ++j) {
      passes.scale(scale, dkeys + j * wide, head_dim, to_k.data + j * to_k.row);
      std::copy_n(dvalues + j * wide, head_dim, to_v.data + j * to_v.row);
    }
  });
}

std::int64_t attention_workspace_per_thread(const AttentionShape& shape, std::int64_t head_dim) {
  const Extents extents(shape, head_dim);
  return shape.q_seq == shape.kv_seq ? extents.backward() : extents.forward();
}

#define TFORGE_INSTANTIATE(T)                                                                                          \
  template void causal_attention_forward<T>(const AttentionShape&, ConstTensorView, ConstTensorView, ConstTensorView,  \
                                            TensorView, TensorView, TensorView);                                       \
  template void causal_attention_backward<T>(const AttentionShape&, ConstTensorView, ConstTensorView, ConstTensorView, \
                                             ConstTensorView, ConstTensorView, ConstTensorView, TensorView,            \
                                             TensorView, TensorView, TensorView)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cpu
