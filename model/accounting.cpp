#include "model/accounting.h"

#include <fmt/format.h>

#include "model/attention.h"
#include "model/memoryformer.h"

namespace tforge {

namespace {

constexpr const char* kEmbedding = "embedding";
constexpr const char* kHead = "head";

}  // namespace

std::vector<ModelPart> model_parts(const ModelConfig& config, std::int64_t seq) {
  const std::int64_t table = config.vocab * config.dim;
  std::vector<ModelPart> parts = {{kEmbedding, table, 0}};
  for (ModelPart part : kind_of(config).block_parts(config)) {
    part.parameters *= config.layers;
    part.multiply_adds *= static_cast<double>(config.layers);
    parts.push_back(std::move(part));
  }
  parts.push_back({"attention", config.layers * attention_parameters(config),
                   static_cast<double>(config.layers) * attention_multiply_adds(config, seq)});
  parts.push_back({"final norm", (config.stream_norm == StreamNorm::layernorm ? 2 : 1) * config.dim, 0});
  parts.push_back({kHead, config.head == Head::untied ? table : 0, static_cast<double>(table)});
  return parts;
}

ModelPart sum_of(const std::vector<ModelPart>& parts, Ends ends) {
  ModelPart sum{ends == Ends::counted ? "all" : "without embedding and head"};
  for (const ModelPart& part : parts) {
    if (ends == Ends::left_out && (part.name == kEmbedding || part.name == kHead)) continue;
    sum.parameters += part.parameters;
    sum.multiply_adds += part.multiply_adds;
  }
  return sum;
}

double published_flops_per_token(const ModelConfig& config, std::int64_t seq) {
  std::int64_t blocks = 0;
  for (const ModelPart& part : kind_of(config).block_parts(config)) blocks += config.layers * part.parameters;
  return 2 * static_cast<double>(blocks) + 4 * static_cast<double>(config.layers * config.dim * seq);
}

double published_block_multiply_adds(const ModelConfig& config, std::int64_t seq) {
  const auto d = static_cast<double>(config.dim);
  return 6 * d * d / static_cast<double>(memory_shape(config, MemoryGroup::attention).chunk_bits) +
         2 * static_cast<double>(seq) * d;
}

std::string accounting_text(const ModelConfig& config, std::int64_t seq) {
  std::vector<ModelPart> parts = model_parts(config, seq);
  const ModelPart all = sum_of(parts, Ends::counted), inner = sum_of(parts, Ends::left_out);
  parts.insert(parts.end(), {inner, all});
  std::string text = fmt::format("{:<28} {:>15} {:>22}\n", "part", "parameters", "multiply-adds a token");
  for (const ModelPart& part : parts) {
    text += fmt::format("{:<28} {:>15} {:>22.0f}\n", part.name, part.parameters, part.multiply_adds);
  }
  text += fmt::format("attention: {}\n", attention_text(config));
  text += fmt::format("forward at context length {}: {:.4g} FLOPs a token", seq, 2 * all.multiply_adds);
  if (config.attention.kind != AttentionKind::softmax) return text + "\n";  // the papers of the kinds count softmax
  if (config.kind == "memoryformer") {
    return text + fmt::format(
                      "; as MemoryFormer's paper counts (6 K d + 2 T d multiply-adds a block, no head, whole "
                      "attention): {:.4g} multiply-adds\n",
                      static_cast<double>(config.layers) * published_block_multiply_adds(config, seq));
  }
  return text + fmt::format("; as TokenFormer's paper counts (2 N + 4 L d T, no head, whole attention): {:.4g}\n",
                            published_flops_per_token(config, seq));
}

}  // namespace tforge
