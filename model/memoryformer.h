#pragma once
// MemoryFormer (Ding et al., arXiv 2411.12992) as its public code composes it: every projection of a block is a Memory
// Layer, there is none behind attention, and nothing between the two of the Memory Block but a LayerNorm.
//
//   u = norm1(h)      q, k, v = M_q(u), M_k(u), M_v(u)      u is hashed once      h + attention(q, k, v)
//   w = norm2(h)      h + M_out(LN(M_in(w)))                M_in: d -> model.memory_width, M_out back to d
//
// M(x) = sum_k w_k(x) table_k[code_k(x)] [+ bias] (kernels/memory_layer.h); norm1, norm2 and the final norm are
// LayerNorm or RMSNorm (model.stream_norm), LN is always LayerNorm; all of them have parameters.
//
// Over the tensor-parallel axis: tables, whole ones; q, k and v after that by heads. Collectives of a layer, forward:
// one reduce-scatter of [T, 3 d], one all-gather of [T, d], one all-reduce each of [T, memory_width] and [T, d].
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "autograd/ops/memory_layer.h"
#include "model/language_model.h"
#include "model/models.h"

namespace tforge {

/// The axes of its shard plans are the groups of MemoryGroup, in tables.
const ModelKind& memoryformer_kind();

/// What the Memory Layers of a group look like.
struct MemoryShape {
  std::int64_t d_in = 0, d_out = 0;
  std::int64_t bits = 0;         // of a table, which has 2^bits rows
  std::int64_t chunk_bits = 0;   // of them those that a table was born with
  std::int64_t weight_bits = 0;  // of them those that the weight looks at
  std::int64_t chunks = 0;       // d_in / chunk_bits
  std::int64_t tables = 0;       // at least one a chunk

  std::int64_t rows() const { return tables << bits; }
};
MemoryShape memory_shape(const ModelConfig& config, MemoryGroup group);

/// The permutations of a group's coordinates that tables beyond the first one a chunk look through, as they are born:
/// from model.table_seed, each for itself. From then on a model keeps them, and so do its checkpoints.
StatePermutations born_permutations(const ModelConfig& config, MemoryGroup group);

/// The coordinates that tables [first, first + count) of a group look at, [bits, count]. Table k, bit i:
///   pi_j(((k mod chunks) * chunk_bits + i) mod d_in),   j = k / chunks,   pi_0 the identity, pi_1 the first of
///   `others`
/// So the first tables look at neighbouring coordinates, added ones at others, and bits that a table got later are the
/// first ones of the next chunk.
std::vector<std::int32_t> memory_coordinates(const ModelConfig& config, MemoryGroup group,
                                             const StatePermutations& others, std::int64_t first, std::int64_t count);

class MemoryFormer final : public LanguageModel {
 public:
  explicit MemoryFormer(const ModelPlace& place);

  std::span<const StatePermutations> state_permutations() const override { return permutations_; }
  void set_state_permutations(const StatePermutations& first) override;

 protected:
  /// As the public code: tables N(0, 0.02^2), of q, k and v N(0, 2 / (5 d)), biases N(0, 0.001^2), norms 1 and 0;
  /// embedding and head N(0, 0.02^2). With hash_weight = "p" tables times hash_bits, which is what l1_times_p is larger
  /// by (4.2, 8.2 and 10.3 times at 4, 8 and 10 bits for normal inputs).
  Birth birth(std::string_view path) const override;
  Var attention_input(Tape& tape, const Var& h, std::int64_t layer) override;
  Var attention_output(Tape& tape, Var heads, std::int64_t layer) override;
  Var feed_forward(Tape& tape, const Var& h, std::int64_t layer) override;

 private:
  struct Layer {
    std::string attention_place, ffn_place;  // for the heartbeats
    Norm attention_norm, ffn_norm, inner_norm;
    std::array<MemoryTables, 3> qkv;
    MemoryTables in, out;
  };
  const Layer& of(std::int64_t layer) const { return layers_[static_cast<std::size_t>(layer)]; }
  const MemoryHashing& hash(MemoryGroup group) const { return hashes_[static_cast<std::size_t>(group)]; }
  /// Makes the coordinates of the tables held here.
  void look_through_permutations(MemoryGroup group);
  /// The virtual shards of the tables held here, as rows.
  RowShards shards_here(MemoryGroup group) const;
  /// PARTIAL, or complete with virtual shards.
  Var memory(Tape& tape, const Var& x, MemoryGroup group, std::span<const MemoryTables> layers);

  std::vector<Layer> layers_;
  std::array<MemoryHashing, 3> hashes_;            // by MemoryGroup, the same in every layer
  std::array<StatePermutations, 3> permutations_;  // likewise
  std::array<ShardBorders, 3> rows_;               // of the virtual shards, likewise
  ColumnPlan qkv_columns_, heads_;
};

}  // namespace tforge
