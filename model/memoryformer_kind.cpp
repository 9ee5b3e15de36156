// What a MemoryFormer is made of and what it costs, by formula.
#include <cmath>
#include <utility>

#include "core/errors.h"
#include "kernels/memory_layer.h"
#include "model/memoryformer.h"
#include "model/memoryformer_growth.h"

namespace tforge {

namespace {

class MemoryFormerKind final : public ModelKind {
 public:
  std::string_view name() const override { return "memoryformer"; }

  void validate(const ModelConfig& config) const override {
    if (!(config.temperature > 0)) throw ConfigError("model.temperature = {}: want more than 0", config.temperature);
    if (config.hash_weight == HashWeight::l1_times_p && config.temperature != 1) {
      throw ConfigError("model.temperature = {}: the weight \"l1_times_p\" is defined at 1", config.temperature);
    }
    for (const MemoryGroup group : kMemoryGroups) {
      const std::string_view name = name_of(group);
      const auto g = static_cast<std::size_t>(group);
      if (config.hash_bits[g] < 1 || config.hash_bits[g] > kernels::kMostHashBits) {
        throw ConfigError("model.hash_bits.{} = {}: want 1 to {}", name, config.hash_bits[g], kernels::kMostHashBits);
      }
      for (const auto& [key, bits] :
           {std::pair{"chunk_bits", config.chunk_bits[g]}, std::pair{"weight_bits", config.weight_bits[g]}}) {
        if (bits >= 0 && bits <= config.hash_bits[g]) continue;
        throw ConfigError("model.{}.{} = {}: want 0 (all) to model.hash_bits.{} = {}", key, name, bits, name,
                          config.hash_bits[g]);
      }
    }
    if (config.memory_width < 0) throw ConfigError("model.memory_width = {}: want 0 or more", config.memory_width);
    double numbers = 0;
    for (const MemoryGroup group : kMemoryGroups) {
      const MemoryShape s = memory_shape(config, group);
      if (s.d_in % s.chunk_bits != 0 || s.bits > s.d_in) {
        throw ConfigError("model.hash_bits.{}: chunks of {} coordinates do not divide the {} that are hashed",
                          name_of(group), s.chunk_bits, s.d_in);
      }
      if (s.tables < s.chunks) {
        throw ConfigError("model.tables.{} = {}: {} coordinates in chunks of {} need {} tables", name_of(group),
                          s.tables, s.d_in, s.chunk_bits, s.chunks);
      }
      const double layers = group == MemoryGroup::attention ? 3 : 1;
      numbers +=
          layers * std::ldexp(static_cast<double>(s.tables), static_cast<int>(s.bits)) * static_cast<double>(s.d_out);
    }
    check_size(config, numbers);
  }

  std::vector<ShardAxis> axes(const ModelConfig& config) const override {
    std::vector<ShardAxis> axes;
    for (const MemoryGroup group : kMemoryGroups) {
      const MemoryShape s = memory_shape(config, group);
      axes.push_back(
          {fmt::format("model.tables.{}", name_of(group)), s.tables, first_tables(group), std::int64_t{1} << s.bits});
    }
    return axes;
  }

  std::vector<ParameterSpec> block_specs(const ModelConfig& config, const ShardPlan& plan,
                                         std::int64_t layer) const override {
    std::vector<ParameterSpec> specs;
    const auto replicated = [&](const std::string& name, std::int64_t size) {
      specs.push_back({fmt::format("layers.{}.{}", layer, name), Shape{size}, Placement::replicated, {}, Decay::no});
    };
    const auto norm = [&](const std::string& name, std::int64_t size, StreamNorm kind) {
      replicated(name + ".weight", size);
      if (kind == StreamNorm::layernorm) replicated(name + ".bias", size);
    };
    const auto tables = [&](const std::string& name, MemoryGroup group) {
      const auto g = static_cast<std::size_t>(group);
      const MemoryShape s = memory_shape(config, group);
      const auto in_rows = [&](ShardBorders borders) {
        for (std::int64_t& border : borders.borders) border <<= s.bits;
        return borders;
      };
      ParameterSpec spec{fmt::format("layers.{}.{}.tables", layer, name), Shape{s.rows(), s.d_out}, Placement::sharded,
                         in_rows(plan.units[g]), Decay::yes};
      if (plan.shards) spec.shards = in_rows(plan.shards->units[g]);
      spec.axis = g;
      spec.rows_used = RowsUsed::some;
      specs.push_back(std::move(spec));
      if (config.biases == Biases::all) replicated(name + ".bias", s.d_out);
    };
    norm("attention.norm", config.dim, config.stream_norm);
    for (const char* name : {"attention.query", "attention.key", "attention.value"})
      tables(name, MemoryGroup::attention);
    norm("ffn.norm", config.dim, config.stream_norm);
    tables("ffn.in", MemoryGroup::ffn_in);
    norm("ffn.inner_norm", memory_shape(config, MemoryGroup::ffn_in).d_out, StreamNorm::layernorm);
    tables("ffn.out", MemoryGroup::ffn_out);
    return specs;
  }

  bool weights_by_heads() const override { return false; }

  std::unique_ptr<Growth> growth(const ModelConfig& before, const GrowthRequest& request) const override {
    return memoryformer_growth(before, request);
  }

  std::unique_ptr<LanguageModel> make(const ModelPlace& place) const override {
    return std::make_unique<MemoryFormer>(place);
  }

  /// A row of each table for one token: K d_out multiply-adds.
  std::vector<ModelPart> block_parts(const ModelConfig& config) const override {
    const auto tables = [&](const char* part, MemoryGroup group) {
      const MemoryShape s = memory_shape(config, group);
      return ModelPart{part, s.rows() * s.d_out + (config.biases == Biases::all ? s.d_out : 0),
                       static_cast<double>(s.tables * s.d_out)};
    };
    const std::int64_t norm = config.stream_norm == StreamNorm::layernorm ? 2 : 1;
    return {tables("query", MemoryGroup::attention),
            tables("key", MemoryGroup::attention),
            tables("value", MemoryGroup::attention),
            tables("ffn in", MemoryGroup::ffn_in),
            tables("ffn out", MemoryGroup::ffn_out),
            {"norms", 2 * norm * config.dim + 2 * memory_shape(config, MemoryGroup::ffn_in).d_out, 0}};
  }

  void add_block_exchanges(Exchanges& to, const ModelConfig& config, const ShardPlan& plan,
                           const BlockPass& pass) const override {
    const auto e = static_cast<std::int64_t>(size_of(pass.dtype));
    const std::int64_t layers = config.layers, d = config.dim, T = pass.rows;
    const std::int64_t width = memory_shape(config, MemoryGroup::ffn_in).d_out;
    const std::int64_t c = plan.heads.count(pass.tp_rank) * config.head_dim();
    const std::int64_t forward = layers * (pass.saves.recompute == Recompute::block ? 2 : 1);
    const auto add = [&](const char* what, Collective kind, std::int64_t calls, std::int64_t elements) {
      to.add(what, MeshAxis::tp, kind, calls, elements * T * e);
    };
    add("heads", Collective::all_gather, forward, forward * c);
    add("q, k, v, backward", Collective::all_gather, layers, layers * 3 * c);
    if (plan.shards) {
      const std::int64_t k = plan.shards->deal.count(pass.tp_rank);
      add("q, k, v", Collective::all_gather, forward, forward * k * 3 * d);
      add("memory block", Collective::all_gather, 2 * forward, forward * k * (width + d));
      add("inputs, backward", Collective::all_gather, 3 * layers, layers * k * (2 * d + width));
      return;
    }
    add("q, k, v", Collective::reduce_scatter, forward, forward * 3 * d);
    add("memory block", Collective::all_reduce, 2 * forward, forward * (width + d));
    add("inputs, backward", Collective::all_reduce, 3 * layers, layers * (2 * d + width));
  }

 private:
  static std::string first_tables(MemoryGroup group) {
    switch (group) {
      case MemoryGroup::attention: return "layers.0.attention.query.tables";
      case MemoryGroup::ffn_in: return "layers.0.ffn.in.tables";
      case MemoryGroup::ffn_out: return "layers.0.ffn.out.tables";
    }
    return {};
  }
};

}  // namespace

const ModelKind& memoryformer_kind() {
  static const MemoryFormerKind kind;
  return kind;
}

}  // namespace tforge
