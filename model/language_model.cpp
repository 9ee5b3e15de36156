#include "model/language_model.h"

#include "autograd/ops/attention.h"
#include "autograd/ops/embedding.h"
#include "autograd/ops/layer_norm.h"
#include "autograd/ops/recompute.h"
#include "autograd/ops/residual.h"
#include "autograd/ops/rms_norm.h"
#include "core/errors.h"
#include "kernels/elementwise.h"
#include "kernels/random.h"
#include "kernels/rotary.h"
#include "model/models.h"
#include "parallel/ops/copy_to.h"
#include "parallel/ops/gather_columns.h"
#include "parallel/ops/reduce_from.h"
#include "parallel/tp_reducer.h"

namespace tforge {

LanguageModel::LanguageModel(const ModelPlace& place)
    : config_(place.config),
      plan_(place.plan),
      tp_(place.tp),
      allocator_(place.allocator),
      parameters_(place.allocator, parameter_specs(config_, plan_), place.dtype, place.tp.rank()),
      embedding_(parameter("embedding")),
      head_(parameter(config_.head == Head::tied ? "embedding" : "head")),
      final_norm_(norm_at("final_norm")) {
  if (plan_.shards) reducer_ = std::make_unique<ShardReducer>(allocator_, tp_, plan_.shards->deal);
  else reducer_ = std::make_unique<TpReducer>(tp_);

  const Shape table{config_.max_seq, config_.rotary_dim() / 2};
  cosine_ = Tensor::empty(allocator_, table, compute_dtype(place.dtype), Purpose::weights);
  sine_ = Tensor::empty(allocator_, table, compute_dtype(place.dtype), Purpose::weights);
  if (config_.rotary_dim() > 0) kernels::rotary_tables(place.stream, config_.rotary_base, cosine_.view(), sine_.view());

  attention_ = make_attention(allocator_, place.stream, config_, place.dtype, local_heads(), parameters_);

  std::vector<std::int64_t> heads, vocab;
  for (int r = 0; r < tp_.size(); ++r) {
    heads.push_back(plan_.heads.count(r) * config_.head_dim());
    vocab.push_back(plan_.vocab.count(r));
  }
  head_columns_.groups = {heads};
  vocab_columns_.groups = {vocab};
}

void LanguageModel::initialise(std::uint64_t seed) {
  Stream stream;
  Allocator host;
  for (Parameter& p : parameters_.all()) {
    const std::string& path = p.path();
    Birth b;
    if (path == "final_norm.weight") b = {1.0, 0.0};
    else if (is_attention_slots(path)) b = {0.0, attention_slots_deviation(config_)};
    else if (path != "final_norm.bias") b = birth(path);
    // On the host, so that the values have the same bits on every device.
    Tensor value = p.value();
    if (value.device() != Device::cpu) value = Tensor::empty(host, value.shape(), value.dtype(), Purpose::staging);
    if (b.deviation == 0) {
      kernels::fill(stream, value.view(), b.constant);
    } else {
      kernels::fill_normal(stream, seed, path, p.first_row, b.deviation, GradMode::overwrite, value.view());
    }
    if (p.value().device() != Device::cpu) p.value().assign(value);
  }
  values_changed();
}

void LanguageModel::values_changed() {
  Stream stream = allocator_.stream();
  parameters_.round(stream);
}

void LanguageModel::set_state_number(const StateNumber& number) {
  throw InternalError("a model of kind {} has no '{}' of {}", config_.kind, number.name, number.parameter);
}

void LanguageModel::set_state_permutations(const StatePermutations& first) {
  throw InternalError("a model of kind {} has no permutations '{}'", config_.kind, first.path);
}

Var LanguageModel::embed(Tape& tape, const Tensor& tokens, LookupSync* lookup) {
  const Var table = lookup == nullptr ? embedding_ : Var(embedding_.value());
  const Var h = completed(
      tape, embedding(tape, tokens, table, plan_.vocab.begin(tp_.rank()), plan_.vocab_shards(tp_.rank()), *reducer_));
  return lookup == nullptr ? h : lookup->leaf(h.value(), tokens);
}

Var LanguageModel::completed(Tape& tape, Var partial) {
  return reducer_->by_shard() ? partial : reduce_from(tape, std::move(partial), tp_);
}

Var LanguageModel::shared(Tape& tape, const Var& x) { return reducer_->by_shard() ? x : copy_to(tape, x, tp_); }

Var LanguageModel::gather_heads(Tape& tape, const Var& x) {
  return gather_columns(tape, x, head_columns_, tp_, reducer_->by_shard() ? Incoming::complete : Incoming::partial);
}

HeadShards LanguageModel::head_shards() const { return {plan_.vocab_shards(tp_.rank()), config_.vocab}; }

Var LanguageModel::block(Tape& tape, Var h, std::int64_t layer, std::int64_t seq) {
  Var qkv = attention_input(tape, h, layer);
  qkv = rotary(tape, std::move(qkv), cosine_, sine_, local_heads(), seq);
  Var a = attention_->forward(tape, qkv, h.shape().rows() / seq, layer);
  qkv = {};
  h = residual(tape, h, attention_output(tape, std::move(a), layer));
  a = {};
  return residual(tape, h, feed_forward(tape, h, layer));
}

Var LanguageModel::hidden(Tape& tape, const Tensor& tokens, std::int64_t batch, std::vector<Tensor>* blocks,
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

LanguageModel::Norm LanguageModel::norm_at(const std::string& path) {
  const bool has_bias = config_.stream_norm == StreamNorm::layernorm;
  return {parameter(path + ".weight"), has_bias ? parameter(path + ".bias") : Var()};
}

Var LanguageModel::normalised(Tape& tape, const Var& h, const Norm& norm) {
  return norm.bias ? layer_norm(tape, h, norm.weight, norm.bias, config_.layernorm_eps)
                   : rms_norm(tape, h, norm.weight, config_.rmsnorm_eps);
}

Var LanguageModel::finally_normalised(Tape& tape, const Var& h) {
  return shared(tape, normalised(tape, h, final_norm_));
}

HeadLoss LanguageModel::loss(Tape& tape, const Tensor& tokens, const Tensor& targets, std::int64_t batch, double weight,
                             LookupSync* lookup) {
  const Var x = finally_normalised(tape, hidden(tape, tokens, batch, nullptr, lookup));
  return head_cross_entropy(tape, x, head_, targets, plan_.vocab.begin(tp_.rank()), weight, *reducer_, head_shards());
}

Tensor LanguageModel::nll(Tape& tape, const Tensor& tokens, const Tensor& targets, std::int64_t batch) {
  const Var x = finally_normalised(tape, hidden(tape, tokens, batch));
  return head_nll(tape, x, head_, targets, plan_.vocab.begin(tp_.rank()), *reducer_, head_shards());
}

Tensor LanguageModel::whole_logits(Tape& tape, const Var& h) {
  const Var x = finally_normalised(tape, h);
  return gather_columns(tape, Var(head_logits(tape, x, head_)), vocab_columns_, tp_).value();
}

Tensor LanguageModel::logits(Tape& tape, const Tensor& tokens, std::int64_t batch, std::vector<Tensor>* blocks) {
  return whole_logits(tape, hidden(tape, tokens, batch, blocks));
}

KvCache LanguageModel::make_cache(std::int64_t batch, std::int64_t capacity) {
  if (capacity > config_.max_seq) {
    throw ConfigError("a cache of {} positions for a model trained on {}", capacity, config_.max_seq);
  }
  KvCache cache;
  cache.batch_ = batch;
  cache.capacity_ = capacity;
  for (std::int64_t layer = 0; layer < config_.layers; ++layer) {
    cache.layers_.push_back(attention_->make_memory(allocator_, batch, capacity));
  }
  return cache;
}

Tensor LanguageModel::extend(Tape& tape, const Tensor& tokens, KvCache& cache) {
  Stream& stream = tape.stream();
  const std::int64_t batch = cache.batch_, n = tokens.elements() / std::max<std::int64_t>(batch, 1);
  if (n < 1 || n * batch != tokens.elements() || cache.length_ + n > cache.capacity_) {
    throw InternalError("{} tokens for a cache of {} sequences with {} of {} positions used", tokens.elements(), batch,
                        cache.length_, cache.capacity_);
  }
  const std::int64_t heads = local_heads(), c = heads * config_.head_dim();
  Var h = embed(tape, tokens);
  for (std::int64_t layer = 0; layer < config_.layers; ++layer) {
    Var qkv = attention_input(tape, h, layer);
    if (config_.rotary_dim() > 0) {
      kernels::rotary_apply(stream, kernels::RotaryDirection::forward, static_cast<const Tensor&>(cosine_).view(),
                            static_cast<const Tensor&>(sine_).view(), 2 * heads, n, cache.length_,
                            qkv.value().view().column_range(0, 2 * c));
    }
    Tensor out = attention_->extend(tape, qkv.value(), batch, layer, cache.length_, cache.capacity_,
                                    cache.layers_[static_cast<std::size_t>(layer)]);
    h = residual(tape, h, attention_output(tape, Var(std::move(out)), layer));
    h = residual(tape, h, feed_forward(tape, h, layer));
  }
  cache.length_ += n;
  Tensor last = tape.empty(Shape{batch, config_.dim}, parameters_.compute());
  for (std::int64_t b = 0; b < batch; ++b) {
    kernels::add_to(stream, h.view().row_range(b * n + n - 1, 1), GradMode::overwrite, last.view().row_range(b, 1));
  }
  return whole_logits(tape, Var(std::move(last)));
}

}  // namespace tforge
