#pragma once
// Parameters and multiply-adds of a model by part, and what the papers count instead.
#include <cstdint>
#include <string>
#include <vector>

#include "model/config.h"
#include "model/models.h"

namespace tforge {

/// Parts of the whole model, all blocks together, forward and for one token at context length `seq`: embedding (a
/// lookup: no multiply-adds), the projections of the blocks by part, attention (attention_multiply_adds; of softmax
/// scores and weighted values of the (seq + 1) / 2 positions that a token sees on average: (seq + 1) d a block), final
/// norm, head (parameters only when it is not tied).
std::vector<ModelPart> model_parts(const ModelConfig& config, std::int64_t seq);

/// The sum of parts, under that name; with or without embedding and head.
enum class Ends : std::uint8_t { counted, left_out };
ModelPart sum_of(const std::vector<ModelPart>& parts, Ends ends);

/// TokenFormer, version 2, table 3: 2 N T + 4 L d T^2 operations for a text of T = seq tokens, N the parameters without
/// embedding; attention is not halved for causality, the head not counted. For one token: 2 N + 4 L d T.
double published_flops_per_token(const ModelConfig& config, std::int64_t seq);

/// MemoryFormer, section 3.4: multiply-adds of one token in one block, 6 K d for all Memory Layers of K = d / hash_bits
/// tables and 2 T d for attention.
double published_block_multiply_adds(const ModelConfig& config, std::int64_t seq);

/// All of it as lines of text.
std::string accounting_text(const ModelConfig& config, std::int64_t seq);

}  // namespace tforge
