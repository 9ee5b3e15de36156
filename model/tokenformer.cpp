#include "model/tokenformer.h"

#include <cmath>

#include "autograd/ops/layer_norm.h"
#include "core/errors.h"
#include "parallel/ops/reduce_scatter_columns.h"
#include "parallel/ops/split_columns.h"

namespace tforge {

std::string TokenFormer::layer_path(std::int64_t layer, TokenGroup group) {
  return group == TokenGroup::ffn ? fmt::format("layers.{}.ffn", layer)
                                  : fmt::format("layers.{}.attention.{}", layer, name_of(group));
}

double TokenFormer::value_deviation(const ModelConfig& config) {
  return 2.0 / (static_cast<double>(config.layers) * std::sqrt(static_cast<double>(config.dim)));
}

TokenFormer::TokenFormer(const ModelPlace& place) : LanguageModel(place) {
  layers_.resize(static_cast<std::size_t>(config().layers));
  for (std::int64_t layer = 0; layer < config().layers; ++layer) {
    for (const TokenGroup group : kTokenGroups) {
      const auto g = static_cast<std::size_t>(group);
      const std::string path = layer_path(layer, group);
      layers_[static_cast<std::size_t>(layer)][g] = {parameter(path + ".keys"), parameter(path + ".values"),
                                                     initial_scale(config().norm, config().num_tokens(group)),
                                                     plan().unit_shards(g, tp_rank())};
    }
  }
  qkv_columns_.groups = {head_columns(), head_columns(), head_columns()};
  // With virtual shards rows are normalised before they are cut into heads.
  qkv_columns_.common = config().norm == PattentionNorm::l2_norm_gelu || reducer().by_shard() ? 0 : 3;
}

LanguageModel::Birth TokenFormer::birth(std::string_view path) const {
  return {0.0, path.ends_with(".values") ? value_deviation(config()) : key_deviation()};
}

void TokenFormer::initialise(std::uint64_t seed) {
  LanguageModel::initialise(seed);
  for (std::int64_t layer = 0; layer < config().layers; ++layer) {
    for (const TokenGroup group : kTokenGroups) {
      set_scale(layer, group, initial_scale(config().norm, config().num_tokens(group)));
    }
  }
}

const PattentionTokens& TokenFormer::tokens_of(std::int64_t layer, TokenGroup group) const {
  return layers_[static_cast<std::size_t>(layer)][static_cast<std::size_t>(group)];
}

double TokenFormer::scale(std::int64_t layer, TokenGroup group) const { return tokens_of(layer, group).scale; }

void TokenFormer::set_scale(std::int64_t layer, TokenGroup group, double scale) {
  layers_[static_cast<std::size_t>(layer)][static_cast<std::size_t>(group)].scale = scale;
}

std::vector<StateNumber> TokenFormer::state_numbers() const {
  std::vector<StateNumber> numbers;
  for (std::int64_t layer = 0; layer < config().layers; ++layer) {
    for (const TokenGroup group : kTokenGroups) {
      numbers.push_back({layer_path(layer, group) + ".keys", "scale", scale(layer, group)});
    }
  }
  return numbers;
}

void TokenFormer::set_state_number(const StateNumber& number) {
  for (std::int64_t layer = 0; layer < config().layers; ++layer) {
    for (const TokenGroup group : kTokenGroups) {
      if (number.parameter == layer_path(layer, group) + ".keys") return set_scale(layer, group, number.value);
    }
  }
  LanguageModel::set_state_number(number);
}

/// Tells the heartbeats which layer is computed, by the first parameter of `group` (see parameter_specs()).
void TokenFormer::enter(std::int64_t layer, TokenGroup group) const {
  constexpr std::size_t kGroups = std::size(kTokenGroups);
  const std::size_t of_block = 2 * kGroups + (config().attention.kind == AttentionKind::linformer ? 2 : 0);
  const std::size_t before = 1 + static_cast<std::size_t>(layer) * of_block + 2 * static_cast<std::size_t>(group);
  set_place(parameters().all()[before].path());
}

Var TokenFormer::attention_input(Tape& tape, const Var& h, std::int64_t layer) {
  enter(layer, TokenGroup::query);
  const Var u = shared(tape, layer_norm(tape, h, {}, {}, config().layernorm_eps));
  const std::array<PattentionTokens, 3> qkv = {tokens_of(layer, TokenGroup::query), tokens_of(layer, TokenGroup::key),
                                               tokens_of(layer, TokenGroup::value)};
  const std::array<double, 3> scales = {qkv[0].scale, qkv[1].scale, qkv[2].scale};
  const Var partial = pattention(tape, u, qkv, config().norm, reducer());
  if (reducer().by_shard()) {
    return split_columns(tape, row_normalize(tape, partial, scales, config().norm, parameters().compute()),
                         qkv_columns_, tp());
  }
  return row_normalize(tape, reduce_scatter_columns(tape, partial, qkv_columns_, tp()), scales, config().norm,
                       parameters().compute());
}

Var TokenFormer::project(Tape& tape, const Var& x, std::int64_t layer, TokenGroup group) {
  enter(layer, group);
  const std::array<PattentionTokens, 1> tokens = {tokens_of(layer, group)};
  const std::array<double, 1> scales = {tokens[0].scale};
  return row_normalize(tape, completed(tape, pattention(tape, x, tokens, config().norm, reducer())), scales,
                       config().norm, parameters().compute());
}

Var TokenFormer::attention_output(Tape& tape, Var heads, std::int64_t layer) {
  heads = gather_heads(tape, heads);
  return project(tape, heads, layer, TokenGroup::proj);
}

Var TokenFormer::feed_forward(Tape& tape, const Var& h, std::int64_t layer) {
  const Var u = shared(tape, layer_norm(tape, h, {}, {}, config().layernorm_eps));
  return project(tape, u, layer, TokenGroup::ffn);
}

}  // namespace tforge
