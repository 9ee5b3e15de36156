#include "model/transformer.h"

#include <array>
#include <cmath>

#include "autograd/ops/layer_norm.h"
#include "core/errors.h"
#include "model/transformer_growth.h"

namespace tforge {

namespace {

/// Where columns of heads are cut that `heads` cut.
ShardBorders columns_of(const ModelConfig& config, ShardBorders heads) {
  for (std::int64_t& border : heads.borders) border *= config.head_dim();
  return heads;
}

}  // namespace

Transformer::Transformer(const ModelPlace& place) : LanguageModel(place) {
  if (plan().shards) {
    columns_ = columns_of(config(), *plan().shards->heads);
    columns_here_ = row_shards(columns_, plan().shards->deal, tp_rank());
  }
  const bool biases = config().biases == Biases::all;
  for (std::int64_t layer = 0; layer < config().layers; ++layer) {
    const auto at = [&](const char* name) { return parameter(fmt::format("layers.{}.{}", layer, name)); };
    const auto bias_at = [&](const char* name) { return biases ? at(name) : Var(); };
    layers_.push_back({.attention_place = fmt::format("layers.{}.attention", layer),
                       .ffn_place = fmt::format("layers.{}.ffn", layer),
                       .attention_norm = {at("attention.norm.weight"), at("attention.norm.bias")},
                       .ffn_norm = {at("ffn.norm.weight"), at("ffn.norm.bias")},
                       .query = {at("attention.query.weight"), bias_at("attention.query.bias"), columns_here_},
                       .key = {at("attention.key.weight"), bias_at("attention.key.bias"), columns_here_},
                       .value = {at("attention.value.weight"), bias_at("attention.value.bias"), columns_here_},
                       .neurons = {at("ffn.in.weight"), bias_at("ffn.in.bias"), plan().unit_shards(0, tp_rank())},
                       .proj = at("attention.proj.weight"),
                       .proj_bias = bias_at("attention.proj.bias"),
                       .out = at("ffn.out.weight"),
                       .out_bias = bias_at("ffn.out.bias")});
  }
}

bool Transformer::ends_on_stream(std::string_view path) {
  return path.ends_with("proj.weight") || path.ends_with("out.weight");
}

LanguageModel::Birth Transformer::birth(std::string_view path) const {
  if (path.ends_with("norm.weight")) return {1.0, 0.0};
  if (path.ends_with(".bias")) return {0.0, 0.0};
  return {0.0, ends_on_stream(path) ? kDeviation / std::sqrt(2.0 * static_cast<double>(config().layers)) : kDeviation};
}

Var Transformer::normalised(Tape& tape, const Var& h, const Norm& norm) {
  return shared(tape, layer_norm(tape, h, norm.weight, norm.bias, config().layernorm_eps));
}

Var Transformer::finished(Tape& tape, Var partial, const Var& bias) {
  Var y = completed(tape, std::move(partial));
  return bias ? add_bias(tape, std::move(y), bias) : y;
}

Var Transformer::attention_input(Tape& tape, const Var& h, std::int64_t layer) {
  set_place(of(layer).attention_place);
  const std::array<LinearWeights, 3> qkv = {of(layer).query, of(layer).key, of(layer).value};
  return linear(tape, normalised(tape, h, of(layer).attention_norm), qkv, reducer());
}

Var Transformer::attention_output(Tape& tape, Var heads, std::int64_t layer) {
  return finished(tape, linear_of_shard(tape, heads, of(layer).proj, reducer(), columns_here_), of(layer).proj_bias);
}

Var Transformer::feed_forward(Tape& tape, const Var& h, std::int64_t layer) {
  set_place(of(layer).ffn_place);
  const Var u = normalised(tape, h, of(layer).ffn_norm);
  return finished(tape, gelu_mlp(tape, u, of(layer).neurons, of(layer).out, reducer()), of(layer).out_bias);
}

namespace {

class TransformerKind final : public ModelKind {
 public:
  std::string_view name() const override { return "transformer"; }

  void validate(const ModelConfig& config) const override {
    if (config.ffn_dim < 0) throw ConfigError("model.ffn_dim = {}: want 0 (4 * model.dim) or more", config.ffn_dim);
    const auto d = static_cast<double>(config.dim);
    check_size(config, 4 * d * d + 2 * d * static_cast<double>(config.neurons()));
  }

  std::vector<ShardAxis> axes(const ModelConfig& config) const override {
    return {{"model.ffn_dim", config.neurons(), "layers.0.ffn.in.weight"}};
  }

  std::vector<ParameterSpec> block_specs(const ModelConfig& config, const ShardPlan& plan,
                                         std::int64_t layer) const override {
    const ShardBorders columns = columns_of(config, plan.heads);
    std::vector<ParameterSpec> specs;
    const auto add = [&](const char* name, const Shape& shape, const ShardBorders* borders, Decay decay) {
      specs.push_back({fmt::format("layers.{}.{}", layer, name), shape,
                       borders != nullptr ? Placement::sharded : Placement::replicated,
                       borders != nullptr ? *borders : ShardBorders{}, decay});
      if (borders == &plan.units[0]) specs.back().axis = 0;
      if (plan.shards && borders != nullptr) {
        specs.back().shards = specs.back().axis ? plan.shards->units[0] : columns_of(config, *plan.shards->heads);
      }
    };
    const auto add_bias = [&](const char* name, const Shape& shape, const ShardBorders* borders) {
      if (config.biases == Biases::all) add(name, shape, borders, Decay::no);
    };
    const std::int64_t d = config.dim, n = config.neurons();
    add("attention.norm.weight", Shape{d}, nullptr, Decay::no);
    add("attention.norm.bias", Shape{d}, nullptr, Decay::no);
    add("attention.query.weight", Shape{d, d}, &columns, Decay::yes);
    add_bias("attention.query.bias", Shape{d, 1}, &columns);
    add("attention.key.weight", Shape{d, d}, &columns, Decay::yes);
    add_bias("attention.key.bias", Shape{d, 1}, &columns);
    add("attention.value.weight", Shape{d, d}, &columns, Decay::yes);
    add_bias("attention.value.bias", Shape{d, 1}, &columns);
    add("attention.proj.weight", Shape{d, d}, &columns, Decay::yes);
    add_bias("attention.proj.bias", Shape{d}, nullptr);
    add("ffn.norm.weight", Shape{d}, nullptr, Decay::no);
    add("ffn.norm.bias", Shape{d}, nullptr, Decay::no);
    add("ffn.in.weight", Shape{n, d}, &plan.units[0], Decay::yes);
    add_bias("ffn.in.bias", Shape{n, 1}, &plan.units[0]);
    add("ffn.out.weight", Shape{n, d}, &plan.units[0], Decay::yes);
    add_bias("ffn.out.bias", Shape{d}, nullptr);
    return specs;
  }

  bool weights_by_heads() const override { return true; }

  std::unique_ptr<LanguageModel> make(const ModelPlace& place) const override {
    return std::make_unique<Transformer>(place);
  }

  std::unique_ptr<Growth> growth(const ModelConfig& before, const GrowthRequest& request) const override {
    return transformer_growth(before, request);
  }

  std::vector<ModelPart> block_parts(const ModelConfig& config) const override {
    const std::int64_t d = config.dim, n = config.neurons(), with_bias = config.biases == Biases::all ? 1 : 0;
    const auto product = [](std::int64_t in, std::int64_t out) {
      return static_cast<double>(in) * static_cast<double>(out);
    };
    const auto square = [&](const char* part) { return ModelPart{part, d * d + with_bias * d, product(d, d)}; };
    return {square("query"),
            square("key"),
            square("value"),
            square("proj"),
            {"ffn", 2 * n * d + with_bias * (n + d), 2 * product(n, d)},
            {"norms", 4 * d, 0}};
  }

  void add_block_exchanges(Exchanges& to, const ModelConfig& config, const ShardPlan& plan,
                           const BlockPass& pass) const override {
    const std::int64_t layers = config.layers;
    const std::int64_t bytes = pass.rows * config.dim * static_cast<std::int64_t>(size_of(pass.dtype));
    const std::int64_t forward = layers * (pass.saves.recompute == Recompute::block ? 2 : 1);
    const Collective sum = plan.shards ? Collective::all_gather : Collective::all_reduce;
    const std::int64_t parts = plan.shards ? plan.shards->deal.count(pass.tp_rank) : 1;
    to.add("proj and ffn", MeshAxis::tp, sum, 2 * forward, 2 * forward * parts * bytes);
    to.add("inputs, backward", MeshAxis::tp, sum, 2 * layers, 2 * layers * parts * bytes);
  }
};

}  // namespace

const ModelKind& transformer_kind() {
  static const TransformerKind kind;
  return kind;
}

}  // namespace tforge
