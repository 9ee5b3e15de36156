#include "model/config.h"

#include "core/errors.h"
#include "model/accounting.h"
#include "model/attention.h"
#include "model/models.h"

namespace tforge {
namespace {
constexpr std::int64_t kMaxExtent = (std::int64_t{1} << 31) - 1;
}  // namespace

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

std::string_view name_of(MemoryGroup group) {
  switch (group) {
    case MemoryGroup::attention: return "attention";
    case MemoryGroup::ffn_in: return "ffn_in";
    case MemoryGroup::ffn_out: return "ffn_out";
  }
  return "?";
}

std::string_view name_of(AttentionKind kind) {
  switch (kind) {
    case AttentionKind::softmax: return "softmax";
    case AttentionKind::linformer: return "linformer";
    case AttentionKind::performer: return "performer";
    case AttentionKind::cosformer: return "cosformer";
  }
  return "?";
}

std::int64_t ModelConfig::rotary_dim() const {
  return static_cast<std::int64_t>(rotary_fraction * static_cast<double>(head_dim()));
}

void ModelConfig::validate() const {
  const ModelKind& of_kind = kind_of(*this);
  const auto possible = [](const std::string& key, std::int64_t value) {
    if (value > kMaxExtent) throw ConfigError("model.{} = {}: at most {} is possible", key, value, kMaxExtent);
  };
  const auto positive = [&](const char* key, std::int64_t value) {
    if (value < 1) throw ConfigError("model.{} = {}: at least 1 is needed", key, value);
    possible(key, value);
  };
  positive("layers", layers);
  positive("dim", dim);
  positive("heads", heads);
  positive("vocab", vocab);
  positive("max_seq", max_seq);
  possible("ffn_dim", ffn_dim);
  possible("memory_width", memory_width);
  for (const TokenGroup group : kTokenGroups) possible(fmt::format("tokens.{}", name_of(group)), num_tokens(group));
  for (const MemoryGroup group : kMemoryGroups) {
    possible(fmt::format("tables.{}", name_of(group)), tables[static_cast<std::size_t>(group)]);
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
  check_attention(*this);
  of_kind.validate(*this);
}

std::int64_t ModelConfig::parameters() const { return sum_of(model_parts(*this, max_seq), Ends::counted).parameters; }

double ModelConfig::forward_flops_per_token(std::int64_t seq) const {
  return 2 * sum_of(model_parts(*this, seq), Ends::counted).multiply_adds;
}

}  // namespace tforge
