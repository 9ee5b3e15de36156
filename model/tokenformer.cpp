#include "model/tokenformer.h"

#include <cmath>

#include "autograd/ops/attention.h"
#include "autograd/ops/embedding.h"
#include "autograd/ops/layer_norm.h"
#include "autograd/ops/recompute.h"
#include "autograd/ops/residual.h"
#include "core/errors.h"
#include "kernels/attention.h"
#include "kernels/elementwise.h"
#include "kernels/random.h"
#include "kernels/rotary.h"
#include "parallel/ops/copy_to.h"
#include "parallel/ops/gather_columns.h"
#include "parallel/ops/reduce_from.h"
#include "parallel/ops/reduce_scatter_columns.h"
#include "parallel/ops/split_columns.h"
#include "parallel/tp_reducer.h"

namespace tforge {

namespace {

std::string plan_key(TokenGroup group) { return fmt::format("model.tokens.{}", name_of(group)); }

void split_heads_and_vocab(ShardPlan& plan, const ModelConfig& config, int tp) {
  plan.heads = ShardBorders::even(config.heads, tp, "model.heads");
  plan.vocab = ShardBorders::even(config.vocab, tp, "model.vocab");
}

}  // namespace

ShardPlan ShardPlan::even(const ModelConfig& config, int tp) {
  ShardPlan plan;
  for (const TokenGroup group : kTokenGroups) {
    plan.tokens[static_cast<std::size_t>(group)] = ShardBorders::even(config.num_tokens(group), tp, plan_key(group));
  }
  split_heads_and_vocab(plan, config, tp);
  return plan;
}

ShardPlan ShardPlan::append(const ModelConfig& config, int tp, const std::array<ShardBorders, 5>& old_tokens) {
  ShardPlan plan;
  for (const TokenGroup group : kTokenGroups) {
    const auto g = static_cast<std::size_t>(group);
    plan.tokens[g] = ShardBorders::append(old_tokens[g], config.num_tokens(group), tp, plan_key(group));
  }
  split_heads_and_vocab(plan, config, tp);
  return plan;
}

ShardPlan ShardPlan::dealt(const ModelConfig& config, int shards, int tp) {
  if (tp > shards) {
    throw ConfigError("parallel.virtual_tp = {} shards cannot be dealt to {} tensor-parallel ranks; use at most {}",
                      shards, tp, shards);
  }
  const auto cut = [shards](std::int64_t rows, const std::string& what) {
    if (rows < shards) {
      throw ConfigError("{} = {} cannot be cut into parallel.virtual_tp = {} shards; use fewer shards", what, rows,
                        shards);
    }
    return ShardBorders::even(rows, shards, what);
  };
  ShardPlan plan;
  split_heads_and_vocab(plan, config, tp);
  VirtualShards& cuts = plan.shards.emplace();
  cuts.deal = ShardBorders::even(shards, tp, "parallel.virtual_tp");
  for (const TokenGroup group : kTokenGroups) {
    const auto g = static_cast<std::size_t>(group);
    cuts.tokens[g] = cut(config.num_tokens(group), plan_key(group));
    plan.tokens[g] = ShardBorders::of_ranks(cuts.tokens[g], cuts.deal);
  }
  cuts.vocab = cut(config.vocab, "model.vocab");
  plan.vocab = ShardBorders::of_ranks(cuts.vocab, cuts.deal);
  return plan;
}

namespace {

RowShards shards_of_rank(const ShardBorders& shards, const ShardBorders& deal, int rank) {
  return RowShards(
      std::span(shards.borders)
          .subspan(static_cast<std::size_t>(deal.begin(rank)), static_cast<std::size_t>(deal.count(rank)) + 1));
}

}  // namespace

RowShards ShardPlan::token_shards(TokenGroup group, int rank) const {
  return shards ? shards_of_rank(shards->tokens[static_cast<std::size_t>(group)], shards->deal, rank) : RowShards();
}

RowShards ShardPlan::vocab_shards(int rank) const {
  return shards ? shards_of_rank(shards->vocab, shards->deal, rank) : RowShards();
}

std::string TokenFormer::layer_path(std::int64_t layer, TokenGroup group) {
  return group == TokenGroup::ffn ? fmt::format("layers.{}.ffn", layer)
                                  : fmt::format("layers.{}.attention.{}", layer, name_of(group));
}

double TokenFormer::value_deviation(const ModelConfig& config) {
  return 2.0 / (static_cast<double>(config.layers) * std::sqrt(static_cast<double>(config.dim)));
}

std::vector<ParameterSpec> TokenFormer::specs(const ModelConfig& config, const ShardPlan& plan) {
  std::vector<ParameterSpec> specs;
  specs.push_back(
      {"embedding", Shape{config.vocab, config.dim}, Placement::sharded, plan.vocab, Decay::yes, Bucketing::alone});
  if (plan.shards) specs.back().shards = plan.shards->vocab;
  for (std::int64_t layer = 0; layer < config.layers; ++layer) {
    for (const TokenGroup group : kTokenGroups) {
      for (const char* role : {".keys", ".values"}) {
        const auto g = static_cast<std::size_t>(group);
        specs.push_back({layer_path(layer, group) + role, Shape{config.num_tokens(group), config.dim},
                         Placement::sharded, plan.tokens[g], Decay::yes});
        if (plan.shards) specs.back().shards = plan.shards->tokens[g];
      }
    }
  }
  specs.push_back({"final_norm.weight", Shape{config.dim}, Placement::replicated, {}, Decay::no});
  specs.push_back({"final_norm.bias", Shape{config.dim}, Placement::replicated, {}, Decay::no});
  return specs;
}

TokenFormer::TokenFormer(Allocator& allocator, Stream& stream, const ModelConfig& config, DType dtype, Communicator& tp,
                         const ShardPlan& plan)
    : config_(config), plan_(plan), tp_(tp), allocator_(allocator) {
  config_.validate();
  if (plan_.shards) reducer_ = std::make_unique<ShardReducer>(allocator, tp, plan_.shards->deal);
  else reducer_ = std::make_unique<TpReducer>(tp);
  parameters_ = std::make_unique<ParameterSet>(allocator, specs(config_, plan_), dtype, tp.rank());
  scales_.resize(static_cast<std::size_t>(config_.layers));
  layers_.resize(static_cast<std::size_t>(config_.layers));
  for (std::int64_t layer = 0; layer < config_.layers; ++layer) {
    for (const TokenGroup group : kTokenGroups) {
      const std::string path = layer_path(layer, group);
      layers_[static_cast<std::size_t>(layer)].tokens[static_cast<std::size_t>(group)] = {
          parameters_->find(path + ".keys").var, parameters_->find(path + ".values").var, 1.0,
          plan_.token_shards(group, tp.rank())};
      set_scale(layer, group, initial_scale(config_.norm, config_.num_tokens(group)));
    }
  }
  embedding_ = parameters_->find("embedding").var;
  final_weight_ = parameters_->find("final_norm.weight").var;
  final_bias_ = parameters_->find("final_norm.bias").var;

  const Shape table{config_.max_seq, config_.rotary_dim() / 2};
  cosine_ = Tensor::empty(allocator, table, dtype, Purpose::weights);
  sine_ = Tensor::empty(allocator, table, dtype, Purpose::weights);
  if (config_.rotary_dim() > 0) kernels::rotary_tables(stream, config_.rotary_base, cosine_.view(), sine_.view());

  std::vector<std::int64_t> heads, vocab;
  for (int r = 0; r < tp.size(); ++r) {
    heads.push_back(plan_.heads.count(r) * config_.head_dim());
    vocab.push_back(plan_.vocab.count(r));
  }
  head_columns_.groups = {heads};
  vocab_columns_.groups = {vocab};
  qkv_columns_.groups = {heads, heads, heads};
  // With virtual shards rows are normalised before they are cut into heads.
  qkv_columns_.common = config_.norm == PattentionNorm::l2_norm_gelu || reducer_->by_shard() ? 0 : 3;
}

void TokenFormer::initialise(std::uint64_t seed) {
  Stream stream;
  for (Parameter& p : parameters_->all()) {
    const std::string& path = p.path();
    if (path == "final_norm.weight") kernels::fill(stream, p.value().view(), 1.0);
    else if (path == "final_norm.bias") kernels::fill(stream, p.value().view(), 0.0);
    else {
      const double deviation = path.ends_with(".values") ? value_deviation(config_) : key_deviation();
      kernels::fill_normal(stream, seed, path, p.first_row, deviation, GradMode::overwrite, p.value().view());
    }
  }
  for (std::int64_t layer = 0; layer < config_.layers; ++layer) {
    for (const TokenGroup group : kTokenGroups) {
      set_scale(layer, group, initial_scale(config_.norm, config_.num_tokens(group)));
    }
  }
}

double TokenFormer::scale(std::int64_t layer, TokenGroup group) const {
  return scales_[static_cast<std::size_t>(layer)][static_cast<std::size_t>(group)];
}

void TokenFormer::set_scale(std::int64_t layer, TokenGroup group, double scale) {
  scales_[static_cast<std::size_t>(layer)][static_cast<std::size_t>(group)] = scale;
  layers_[static_cast<std::size_t>(layer)].tokens[static_cast<std::size_t>(group)].scale = scale;
}

PattentionTokens TokenFormer::tokens_of(std::int64_t layer, TokenGroup group) const {
  return layers_[static_cast<std::size_t>(layer)].tokens[static_cast<std::size_t>(group)];
}

Var TokenFormer::embed(Tape& tape, const Tensor& tokens, LookupSync* lookup) {
  const Var table = lookup == nullptr ? embedding_ : Var(embedding_.value());
  const Var h = completed(
      tape, embedding(tape, tokens, table, plan_.vocab.begin(tp_.rank()), plan_.vocab_shards(tp_.rank()), *reducer_));
  return lookup == nullptr ? h : lookup->leaf(h.value(), tokens);
}

/// Tells the heartbeats which layer is computed, by the first parameter of `group` (see specs()).
void TokenFormer::enter(std::int64_t layer, TokenGroup group) const {
  constexpr std::size_t kGroups = std::size(kTokenGroups);
  const std::size_t before = 1 + 2 * (static_cast<std::size_t>(layer) * kGroups + static_cast<std::size_t>(group));
  set_place(parameters_->all()[before].path());
}

Var TokenFormer::completed(Tape& tape, Var partial) {
  return reducer_->by_shard() ? partial : reduce_from(tape, std::move(partial), tp_);
}

Var TokenFormer::shared(Tape& tape, const Var& x) { return reducer_->by_shard() ? x : copy_to(tape, x, tp_); }

Var TokenFormer::gather_heads(Tape& tape, const Var& x) {
  return gather_columns(tape, x, head_columns_, tp_, reducer_->by_shard() ? Incoming::complete : Incoming::partial);
}

HeadShards TokenFormer::head_shards() const { return {plan_.vocab_shards(tp_.rank()), config_.vocab}; }

/// [q | k | v] of this rank's heads, before rotation.
Var TokenFormer::attention_input(Tape& tape, const Var& h, std::int64_t layer) {
  enter(layer, TokenGroup::query);
  const Var u = shared(tape, layer_norm(tape, h, {}, {}, config_.layernorm_eps));
  const std::array<PattentionTokens, 3> qkv = {tokens_of(layer, TokenGroup::query), tokens_of(layer, TokenGroup::key),
                                               tokens_of(layer, TokenGroup::value)};
  const std::array<double, 3> scales = {qkv[0].scale, qkv[1].scale, qkv[2].scale};
  const Var partial = pattention(tape, u, qkv, config_.norm, *reducer_);
  if (reducer_->by_shard()) {
    return split_columns(tape, row_normalize(tape, partial, scales, config_.norm), qkv_columns_, tp_);
  }
  return row_normalize(tape, reduce_scatter_columns(tape, partial, qkv_columns_, tp_), scales, config_.norm);
}

/// One Pattention from the whole width to the whole width; x's gradient is partial.
Var TokenFormer::project(Tape& tape, const Var& x, std::int64_t layer, TokenGroup group) {
  enter(layer, group);
  const std::array<PattentionTokens, 1> tokens = {tokens_of(layer, group)};
  const std::array<double, 1> scales = {tokens[0].scale};
  return row_normalize(tape, completed(tape, pattention(tape, x, tokens, config_.norm, *reducer_)), scales,
                       config_.norm);
}

Var TokenFormer::block(Tape& tape, Var h, std::int64_t layer, std::int64_t seq) {
  Var qkv = attention_input(tape, h, layer);
  qkv = rotary(tape, std::move(qkv), cosine_, sine_, local_heads(), seq);
  Var a = causal_attention(tape, qkv, h.shape().rows() / seq, local_heads());
  qkv = {};
  a = gather_heads(tape, a);
  h = residual(tape, h, project(tape, a, layer, TokenGroup::proj));
  a = {};
  const Var u = shared(tape, layer_norm(tape, h, {}, {}, config_.layernorm_eps));
  return residual(tape, h, project(tape, u, layer, TokenGroup::ffn));
}

Var TokenFormer::hidden(Tape& tape, const Tensor& tokens, std::int64_t batch, std::vector<Tensor>* blocks,
                        LookupSync* lookup) {
  const std::int64_t seq = tokens.elements() / std::max<std::int64_t>(batch, 1);
  if (batch < 1 || seq * batch != tokens.elements() || seq > config_.max_seq) {
    throw ShapeError("a model of at most {} positions was given {} tokens in {} sequences", config_.max_seq,
                     tokens.elements(), batch);
  }
  Var h = embed(tape, tokens, lookup);
  const bool again = tape.saves().recompute == Recompute::block;
  for (std::int64_t layer = 0; layer < config_.layers; ++layer) {
    const auto run = [this, layer, seq](Tape& on, Var x) { return block(on, std::move(x), layer, seq); };
    h = again ? recomputed(tape, std::move(h), run) : run(tape, std::move(h));
    if (blocks != nullptr) blocks->push_back(h.value().clone(allocator_));
  }
  return h;
}

Var TokenFormer::final_norm(Tape& tape, const Var& h) {
  return shared(tape, layer_norm(tape, h, final_weight_, final_bias_, config_.layernorm_eps));
}

HeadLoss TokenFormer::loss(Tape& tape, const Tensor& tokens, const Tensor& targets, std::int64_t batch, double weight,
                           LookupSync* lookup) {
  const Var x = final_norm(tape, hidden(tape, tokens, batch, nullptr, lookup));
  return head_cross_entropy(tape, x, embedding_, targets, plan_.vocab.begin(tp_.rank()), weight, *reducer_,
                            head_shards());
}

Tensor TokenFormer::nll(Tape& tape, const Tensor& tokens, const Tensor& targets, std::int64_t batch) {
  const Var x = final_norm(tape, hidden(tape, tokens, batch));
  return head_nll(tape, x, embedding_, targets, plan_.vocab.begin(tp_.rank()), *reducer_, head_shards());
}

Tensor TokenFormer::whole_logits(Tape& tape, const Var& h) {
  const Var x = final_norm(tape, h);
  return gather_columns(tape, Var(head_logits(tape, x, embedding_)), vocab_columns_, tp_).value();
}

Tensor TokenFormer::logits(Tape& tape, const Tensor& tokens, std::int64_t batch, std::vector<Tensor>* blocks) {
  return whole_logits(tape, hidden(tape, tokens, batch, blocks));
}

KvCache TokenFormer::make_cache(std::int64_t batch, std::int64_t capacity) {
  if (capacity > config_.max_seq) {
    throw ConfigError("a cache of {} positions for a model trained on {}", capacity, config_.max_seq);
  }
  KvCache cache;
  cache.batch_ = batch;
  cache.capacity_ = capacity;
  const Shape shape{batch * capacity, local_heads() * config_.head_dim()};
  for (std::int64_t layer = 0; layer < config_.layers; ++layer) {
    cache.keys_.push_back(Tensor::zeros(allocator_, shape, dtype(), Purpose::activations));
    cache.values_.push_back(Tensor::zeros(allocator_, shape, dtype(), Purpose::activations));
  }
  return cache;
}

Tensor TokenFormer::extend(Tape& tape, const Tensor& tokens, KvCache& cache) {
  Stream& stream = tape.stream();
  const std::int64_t batch = cache.batch_, n = tokens.elements() / std::max<std::int64_t>(batch, 1);
  if (n < 1 || n * batch != tokens.elements() || cache.length_ + n > cache.capacity_) {
    throw InternalError("{} tokens for a cache of {} sequences with {} of {} positions used", tokens.elements(), batch,
                        cache.length_, cache.capacity_);
  }
  const std::int64_t heads = local_heads(), c = heads * config_.head_dim();
  const kernels::AttentionShape shape{batch, heads, n, cache.length_ + n, cache.capacity_};
  Tensor workspace =
      tape.empty(Shape{kernels::attention_workspace(shape, config_.head_dim())}, dtype(), Purpose::workspace);
  Var h = embed(tape, tokens);
  for (std::int64_t layer = 0; layer < config_.layers; ++layer) {
    Var qkv = attention_input(tape, h, layer);
    Tensor& keys = cache.keys_[static_cast<std::size_t>(layer)];
    Tensor& values = cache.values_[static_cast<std::size_t>(layer)];
    if (config_.rotary_dim() > 0) {
      kernels::rotary_apply(stream, kernels::RotaryDirection::forward, static_cast<const Tensor&>(cosine_).view(),
                            static_cast<const Tensor&>(sine_).view(), 2 * heads, n, cache.length_,
                            qkv.value().view().column_range(0, 2 * c));
    }
    for (std::int64_t b = 0; b < batch; ++b) {
      const ConstTensorView rows = qkv.view().row_range(b * n, n);
      const std::int64_t at = b * cache.capacity_ + cache.length_;
      kernels::add_to(stream, rows.column_range(c, c), GradMode::overwrite, keys.view().row_range(at, n));
      kernels::add_to(stream, rows.column_range(2 * c, c), GradMode::overwrite, values.view().row_range(at, n));
    }
    Tensor out = tape.empty(Shape{batch * n, c}, dtype());
    kernels::causal_attention_forward(stream, shape, qkv.view().column_range(0, c),
                                      static_cast<const Tensor&>(keys).view(),
                                      static_cast<const Tensor&>(values).view(), out.view(), {}, workspace.view());
    const Var a = gather_heads(tape, Var(std::move(out)));
    h = residual(tape, h, project(tape, a, layer, TokenGroup::proj));
    const Var u = shared(tape, layer_norm(tape, h, {}, {}, config_.layernorm_eps));
    h = residual(tape, h, project(tape, u, layer, TokenGroup::ffn));
  }
  cache.length_ += n;
  Tensor last = tape.empty(Shape{batch, config_.dim}, dtype());
  for (std::int64_t b = 0; b < batch; ++b) {
    kernels::add_to(stream, h.view().row_range(b * n + n - 1, 1), GradMode::overwrite, last.view().row_range(b, 1));
  }
  return whole_logits(tape, Var(std::move(last)));
}

}  // namespace tforge
