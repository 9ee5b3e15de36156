#pragma once
// What all models share: a decoder of pre-norm blocks, of which a kind gives the projections.
//
//   h0 = E[tokens]
//   for each layer:  q, k, v = attention_input(h);   rotary on the first rotary_dim of each head of q, k
//                    h = h + attention_output(attention(q, k, v));   h = h + feed_forward(h)
//   logits = norm(h) W^T          LayerNorm with weight and bias, or RMSNorm; W is E where the head is tied
//
// Over the tensor-parallel axis: parameters of the blocks, attention heads and vocabulary rows are sharded by rows;
// hidden states are replicated. With virtual shards (ShardPlan::dealt) an op computes each shard that the rank holds
// apart and all-gathers what the shards give, to add it in the order of the shards.
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "autograd/ops/head_cross_entropy.h"
#include "autograd/tape.h"
#include "model/attention.h"
#include "model/config.h"
#include "model/parameter.h"
#include "model/shard_plan.h"
#include "parallel/communicator.h"
#include "parallel/grad_sync.h"
#include "parallel/ops/column_plan.h"

namespace tforge {

/// Where a model is made, and which. What it refers to outlives the model.
struct ModelPlace {
  Allocator& allocator;
  Stream& stream;
  const ModelConfig& config;
  DType dtype;
  Communicator& tp;
  const ShardPlan& plan;
};

/// A number that belongs to the state of a model although nothing trains it; stored as an attribute of a parameter.
/// All are more than 0.
struct StateNumber {
  std::string parameter;  // path
  std::string name;       // "scale"
  double value = 0;
};

/// Permutations that belong to the state of a model although nothing trains them; stored as a tensor of their own. The
/// same on every rank.
struct StatePermutations {
  std::string path;                  // "hash/attention"
  std::int64_t columns = 0;          // each is one of 0 .. columns - 1
  std::vector<std::int32_t> values;  // one below the other; empty: there are none

  std::int64_t rows() const { return static_cast<std::int64_t>(values.size()) / columns; }
};

/// What attention keeps of the positions seen so far, for generation: keys and values, or sums over them.
class KvCache {
 public:
  std::int64_t length() const { return length_; }
  std::int64_t capacity() const { return capacity_; }
  std::int64_t batch() const { return batch_; }
  /// Forgets all positions.
  void clear() { length_ = 0; }

 private:
  friend class LanguageModel;
  std::int64_t batch_ = 0, capacity_ = 0, length_ = 0;
  std::vector<AttentionMemory> layers_;
};

class LanguageModel {
 public:
  virtual ~LanguageModel() = default;
  LanguageModel(const LanguageModel&) = delete;
  LanguageModel& operator=(const LanguageModel&) = delete;

  const ModelConfig& config() const { return config_; }
  const ShardPlan& plan() const { return plan_; }
  ParameterSet& parameters() { return parameters_; }
  const ParameterSet& parameters() const { return parameters_; }
  /// Of the parameters.
  DType dtype() const { return parameters_.dtype(); }
  /// How its ops reduce over the tensor-parallel axis.
  Reducer& reducer() { return *reducer_; }

  /// The values and the state of a model that has seen nothing. The same whatever the ranks.
  virtual void initialise(std::uint64_t seed);
  /// To be called when values of parameters have been written by others than an update (ParameterSet::round).
  void values_changed();

  virtual std::vector<StateNumber> state_numbers() const { return {}; }
  /// `number` is one of state_numbers() with another value.
  virtual void set_state_number(const StateNumber& number);

  /// Where the values lie does not change while the model lives.
  virtual std::span<const StatePermutations> state_permutations() const { return {}; }
  /// `first` become the first ones of those of the same path and as many columns, of which there are as many or more.
  virtual void set_state_permutations(const StatePermutations& first);

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

 protected:
  explicit LanguageModel(const ModelPlace& place);

  /// How the values of a parameter are born: constant + deviation * standard normal.
  struct Birth {
    double constant = 0;
    double deviation = 0;
  };
  /// Of a parameter of a block, of the embedding or of an untied head.
  virtual Birth birth(std::string_view path) const = 0;
  /// [q | k | v] of this rank's heads, before rotation, from h [T, d] replicated.
  virtual Var attention_input(Tape& tape, const Var& h, std::int64_t layer) = 0;
  /// [T, d] replicated from the results of this rank's heads [T, c].
  virtual Var attention_output(Tape& tape, Var heads, std::int64_t layer) = 0;
  /// [T, d] replicated from h [T, d] replicated, its norm included.
  virtual Var feed_forward(Tape& tape, const Var& h, std::int64_t layer) = 0;

  /// LayerNorm or RMSNorm with parameters; the bias is empty for RMSNorm.
  struct Norm {
    Var weight, bias;
  };
  /// Of the residual stream: model.stream_norm at `path`.
  Norm norm_at(const std::string& path);
  Var normalised(Tape& tape, const Var& h, const Norm& norm);

  /// Completes what an op gives over the tensor-parallel axis, and hands it a value whose gradient will be complete:
  /// with virtual shards ops do both.
  Var completed(Tape& tape, Var partial);
  Var shared(Tape& tape, const Var& x);
  /// The results of all heads, [T, d], from those of this rank.
  Var gather_heads(Tape& tape, const Var& x);

  Allocator& allocator() const { return allocator_; }
  Communicator& tp() const { return tp_; }
  int tp_rank() const { return tp_.rank(); }
  /// Columns of the heads of each rank.
  const std::vector<std::int64_t>& head_columns() const { return head_columns_.groups[0]; }
  Var parameter(std::string_view path) { return parameters_.find(path).var; }

 private:
  /// One layer of hidden(): h [T, d] of sequences of `seq` tokens.
  Var block(Tape& tape, Var h, std::int64_t layer, std::int64_t seq);
  Var embed(Tape& tape, const Tensor& tokens, LookupSync* lookup = nullptr);
  Var finally_normalised(Tape& tape, const Var& h);
  Tensor whole_logits(Tape& tape, const Var& h);
  HeadShards head_shards() const;
  std::int64_t local_heads() const { return plan_.heads.count(tp_.rank()); }

  ModelConfig config_;
  ShardPlan plan_;
  Communicator& tp_;
  Allocator& allocator_;
  ParameterSet parameters_;
  Var embedding_, head_;  // head_: the embedding, where it is tied
  Norm final_norm_;
  Tensor cosine_, sine_;
  std::unique_ptr<Attention> attention_;
  std::unique_ptr<Reducer> reducer_;
  ColumnPlan head_columns_, vocab_columns_;
};

}  // namespace tforge
