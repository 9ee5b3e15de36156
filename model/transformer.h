#pragma once
// The plain Transformer (GPT-NeoX, arXiv 2204.06745, in its serial form, which is that of GPT-2 with rotary positions).
//
//   u = LN(h; weight, bias)     q, k, v = u W_q^T + b_q, ...     h + attention(q, k, v) W_o + b_o
//   h + gelu(LN(h; ...) W_i^T + b_i) W_2 + b_2                   gelu in the erf form, 4 d neurons
//
// Over the tensor-parallel axis (Megatron-LM, arXiv 1909.08053): q, k, v and proj by heads, the MLP by neurons; the
// weights of proj and of the MLP's second layer are stored transposed, so that all of them are cut by rows. Collectives
// of a layer: one all-reduce of [T, d] each after proj and MLP, and one each in backward for their inputs. Virtual
// shards are of whole heads and of neurons; the all-reduces become all-gathers of what each shard gives.
#include <cstdint>
#include <string>
#include <vector>

#include "autograd/ops/linear.h"
#include "model/language_model.h"
#include "model/models.h"

namespace tforge {

/// The axes of its shard plans: heads in columns of all of them, then neurons.
const ModelKind& transformer_kind();

class Transformer final : public LanguageModel {
 public:
  explicit Transformer(const ModelPlace& place);

  static constexpr double kDeviation = 0.02;  // of normal weights at birth
  /// Whether a weight belongs to a layer that is added to the residual stream.
  static bool ends_on_stream(std::string_view path);

 protected:
  /// N(0, 0.02^2), of the layers that end on the residual stream N(0, (0.02 / sqrt(2 L))^2), biases 0, LayerNorm 1 and
  /// 0: GPT-2 (Radford et al. 2019, section 2.3), the "normal" and "scaled_normal" of GPT-NeoX.
  Birth birth(std::string_view path) const override;
  Var attention_input(Tape& tape, const Var& h, std::int64_t layer) override;
  Var attention_output(Tape& tape, Var heads, std::int64_t layer) override;
  Var feed_forward(Tape& tape, const Var& h, std::int64_t layer) override;

 private:
  struct Norm {
    Var weight, bias;
  };
  struct Layer {
    std::string attention_place, ffn_place;  // for the heartbeats
    Norm attention_norm, ffn_norm;
    LinearWeights query, key, value, neurons;
    Var proj, proj_bias, out, out_bias;  // biases may be absent
  };
  Var normalised(Tape& tape, const Var& h, const Norm& norm);
  /// The sum over the ranks, and the bias once.
  Var finished(Tape& tape, Var partial, const Var& bias);
  const Layer& of(std::int64_t layer) const { return layers_[static_cast<std::size_t>(layer)]; }

  ShardBorders columns_;    // of the heads in each virtual shard; empty without those
  RowShards columns_here_;  // of this rank
  std::vector<Layer> layers_;
};

}  // namespace tforge
