#pragma once
// TokenFormer (arXiv 2410.23168) exactly as its public code: pre-norm blocks whose every projection is a Pattention.
//
//   h0 = E[tokens]
//   for each layer:  u = LN0(h)                                       LN0: LayerNorm without parameters
//                    q, k, v = Patt_q(u), Patt_k(u), Patt_v(u);       rotary on the first rotary_dim of each head of q,
//                    k h = h + Patt_proj(attention(q, k, v)) h = h + Patt_ffn(LN0(h))
//   logits = LN_final(h) E^T                                          tied head, LayerNorm with weight and bias
//
// Over the tensor-parallel axis: parameter tokens, attention heads and vocabulary rows are sharded by rows; hidden
// states are replicated. Collectives of a layer, forward: one all-reduce of [T, 3] and one reduce-scatter of [T, 3 d]
// for q, k, v; one all-gather of [T, d]; one all-reduce of [T, d] (plus row numbers) each for proj and ffn.
// With virtual shards (ShardPlan::dealt) an op computes each shard that the rank holds apart and all-gathers what the
// shards give, to add it in the order of the shards; q, k, v and the heads' gradients are then cut, and nothing sent.
#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "autograd/ops/head_cross_entropy.h"
#include "autograd/ops/pattention.h"
#include "autograd/tape.h"
#include "model/config.h"
#include "model/parameter.h"
#include "parallel/communicator.h"
#include "parallel/grad_sync.h"
#include "parallel/ops/column_plan.h"
#include "parallel/shard.h"

namespace tforge {

/// What the ranks of tp hold when nothing may depend on how many they are: whole virtual shards, cut by the shapes
/// alone.
struct VirtualShards {
  ShardBorders deal;                   // of the shards, by rank
  std::array<ShardBorders, 5> tokens;  // by TokenGroup, of the rows by shard
  ShardBorders vocab;
};

/// Which rows of what each tensor-parallel rank owns.
struct ShardPlan {
  std::array<ShardBorders, 5> tokens;  // by TokenGroup, the same in all layers
  ShardBorders vocab;
  ShardBorders heads;
  std::optional<VirtualShards> shards;  // if they decide about tokens and vocab

  /// Even splits. Throws ConfigError when tp is larger than a token count, the heads or the vocabulary.
  static ShardPlan even(const ModelConfig& config, int tp);
  /// Parameter tokens: old ranks keep their rows, added ranks own the added tokens (ShardBorders::append); heads and
  /// vocabulary are split evenly. Throws ConfigError.
  static ShardPlan append(const ModelConfig& config, int tp, const std::array<ShardBorders, 5>& old_tokens);
  /// `shards` virtual shards, evenly cut and evenly dealt; heads are split evenly over the ranks, as each is computed
  /// apart from the others. Throws ConfigError when there are fewer shards than ranks, or more than tokens or words.
  static ShardPlan dealt(const ModelConfig& config, int shards, int tp);
  /// The shards of the rows that a rank owns of a group, or of the vocabulary: of this plan's memory.
  RowShards token_shards(TokenGroup group, int rank) const;
  RowShards vocab_shards(int rank) const;
};

/// Keys and values of the positions seen so far, for generation.
class KvCache {
 public:
  std::int64_t length() const { return length_; }
  std::int64_t capacity() const { return capacity_; }
  std::int64_t batch() const { return batch_; }
  /// Forgets everything from position `length` on.
  void truncate(std::int64_t length) { length_ = std::min(length, length_); }

 private:
  friend class TokenFormer;
  std::int64_t batch_ = 0, capacity_ = 0, length_ = 0;
  std::vector<Tensor> keys_, values_;  // a layer: [batch * capacity, heads here * head_dim]
};

class TokenFormer {
 public:
  /// The parameters of a model of that configuration.
  static std::vector<ParameterSpec> specs(const ModelConfig& config, const ShardPlan& plan);

  /// Parameters are allocated and zero; see initialise(). `tp` must outlive the model.
  /// Throws ConfigError when the configuration is not valid.
  TokenFormer(Allocator& allocator, Stream& stream, const ModelConfig& config, DType dtype, Communicator& tp,
              const ShardPlan& plan);

  const ModelConfig& config() const { return config_; }
  const ShardPlan& plan() const { return plan_; }
  ParameterSet& parameters() { return *parameters_; }
  const ParameterSet& parameters() const { return *parameters_; }
  DType dtype() const { return parameters_->dtype(); }
  /// How its ops reduce over the tensor-parallel axis.
  Reducer& reducer() { return *reducer_; }

  /// Published initialisation: keys and embedding N(0, 0.02^2), values N(0, (2 / (L sqrt(d)))^2), final LayerNorm 1 and
  /// 0, scales from the token counts.
  void initialise(std::uint64_t seed);
  /// The standard deviations of that initialisation.
  static double key_deviation() { return 0.02; }
  static double value_deviation(const ModelConfig& config);

  /// The stored scale of a layer.
  double scale(std::int64_t layer, TokenGroup group) const;
  void set_scale(std::int64_t layer, TokenGroup group, double scale);
  /// "layers.3.attention.query" or "layers.3.ffn": the path of a Pattention; its parameters add ".keys", ".values".
  static std::string layer_path(std::int64_t layer, TokenGroup group);

  /// Output of the last block, [T, d] replicated, for tokens [T] i32 of `batch` sequences of T / batch tokens.
  /// `blocks`, when given, receives a copy of the output of every block; with `lookup` the gradient of the looked-up
  /// rows goes there instead of into the embedding's.
  Var hidden(Tape& tape, const Tensor& tokens, std::int64_t batch, std::vector<Tensor>* blocks = nullptr,
             LookupSync* lookup = nullptr);
  /// weight * sum of the negative log-likelihoods of targets [T] i32 (< 0: ignored). `lookup` as above.
  HeadLoss loss(Tape& tape, const Tensor& tokens, const Tensor& targets, std::int64_t batch, double weight,
                LookupSync* lookup = nullptr);
  /// Negative log-likelihood [T] f64 of each target, without gradients (tape in inference mode).
  Tensor nll(Tape& tape, const Tensor& tokens, const Tensor& targets, std::int64_t batch);
  /// Logits of every position, [T, vocab], whole on every rank. For comparisons of small models.
  Tensor logits(Tape& tape, const Tensor& tokens, std::int64_t batch, std::vector<Tensor>* blocks = nullptr);

  /// An empty cache for `batch` sequences of up to `capacity` positions. Throws ConfigError when capacity > max_seq.
  KvCache make_cache(std::int64_t batch, std::int64_t capacity);
  /// Appends tokens [batch * n] i32 (n each, sequence by sequence) to the cache and returns the logits of the last
  /// position of each sequence, [batch, vocab], whole on every rank. Throws InternalError when the cache is full.
  Tensor extend(Tape& tape, const Tensor& tokens, KvCache& cache);

 private:
  struct Layer {
    std::array<PattentionTokens, 5> tokens;  // by TokenGroup
  };
  PattentionTokens tokens_of(std::int64_t layer, TokenGroup group) const;
  /// One layer of hidden(): h [T, d] of sequences of `seq` tokens.
  Var block(Tape& tape, Var h, std::int64_t layer, std::int64_t seq);
  void enter(std::int64_t layer, TokenGroup group) const;
  Var attention_input(Tape& tape, const Var& h, std::int64_t layer);
  Var project(Tape& tape, const Var& x, std::int64_t layer, TokenGroup group);
  Var embed(Tape& tape, const Tensor& tokens, LookupSync* lookup = nullptr);
  Var final_norm(Tape& tape, const Var& h);
  Tensor whole_logits(Tape& tape, const Var& h);
  /// Completes what an op gives over the tensor-parallel axis, and hands it a value whose gradient will be complete:
  /// with virtual shards ops do both.
  Var completed(Tape& tape, Var partial);
  Var shared(Tape& tape, const Var& x);
  Var gather_heads(Tape& tape, const Var& x);
  HeadShards head_shards() const;
  std::int64_t local_heads() const { return plan_.heads.count(tp_.rank()); }

  ModelConfig config_;
  ShardPlan plan_;
  Communicator& tp_;
  Allocator& allocator_;
  std::unique_ptr<ParameterSet> parameters_;
  std::vector<std::array<double, 5>> scales_;
  std::vector<Layer> layers_;  // the parameters' Vars, looked up once
  Var embedding_, final_weight_, final_bias_;
  Tensor cosine_, sine_;
  std::unique_ptr<Reducer> reducer_;
  ColumnPlan qkv_columns_, head_columns_, vocab_columns_;
};

}  // namespace tforge
