#include "model/models.h"

#include <array>

#include "core/errors.h"
#include "core/nearest.h"
#include "model/attention.h"
#include "model/memoryformer.h"
#include "model/tokenformer.h"
#include "model/transformer.h"

namespace tforge {

std::span<const ModelKind* const> model_kinds() {
  static const std::array<const ModelKind*, 3> kinds = {&tokenformer_kind(), &transformer_kind(), &memoryformer_kind()};
  return kinds;
}

const ModelKind& kind_of(const ModelConfig& config) {
  std::vector<std::string> names;
  std::string list;
  for (const ModelKind* kind : model_kinds()) {
    if (kind->name() == config.kind) return *kind;
    names.emplace_back(kind->name());
    list += fmt::format("{}\"{}\"", list.empty() ? "" : ", ", kind->name());
  }
  throw ConfigError("model.kind = \"{}\": there is {}{}", config.kind, list, did_you_mean(config.kind, names));
}

void check_size(const ModelConfig& config, double of_block) {
  constexpr double kMost = 1e15;
  const double numbers = static_cast<double>(config.layers) * of_block +
                         2 * static_cast<double>(config.vocab) * static_cast<double>(config.dim);
  if (numbers > kMost) {
    throw ConfigError("model.layers = {} of model.dim = {}: {:.3g} parameters, at most {:.3g} are possible",
                      config.layers, config.dim, numbers, kMost);
  }
}

std::vector<ParameterSpec> parameter_specs(const ModelConfig& config, const ShardPlan& plan) {
  std::vector<ParameterSpec> specs;
  specs.push_back(
      {"embedding", Shape{config.vocab, config.dim}, Placement::sharded, plan.vocab, Decay::yes, Bucketing::alone});
  if (plan.shards) specs.back().shards = plan.shards->vocab;
  for (std::int64_t layer = 0; layer < config.layers; ++layer) {
    for (ParameterSpec& spec : kind_of(config).block_specs(config, plan, layer)) specs.push_back(std::move(spec));
    for (ParameterSpec& spec : attention_specs(config, plan, layer)) specs.push_back(std::move(spec));
  }
  specs.push_back({"final_norm.weight", Shape{config.dim}, Placement::replicated, {}, Decay::no});
  if (config.stream_norm == StreamNorm::layernorm) {
    specs.push_back({"final_norm.bias", Shape{config.dim}, Placement::replicated, {}, Decay::no});
  }
  if (config.head == Head::untied) {
    specs.push_back({"head", Shape{config.vocab, config.dim}, Placement::sharded, plan.vocab, Decay::yes});
    if (plan.shards) specs.back().shards = plan.shards->vocab;
  }
  return specs;
}

std::unique_ptr<LanguageModel> make_model(Allocator& allocator, Stream& stream, const ModelConfig& config, DType dtype,
                                          Communicator& tp, const ShardPlan& plan) {
  config.validate();
  return kind_of(config).make({allocator, stream, config, dtype, tp, plan});
}

}  // namespace tforge
