#pragma once
// What a model is: the numbers that decide its parameters and its function. Stored in every checkpoint.
#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "core/hash_weight.h"
#include "core/pattention_norm.h"

namespace tforge {

/// The layer groups of a TokenFormer block whose parameter tokens can be counted and grown on their own.
enum class TokenGroup : std::uint8_t { query, key, value, proj, ffn };
inline constexpr std::array<TokenGroup, 5> kTokenGroups = {TokenGroup::query, TokenGroup::key, TokenGroup::value,
                                                           TokenGroup::proj, TokenGroup::ffn};
std::string_view name_of(TokenGroup group);

/// The Memory Layers of a MemoryFormer block that share a hash: q, k and v; the two of the Memory Block.
enum class MemoryGroup : std::uint8_t { attention, ffn_in, ffn_out };
inline constexpr std::array<MemoryGroup, 3> kMemoryGroups = {MemoryGroup::attention, MemoryGroup::ffn_in,
                                                             MemoryGroup::ffn_out};
std::string_view name_of(MemoryGroup group);
/// The norms on the residual stream: kernels/layer_norm.h, kernels/rms_norm.h.
enum class StreamNorm : std::uint8_t { layernorm, rmsnorm };

/// Whether the head's weights are those of the embedding.
enum class Head : std::uint8_t { untied, tied };
/// Whether the projections of a Transformer or a MemoryFormer add biases.
enum class Biases : std::uint8_t { none, all };

/// How the positions of a sequence see those before them (model/attention.h).
enum class AttentionKind : std::uint8_t { softmax, linformer, performer, cosformer };
inline constexpr std::array<AttentionKind, 4> kAttentionKinds = {AttentionKind::softmax, AttentionKind::linformer,
                                                                 AttentionKind::performer, AttentionKind::cosformer};
std::string_view name_of(AttentionKind kind);

struct AttentionConfig {
  AttentionKind kind = AttentionKind::softmax;
  // linformer
  std::int64_t block = 64;  // positions that are projected together
  std::int64_t slots = 16;  // to so many, for each head
  // performer
  std::int64_t features = 0;      // of a head; 0: int(head_dim ln(head_dim))
  std::int64_t feature_seed = 0;  // of the directions that features are taken along

  bool operator==(const AttentionConfig&) const = default;
};

struct ModelConfig {
  std::string kind = "tokenformer";
  std::int64_t layers = 4;
  std::int64_t dim = 128;    // width d of the residual stream
  std::int64_t heads = 4;    // must divide dim
  std::int64_t vocab = 256;  // set from the dataset when a model is born
  std::int64_t max_seq = 256;
  double rotary_fraction = 0.25;
  double rotary_base = 10000.0;
  double layernorm_eps = 1e-5;
  AttentionConfig attention;

  // tokenformer
  std::array<std::int64_t, 5> tokens = {128, 128, 128, 128, 512};  // parameter tokens by TokenGroup
  PattentionNorm norm = PattentionNorm::l2_norm_gelu;

  // memoryformer; what is by MemoryGroup
  std::array<std::int64_t, 3> hash_bits = {8, 8, 10};   // a table has 2^hash_bits rows
  std::array<std::int64_t, 3> tables = {0, 0, 0};       // 0: one a chunk of the coordinates
  std::array<std::int64_t, 3> chunk_bits = {0, 0, 0};   // of hash_bits those that a table was born with; 0: all
  std::array<std::int64_t, 3> weight_bits = {0, 0, 0};  // of hash_bits those that the weight looks at; 0: all
  std::int64_t memory_width = 0;                        // of the Memory Block; 0: hash_bits.ffn_out a table of ffn_in
  HashWeight hash_weight = HashWeight::p;
  double temperature = 1;
  std::int64_t table_seed = 0;  // of the permutations that tables are added with
  StreamNorm stream_norm = StreamNorm::layernorm;
  double rmsnorm_eps = 1e-8;

  // transformer; head and biases also of a memoryformer
  std::int64_t ffn_dim = 0;  // neurons of the MLP; 0: 4 * dim
  Head head = Head::tied;
  Biases biases = Biases::all;

  std::int64_t num_tokens(TokenGroup group) const { return tokens[static_cast<std::size_t>(group)]; }
  std::int64_t head_dim() const { return dim / heads; }
  std::int64_t neurons() const { return ffn_dim > 0 ? ffn_dim : 4 * dim; }
  /// int(rotary_fraction * head_dim): the leading dimensions of each head that are rotated.
  std::int64_t rotary_dim() const;

  /// Throws ConfigError naming the key (`model.heads`, ...) for: a non-positive extent, heads that do not divide
  /// dim, an odd rotary width, an unknown kind; and what its kind does not allow.
  void validate() const;

  /// Number of parameters: those of the blocks (ModelKind::block_parts), V d + 2 d (embedding,
  /// final LayerNorm), and V d of an untied head.
  std::int64_t parameters() const;
  /// Multiply-adds counted as 2, forward, for one token at context length `seq`: the projections of the blocks,
  /// those of causal attention (attention_multiply_adds: of softmax 2 (seq + 1) d, its computed half), 2 d V for the
  /// head.
  double forward_flops_per_token(std::int64_t seq) const;
  /// Forward and backward: three times the forward.
  double train_flops_per_token(std::int64_t seq) const { return 3 * forward_flops_per_token(seq); }

  bool operator==(const ModelConfig&) const = default;
};

}  // namespace tforge
