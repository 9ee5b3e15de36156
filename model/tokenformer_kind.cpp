// What a TokenFormer is made of and what it costs, by formula.
#include "core/errors.h"
#include "model/tokenformer.h"
#include "model/tokenformer_growth.h"

namespace tforge {

namespace {

class TokenFormerKind final : public ModelKind {
 public:
  std::string_view name() const override { return "tokenformer"; }

  void validate(const ModelConfig& config) const override {
    double numbers = 0;
    for (const TokenGroup group : kTokenGroups) {
      if (config.num_tokens(group) < 1) {
        throw ConfigError("model.tokens.{} = {}: at least 1 is needed", name_of(group), config.num_tokens(group));
      }
      numbers += 2 * static_cast<double>(config.num_tokens(group)) * static_cast<double>(config.dim);
    }
    check_size(config, numbers);
  }

  std::vector<ShardAxis> axes(const ModelConfig& config) const override {
    std::vector<ShardAxis> axes;
    for (const TokenGroup group : kTokenGroups) {
      axes.push_back({fmt::format("model.tokens.{}", name_of(group)), config.num_tokens(group),
                      TokenFormer::layer_path(0, group) + ".keys"});
    }
    return axes;
  }

  std::vector<ParameterSpec> block_specs(const ModelConfig& config, const ShardPlan& plan,
                                         std::int64_t layer) const override {
    std::vector<ParameterSpec> specs;
    for (const TokenGroup group : kTokenGroups) {
      for (const char* role : {".keys", ".values"}) {
        const auto g = static_cast<std::size_t>(group);
        specs.push_back({TokenFormer::layer_path(layer, group) + role, Shape{config.num_tokens(group), config.dim},
                         Placement::sharded, plan.units[g], Decay::yes});
        if (plan.shards) specs.back().shards = plan.shards->units[g];
        specs.back().axis = g;
      }
    }
    return specs;
  }

  bool weights_by_heads() const override { return false; }

  std::unique_ptr<LanguageModel> make(const ModelPlace& place) const override {
    return std::make_unique<TokenFormer>(place);
  }

  std::unique_ptr<Growth> growth(const ModelConfig& before, const GrowthRequest& request) const override {
    return tokenformer_growth(before, request);
  }

  /// n_g (d_in + d_out) each.
  std::vector<ModelPart> block_parts(const ModelConfig& config) const override {
    std::vector<ModelPart> parts;
    for (const TokenGroup group : kTokenGroups) {
      const std::int64_t size = config.num_tokens(group) * 2 * config.dim;
      parts.push_back({std::string(name_of(group)), size, static_cast<double>(size)});
    }
    return parts;
  }

  void add_block_exchanges(Exchanges& to, const ModelConfig& config, const ShardPlan& plan,
                           const BlockPass& pass) const override {
    const auto e = static_cast<std::int64_t>(size_of(pass.dtype));
    const std::int64_t layers = config.layers, d = config.dim, T = pass.rows;
    const std::int64_t c = plan.heads.count(pass.tp_rank) * config.head_dim();
    const std::int64_t extra = config.norm == PattentionNorm::l2_norm_gelu ? 0 : 1;  // columns beside the values
    const std::int64_t forward = layers * (pass.saves.recompute == Recompute::block ? 2 : 1);
    const std::int64_t row_numbers = (config.norm == PattentionNorm::gelu_l2_norm ? 0 : forward) +
                                     (config.norm == PattentionNorm::l2_norm_gelu ? layers : 0);
    const auto add = [&](const char* what, Collective kind, std::int64_t calls, std::int64_t elements,
                         std::int64_t size) {
      if (calls > 0) to.add(what, MeshAxis::tp, kind, calls, elements * T * size);
    };
    const auto wide = static_cast<std::int64_t>(size_of(compute_dtype(pass.dtype)));
    const std::int64_t u = extra > 0 ? wide : e;  // of an element of U
    const auto add_row_numbers = [&](Collective kind, std::int64_t parts) {
      if (row_numbers > 0)
        to.add("row numbers", MeshAxis::tp, kind, 3 * row_numbers, 5 * row_numbers * parts * T * wide);
    };
    if (plan.shards) {
      const std::int64_t k = plan.shards->deal.count(pass.tp_rank);
      add("q, k, v", Collective::all_gather, forward, forward * k * 3 * (d + extra), u);
      add("heads", Collective::all_gather, forward, forward * c, e);
      add("proj and ffn", Collective::all_gather, 2 * forward, 2 * forward * k * (d + extra), u);
      add_row_numbers(Collective::all_gather, k);
      add("inputs, backward", Collective::all_gather, 3 * layers, 3 * layers * k * d, e);
      add("q, k, v, backward", Collective::all_gather, layers, layers * 3 * c, e);
      return;
    }
    add("q, k, v", Collective::reduce_scatter, forward, forward * (3 * d + 3 * extra * pass.tp), u);
    add("heads", Collective::all_gather, forward, forward * c, e);
    add("proj and ffn", Collective::all_reduce, 2 * forward, 2 * forward * (d + extra), u);
    add_row_numbers(Collective::all_reduce, 1);
    add("inputs, backward", Collective::all_reduce, 2 * layers, 2 * layers * d, e);
    add("heads, backward", Collective::reduce_scatter, layers, layers * d, e);
    add("q, k, v, backward", Collective::all_gather, layers, layers * (3 * c + 3 * extra), u);
  }
};

}  // namespace

const ModelKind& tokenformer_kind() {
  static const TokenFormerKind kind;
  return kind;
}

}  // namespace tforge
