#pragma once
// Attention between the positions of a sequence, by model.attention.kind: one for all layers of a model, and the same
// for all kinds of models. All of them are causal. What they are and what is published: docs/attention.md.
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "autograd/tape.h"
#include "autograd/var.h"
#include "core/allocator.h"
#include "core/device.h"
#include "core/tensor.h"
#include "model/config.h"
#include "model/parameter.h"
#include "model/shard_plan.h"

namespace tforge {

/// What a layer keeps of the positions it has seen, for generation.
struct AttentionMemory {
  Tensor keys, values;  // softmax: [batch * capacity, heads here * head_dim]; linformer: slots, and those of a block
  Tensor sums;          // performer, cosformer: [batch * heads here, a size that no length changes]
};

class Attention {
 public:
  virtual ~Attention() = default;

  /// [T, c] from the rotated [q | k | v] [T, 3 c] of this rank's heads, of `batch` sequences.
  virtual Var forward(Tape& tape, const Var& qkv, std::int64_t batch, std::int64_t layer) const = 0;

  virtual AttentionMemory make_memory(Allocator& allocator, std::int64_t batch, std::int64_t capacity) const = 0;
  /// The same for positions first .. of sequences whose earlier ones `memory` has seen, with the same bits, without
  /// gradients. `memory` (made for `capacity` positions) has seen them after this.
  virtual Tensor extend(Tape& tape, const Tensor& qkv, std::int64_t batch, std::int64_t layer, std::int64_t first,
                        std::int64_t capacity, AttentionMemory& memory) const = 0;
};

/// For so many heads of `config`. What it allocates (Purpose::weights) follows from the configuration; `parameters` has
/// those of attention_specs().
std::unique_ptr<Attention> make_attention(Allocator& allocator, Stream& stream, const ModelConfig& config, DType dtype,
                                          std::int64_t heads_here, ParameterSet& parameters);

/// The parameters of one layer's attention: of linformer E and F of all heads, [heads * slots, block] each, sharded by
/// heads. The others have none.
std::vector<ParameterSpec> attention_specs(const ModelConfig& config, const ShardPlan& plan, std::int64_t layer);
/// Whether a parameter is one of those, and the deviation of their normal values at birth: 1 / sqrt(block), so that a
/// slot is as large as a key.
bool is_attention_slots(std::string_view path);
double attention_slots_deviation(const ModelConfig& config);
/// How many numbers they are in one block.
std::int64_t attention_parameters(const ModelConfig& config);

/// Of a head of performer; positions of a block of linformer.
inline constexpr std::int64_t kMostFeatures = 65536, kMostBlock = 65536;
/// Throws ConfigError naming the key for what model.attention must not be.
void check_attention(const ModelConfig& config);
/// Features of a head: of performer model.attention.features, or int(head_dim ln(head_dim)) where that is 0.
std::int64_t attention_features(const ModelConfig& config);
/// Multiply-adds of one block for one token, the mean over a sequence of `seq`, as computed here: keys that a row does
/// not see are not counted.
double attention_multiply_adds(const ModelConfig& config, std::int64_t seq);
/// In words: what it is, and what its paper counts.
std::string attention_text(const ModelConfig& config);

}  // namespace tforge
