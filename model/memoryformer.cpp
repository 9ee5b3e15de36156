#include "model/memoryformer.h"

#include <algorithm>
#include <cmath>

#include "autograd/ops/layer_norm.h"
#include "core/errors.h"
#include "core/rng.h"
#include "parallel/ops/gather_columns.h"
#include "parallel/ops/reduce_scatter_columns.h"
#include "parallel/ops/split_columns.h"

namespace tforge {

MemoryShape memory_shape(const ModelConfig& config, MemoryGroup group) {
  const auto g = static_cast<std::size_t>(group);
  const auto chunk = [&](std::size_t of) {
    return config.chunk_bits[of] > 0 ? config.chunk_bits[of] : config.hash_bits[of];
  };
  constexpr auto kIn = static_cast<std::size_t>(MemoryGroup::ffn_in);
  constexpr auto kOut = static_cast<std::size_t>(MemoryGroup::ffn_out);
  const std::int64_t width = config.memory_width > 0 ? config.memory_width : config.dim / chunk(kIn) * chunk(kOut);
  MemoryShape s;
  s.d_in = group == MemoryGroup::ffn_out ? width : config.dim;
  s.d_out = group == MemoryGroup::ffn_in ? width : config.dim;
  s.bits = config.hash_bits[g];
  s.chunk_bits = chunk(g);
  s.weight_bits = config.weight_bits[g] > 0 ? config.weight_bits[g] : s.bits;
  s.chunks = s.d_in / s.chunk_bits;
  s.tables = config.tables[g] > 0 ? config.tables[g] : s.chunks;
  return s;
}

StatePermutations born_permutations(const ModelConfig& config, MemoryGroup group) {
  const MemoryShape s = memory_shape(config, group);
  StatePermutations born{fmt::format("hash/{}", name_of(group)), s.d_in, {}};
  for (std::int64_t number = 1; number * s.chunks < s.tables; ++number) {
    const Permutation permutation(static_cast<std::uint64_t>(config.table_seed),
                                  fmt::format("tables.{}.{}", name_of(group), number),
                                  static_cast<std::uint64_t>(s.d_in));
    for (std::uint64_t i = 0; i < permutation.size(); ++i) {
      born.values.push_back(static_cast<std::int32_t>(permutation(i)));
    }
  }
  return born;
}

std::vector<std::int32_t> memory_coordinates(const ModelConfig& config, MemoryGroup group,
                                             const StatePermutations& others, std::int64_t first, std::int64_t count) {
  const MemoryShape s = memory_shape(config, group);
  std::vector<std::int32_t> coordinates(static_cast<std::size_t>(s.bits * count));
  for (std::int64_t k = first; k < first + count; ++k) {
    const std::int64_t number = k / s.chunks;
    for (std::int64_t i = 0; i < s.bits; ++i) {
      const std::int64_t at = (k % s.chunks * s.chunk_bits + i) % s.d_in;
      coordinates[static_cast<std::size_t>(i * count + k - first)] =
          number == 0 ? static_cast<std::int32_t>(at)
                      : others.values[static_cast<std::size_t>((number - 1) * s.d_in + at)];
    }
  }
  return coordinates;
}

MemoryFormer::MemoryFormer(const ModelPlace& place) : LanguageModel(place) {
  for (const MemoryGroup group : kMemoryGroups) {
    const auto g = static_cast<std::size_t>(group);
    const MemoryShape s = memory_shape(config(), group);
    permutations_[g] = born_permutations(config(), group);
    hashes_[g] = {config().hash_weight, config().temperature, s.weight_bits, {}};
    look_through_permutations(group);
    if (!plan().shards) continue;
    rows_[g] = plan().shards->units[g];
    for (std::int64_t& border : rows_[g].borders) border <<= s.bits;
  }
  for (std::int64_t layer = 0; layer < config().layers; ++layer) {
    const auto path = [layer](const char* name) { return fmt::format("layers.{}.{}", layer, name); };
    const auto tables = [&](const char* name, MemoryGroup group) {
      return MemoryTables{parameter(path(name) + ".tables"),
                          config().biases == Biases::all ? parameter(path(name) + ".bias") : Var(), shards_here(group)};
    };
    layers_.push_back(
        {.attention_place = path("attention"),
         .ffn_place = path("ffn"),
         .attention_norm = norm_at(path("attention.norm")),
         .ffn_norm = norm_at(path("ffn.norm")),
         .inner_norm = {parameter(path("ffn.inner_norm.weight")), parameter(path("ffn.inner_norm.bias"))},
         .qkv = {tables("attention.query", MemoryGroup::attention), tables("attention.key", MemoryGroup::attention),
                 tables("attention.value", MemoryGroup::attention)},
         .in = tables("ffn.in", MemoryGroup::ffn_in),
         .out = tables("ffn.out", MemoryGroup::ffn_out)});
  }
  qkv_columns_.groups = {head_columns(), head_columns(), head_columns()};
  heads_.groups = {head_columns()};
}

void MemoryFormer::look_through_permutations(MemoryGroup group) {
  const auto g = static_cast<std::size_t>(group);
  const std::int64_t count = plan().units[g].count(tp_rank());
  const std::vector<std::int32_t> coordinates =
      memory_coordinates(config(), group, permutations_[g], plan().units[g].begin(tp_rank()), count);
  Tensor& tensor = hashes_[g].coordinates;
  tensor = Tensor();  // whose memory the new one takes
  tensor = Tensor::of<std::int32_t>(allocator(), Shape{memory_shape(config(), group).bits, count}, coordinates,
                                    Purpose::weights);
}

void MemoryFormer::set_state_permutations(const StatePermutations& first) {
  for (const MemoryGroup group : kMemoryGroups) {
    StatePermutations& here = permutations_[static_cast<std::size_t>(group)];
    if (first.path != here.path || first.columns != here.columns || first.values.size() > here.values.size()) continue;
    std::ranges::copy(first.values, here.values.begin());
    return look_through_permutations(group);
  }
  LanguageModel::set_state_permutations(first);
}

RowShards MemoryFormer::shards_here(MemoryGroup group) const {
  if (!plan().shards) return {};
  return row_shards(rows_[static_cast<std::size_t>(group)], plan().shards->deal, tp_rank());
}

LanguageModel::Birth MemoryFormer::birth(std::string_view path) const {
  if (path.ends_with("norm.weight")) return {1.0, 0.0};
  if (path.ends_with("norm.bias")) return {0.0, 0.0};
  if (path.ends_with(".bias")) return {0.0, 0.001};
  if (!path.ends_with(".tables")) return {0.0, 0.02};
  const bool attention = path.find(".attention.") != std::string_view::npos;
  const MemoryGroup group = attention                      ? MemoryGroup::attention
                            : path.ends_with(".in.tables") ? MemoryGroup::ffn_in
                                                           : MemoryGroup::ffn_out;
  const double deviation = attention ? std::sqrt(0.4 / static_cast<double>(config().dim)) : 0.02;
  const auto bits = static_cast<double>(memory_shape(config(), group).weight_bits);
  return {0.0, config().hash_weight == HashWeight::p ? deviation * bits : deviation};
}

Var MemoryFormer::memory(Tape& tape, const Var& x, MemoryGroup group, std::span<const MemoryTables> layers) {
  // What is added up over the ranks takes the biases from the first of them.
  const BiasShare share = tp_rank() == 0 ? BiasShare::added_here : BiasShare::added_elsewhere;
  return memory_layer(tape, x, hash(group), layers, reducer(), share);
}

Var MemoryFormer::attention_input(Tape& tape, const Var& h, std::int64_t layer) {
  set_place(of(layer).attention_place);
  const Var u = shared(tape, normalised(tape, h, of(layer).attention_norm));
  const Var qkv = memory(tape, u, MemoryGroup::attention, of(layer).qkv);
  return reducer().by_shard() ? split_columns(tape, qkv, qkv_columns_, tp())
                              : reduce_scatter_columns(tape, qkv, qkv_columns_, tp());
}

Var MemoryFormer::attention_output(Tape& tape, Var heads, std::int64_t) {
  return gather_columns(tape, heads, heads_, tp(), Incoming::complete);
}

Var MemoryFormer::feed_forward(Tape& tape, const Var& h, std::int64_t layer) {
  set_place(of(layer).ffn_place);
  const Layer& l = of(layer);
  const Var w = shared(tape, normalised(tape, h, l.ffn_norm));
  Var inner = completed(tape, memory(tape, w, MemoryGroup::ffn_in, {&l.in, 1}));
  inner = layer_norm(tape, inner, l.inner_norm.weight, l.inner_norm.bias, config().layernorm_eps);
  return completed(tape, memory(tape, shared(tape, inner), MemoryGroup::ffn_out, {&l.out, 1}));
}

}  // namespace tforge
