#include "model/config.h"

#include "core/errors.h"

namespace tforge {

std::string_view name_of(TokenGroup group) {
  switch (group) {
    case TokenGroup::query: return "query";
    case TokenGroup::key: return "key";
    case TokenGroup::value: return "value";
    case TokenGroup::proj: return "proj";
    case TokenGroup::ffn: return "ffn";
  }
  return "?";
}

std::int64_t ModelConfig::rotary_dim() const {
  return static_cast<std::int64_t>(rotary_fraction * static_cast<double>(head_dim()));
}

void ModelConfig::validate() const {
  if (kind != "tokenformer") throw ConfigError("model.kind = \"{}\": there is \"tokenformer\"", kind);
  const auto positive = [](const char* key, std::int64_t value) {
    if (value < 1) throw ConfigError("model.{} = {}: at least 1 is needed", key, value);
  };
  positive("layers", layers);
  positive("dim", dim);
  positive("heads", heads);
  positive("vocab", vocab);
  positive("max_seq", max_seq);
  for (const TokenGroup group : kTokenGroups) {
    if (num_tokens(group) < 1) {
      throw ConfigError("model.tokens.{} = {}: at least 1 is needed", name_of(group), num_tokens(group));
    }
  }
  if (dim % heads != 0) {
    throw ConfigError("model.heads = {} does not divide model.dim = {}; choose a divisor of {}", heads, dim, dim);
  }
  if (!(rotary_fraction >= 0 && rotary_fraction <= 1)) {
    throw ConfigError("model.rotary_fraction = {}: want a fraction from 0 to 1", rotary_fraction);
  }
  if (rotary_dim() % 2 != 0) {
    throw ConfigError(
        "model.rotary_fraction = {} rotates {} of the {} dimensions of a head, an odd number; rotation pairs "
        "dimensions, so choose a fraction that gives an even one",
        rotary_fraction, rotary_dim(), head_dim());
  }
  if (!(rotary_base > 0)) throw ConfigError("model.rotary_base = {}: want more than 0", rotary_base);
  if (!(layernorm_eps > 0)) throw ConfigError("model.layernorm_eps = {}: want more than 0", layernorm_eps);
}

std::int64_t ModelConfig::parameters() const {
  std::int64_t tokens_a_layer = 0;
  for (const TokenGroup group : kTokenGroups) tokens_a_layer += num_tokens(group);
  return layers * tokens_a_layer * 2 * dim + vocab * dim + 2 * dim;
}

double ModelConfig::forward_flops_per_token(std::int64_t seq) const {
  double tokens_a_layer = 0;
  for (const TokenGroup group : kTokenGroups) tokens_a_layer += static_cast<double>(num_tokens(group));
  const auto d = static_cast<double>(dim);
  const double attention = 4 * (static_cast<double>(seq) + 1) / 2 * d;
  return static_cast<double>(layers) * (2 * tokens_a_layer * (d + d) + attention) + 2 * d * static_cast<double>(vocab);
}

}  // namespace tforge
