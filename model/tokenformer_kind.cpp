// What a TokenFormer is made of and what it costs, by formula.
#include <algorithm>

#include "core/errors.h"
#include "kernels/pattention.h"
#include "model/tokenformer.h"
#include "model/tokenformer_growth.h"

namespace tforge {

namespace {

/// Sizes of one tp rank; all sums are bytes a row of the batch.
struct Sizes {
  Sizes(const ModelConfig& config, const ShardPlan& plan, int tp_rank, DType dtype)
      : sharded(plan.heads.ranks() > 1),
        several_shards(sharded),
        norm(config.norm),
        element(static_cast<std::int64_t>(size_of(dtype))),
        d(config.dim),
        heads(plan.heads.count(tp_rank)),
        c(heads * config.head_dim()) {
    for (std::size_t g = 0; g < tokens.size(); ++g) tokens[g] = plan.units[g].count(tp_rank);
    if (!plan.shards) return;
    by_shard = true;
    shards = plan.shards->deal.count(tp_rank);
    gathered = sharded ? plan.shards->deal.total() : 0;
    several_shards = plan.shards->deal.total() > 1;
  }

  /// Elements of a row in the dtype that waits for backward, and numbers of the row, in bytes.
  std::int64_t bytes(const SavePolicy& saves, std::int64_t large, std::int64_t numbers) const {
    return large * (saves.dtype == SavedDType::bf16 ? 2 : element) + numbers * element;
  }

  /// Kept by q, k and v: their input (and, as copies are not shared, LayerNorm's result once more), scores and numbers.
  std::int64_t kept_by_qkv(const SavePolicy& saves) const {
    const std::int64_t input = saves.dtype == SavedDType::bf16 ? 2 * d : d;
    const std::int64_t scores = saves.recompute == Recompute::scores ? 0 : qkv_tokens();
    return bytes(saves, input + scores, 1 + (norm == PattentionNorm::gelu_l2_norm ? 0 : 3));
  }

  /// Kept by a whole block.
  std::int64_t kept(const SavePolicy& saves) const {
    const bool rounded = saves.dtype == SavedDType::bf16;
    std::int64_t large = 4 * c /* q, k, v and the result of attention */ + d /* LN0(h) */;
    if (sharded) large += d;                      // the heads of all ranks
    if (rounded) large += d + (sharded ? 0 : c);  // copies are not shared
    if (norm != PattentionNorm::l2_norm_gelu) large += 3 * (by_shard ? d : c) + 3 + 2 * (d + 1);  // not normalised yet
    if (saves.recompute != Recompute::scores) large += tokens[3] + tokens[4];
    const std::int64_t numbers = heads /* log-sum-exp */ + 1 + (norm == PattentionNorm::gelu_l2_norm ? 0 : 2);
    return kept_by_qkv(saves) + bytes(saves, large, numbers);
  }

  /// Going back through attention, when the rest of the block is gone: the gradients of h, of its result and of qkv.
  std::int64_t attention(const SavePolicy& saves) const {
    const std::int64_t widened = saves.dtype == SavedDType::bf16 ? 4 * c : 0;
    return kept_by_qkv(saves) + bytes(saves, 4 * c, heads + d + 4 * c + widened);
  }

  /// Beside what is kept, going back through Pattention of n tokens in all: `gradients` elements a row, the input
  /// widened, scores or their gradients outside the kernels' workspace.
  std::int64_t transient(const SavePolicy& saves, std::int64_t n, std::int64_t gradients) const {
    const bool rounded = saves.dtype == SavedDType::bf16;
    const std::int64_t score_buffers = (rounded || saves.recompute == Recompute::scores ? 1 : 0) +
                                       (several_shards && norm == PattentionNorm::l2_norm_gelu ? 1 : 0);
    const std::int64_t products = score_buffers * n + (by_shard ? shards * d : 0);
    // The sum of dx over virtual shards, when the scores are gone.
    const std::int64_t sum = by_shard ? (shards + gathered) * d - n : 0;
    return (gradients + (rounded ? d : 0) + std::max(products, sum)) * element;
  }

  /// What q, k and v take on their way forward: the results of each virtual shard and of all.
  std::int64_t forward(const SavePolicy& saves, std::int64_t rows) const {
    if (!by_shard) return 0;
    const std::int64_t width = 3 * (d + (norm == PattentionNorm::l2_norm_gelu ? 0 : 1));
    std::int64_t workspace = 0;
    for (const std::size_t g : {0, 1, 2}) workspace += kernels::pattention_forward_workspace(rows, tokens[g], d, d);
    return rows * (kept_by_qkv(saves) + ((shards + gathered + 1) * width + d) * element) + workspace * element;
  }

  /// The most that one block takes on its way back: in ffn, or in q, k and v when the rest of it is gone.
  std::int64_t block(const SavePolicy& saves, std::int64_t rows) const {
    const auto workspace = [&](std::int64_t n) {
      return kernels::pattention_backward_workspace(rows, n, d, d) * element;
    };
    const std::int64_t n = std::max(tokens[3], tokens[4]);
    return std::max({rows * (kept(saves) + transient(saves, n, 2 * d)) + workspace(n),
                     rows * (kept_by_qkv(saves) + transient(saves, qkv_tokens(), 5 * d)) + workspace(tokens[0]) +
                         workspace(tokens[1]) + workspace(tokens[2]),
                     forward(saves, rows)});
  }

  std::int64_t qkv_tokens() const { return tokens[0] + tokens[1] + tokens[2]; }

  bool sharded;               // over ranks
  bool several_shards;        // over ranks or virtual shards
  bool by_shard = false;      // virtual shards are computed apart,
  std::int64_t shards = 1;    // so many here,
  std::int64_t gathered = 0;  // and so many put together to be added
  PattentionNorm norm;
  std::int64_t element, d, heads, c;
  std::array<std::int64_t, 5> tokens{};  // by TokenGroup
};

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

  BlockMemory block_memory(const ModelConfig& config, const ShardPlan& plan, const BlockPass& pass) const override {
    const Sizes sizes(config, plan, pass.tp_rank, pass.dtype);
    return {pass.rows * sizes.kept(pass.saves), sizes.block(pass.saves, pass.rows),
            pass.rows * sizes.attention(pass.saves)};
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
    const auto add = [&](const char* what, Collective kind, std::int64_t calls, std::int64_t elements) {
      if (calls > 0) to.add(what, MeshAxis::tp, kind, calls, elements * T * e);
    };
    if (plan.shards) {
      const std::int64_t k = plan.shards->deal.count(pass.tp_rank);
      add("q, k, v", Collective::all_gather, forward, forward * k * 3 * (d + extra));
      add("heads", Collective::all_gather, forward, forward * c);
      add("proj and ffn", Collective::all_gather, 2 * forward, 2 * forward * k * (d + extra));
      add("row numbers", Collective::all_gather, 3 * row_numbers, 5 * row_numbers * k);
      add("inputs, backward", Collective::all_gather, 3 * layers, 3 * layers * k * d);
      add("q, k, v, backward", Collective::all_gather, layers, layers * 3 * c);
      return;
    }
    add("q, k, v", Collective::reduce_scatter, forward, forward * (3 * d + 3 * extra * pass.tp));
    add("heads", Collective::all_gather, forward, forward * c);
    add("proj and ffn", Collective::all_reduce, 2 * forward, 2 * forward * (d + extra));
    add("row numbers", Collective::all_reduce, 3 * row_numbers, 5 * row_numbers);
    add("inputs, backward", Collective::all_reduce, 2 * layers, 2 * layers * d);
    add("heads, backward", Collective::reduce_scatter, layers, layers * d);
    add("q, k, v, backward", Collective::all_gather, layers, layers * (3 * c + 3 * extra));
  }
};

}  // namespace

const ModelKind& tokenformer_kind() {
  static const TokenFormerKind kind;
  return kind;
}

}  // namespace tforge
