#include "autograd/ops/memory_layer.h"

#include <array>

#include "autograd/shard_parts.h"
#include "core/errors.h"
#include "kernels/elementwise.h"

namespace tforge {

namespace {

ConstTensorView view(const Tensor& t) { return t.view(); }

/// The tables of one shard among those held here.
struct TableRange {
  std::int64_t first, count;
};
TableRange tables_of(const RowShards& shards, std::int64_t s, std::int64_t rows_here, std::int64_t bits) {
  const RowShards::Range range = shards.range(s, rows_here);
  return {range.first >> bits, range.rows >> bits};
}

kernels::MemoryHash hash_of(const MemoryHashing& hash, const TableRange& tables) {
  return {hash.weight, hash.temperature, hash.weight_bits,
          view(hash.coordinates).column_range(tables.first, tables.count)};
}

struct MemoryLayerNode final : Node {
  struct Layer {
    Tensor tables;
    RowShards shards;
    Grad dtables, dbias;
  };

  MemoryLayerNode(Tape& tape, const Var& input, const MemoryHashing& hash_, std::span<const MemoryTables> group,
                  Tensor codes_, Tensor weights_, Reducer& reducer_)
      : hash(hash_),
        reducer(reducer_),
        saved_x(tape, input.value()),
        codes(std::move(codes_)),
        weights(std::move(weights_)),
        dx(use(input)),
        count(group.size()) {
    for (std::size_t g = 0; g < count; ++g)
      layers[g] = {group[g].tables.value(), group[g].shards, use(group[g].tables), use(group[g].bias)};
  }

  void backward(Tape& tape) override {
    Stream& stream = tape.stream();
    const std::int64_t rows = codes.shape().rows(), tables = codes.shape().columns();
    const std::int64_t bits = hash.coordinates.shape().rows();
    const ConstTensorView gradient = dy().read();
    std::array<kernels::MemoryBackward, kMaxMemoryGroup> group;
    std::int64_t column = 0;
    for (std::size_t g = 0; g < count; ++g) {
      Layer& l = layers[g];
      const std::int64_t columns = l.tables.shape().columns();
      const GradTarget to = l.dtables ? l.dtables.target(tape) : GradTarget{{}, GradMode::overwrite};
      group[g] = {view(l.tables), gradient.column_range(column, columns), to.mode, to.view};
      if (l.dbias) {
        const GradTarget to_bias = l.dbias.target(tape);
        kernels::column_sums(stream, group[g].dy, to_bias.mode, to_bias.view);
      }
      column += columns;
    }
    Tensor dweights;
    if (dx) dweights = tape.empty(Shape{tables, rows}, weights.dtype());
    {
      Tensor order = tape.empty(Shape{kernels::memory_lookup_workspace(rows, bits, tables, stream.device())},
                                DType::i32, Purpose::workspace);
      kernels::memory_lookup_backward(stream, bits, view(codes), view(weights), std::span(group).first(count),
                                      dweights ? dweights.view() : TensorView{}, order.view());
    }
    if (!dx) return;

    const Tensor x = saved_x.load(tape);
    const RowShards& shards = layers[0].shards;
    add_input_gradient(
        tape, dx, reducer, shards.count(), x.shape(), x.dtype(), [&](std::int64_t s, const GradTarget& to) {
          const TableRange part = tables_of(shards, s, layers[0].tables.shape().rows(), bits);
          kernels::memory_hash_backward(stream, hash_of(hash, part), view(x),
                                        view(dweights).row_range(part.first, part.count), to.mode, to.view);
        });
  }

  MemoryHashing hash;
  Reducer& reducer;
  Saved saved_x;
  Tensor codes, weights;
  Grad dx;
  std::size_t count;
  std::array<Layer, kMaxMemoryGroup> layers;
};

}  // namespace

Var memory_layer(Tape& tape, const Var& x, const MemoryHashing& hash, std::span<const MemoryTables> layers,
                 Reducer& reducer, BiasShare share) {
  if (layers.empty() || layers.size() > kMaxMemoryGroup) {
    throw ShapeError("memory_layer: {} layers in a group, want 1 to {}", layers.size(), kMaxMemoryGroup);
  }
  Stream& stream = tape.stream();
  const std::int64_t rows = x.shape().rows();
  const std::int64_t bits = hash.coordinates.shape().rows(), tables = hash.coordinates.shape().columns();
  const std::int64_t shards = layers[0].shards.count();
  std::int64_t columns = 0;
  for (const MemoryTables& l : layers) {
    if (l.tables.shape().rows() != tables << bits) {
      throw ShapeError("memory_layer: {} rows of tables for {} tables of {} bits", l.tables.shape().rows(), tables,
                       bits);
    }
    if (l.shards.count() != shards || (shards > 1 && !reducer.by_shard())) {
      throw ShapeError("memory_layer: {} and {} shards of layers in a group", shards, l.shards.count());
    }
    columns += l.tables.shape().columns();
  }
  Tensor codes = tape.empty(Shape{rows, tables}, DType::i32);
  Tensor weights = tape.empty(Shape{rows, tables}, x.dtype());
  kernels::memory_hash_forward(stream, hash_of(hash, {0, tables}), x.view(), codes.view(), weights.view());

  ShardParts parts(tape, reducer, shards, Shape{rows, columns}, x.dtype());
  for (std::int64_t s = 0; s < shards; ++s) {
    const TableRange part = tables_of(layers[0].shards, s, tables << bits, bits);
    std::array<kernels::MemoryForward, kMaxMemoryGroup> group;
    std::int64_t column = 0;
    for (std::size_t g = 0; g < layers.size(); ++g) {
      const std::int64_t width = layers[g].tables.shape().columns();
      group[g] = {layers[g].tables.view().row_range(part.first << bits, part.count << bits),
                  parts.part(s).column_range(column, width)};
      column += width;
    }
    kernels::memory_lookup_forward(stream, bits, view(codes).column_range(part.first, part.count),
                                   view(weights).column_range(part.first, part.count),
                                   std::span(group).first(layers.size()));
  }
  auto* node = tape.record<MemoryLayerNode>(tape, x, hash, layers, std::move(codes), std::move(weights), reducer);
  Tensor y = parts.total();
  if (reducer.by_shard() || share == BiasShare::added_here) {
    std::int64_t column = 0;
    for (const MemoryTables& l : layers) {
      const std::int64_t width = l.tables.shape().columns();
      if (l.bias) kernels::add_row(stream, l.bias.view(), y.view().column_range(column, width));
      column += width;
    }
  }
  return tape.output(std::move(y), node);
}

}  // namespace tforge
