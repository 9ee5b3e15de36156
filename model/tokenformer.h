#pragma once
// TokenFormer (arXiv 2410.23168) exactly as its public code: a decoder whose every projection is a Pattention.
//
//   u = LN0(h)                                      LN0: LayerNorm without parameters
//   q, k, v = Patt_q(u), Patt_k(u), Patt_v(u)       h + Patt_proj(attention(q, k, v))       h + Patt_ffn(LN0(h))
//
// Collectives of a layer, forward: one all-reduce of [T, 3] and one reduce-scatter of [T, 3 d] for q, k, v; one
// all-gather of [T, d]; one all-reduce of [T, d] (plus row numbers) each for proj and ffn. With virtual shards q, k, v
// and the heads' gradients are cut, and nothing is sent for that.
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "autograd/ops/pattention.h"
#include "model/language_model.h"
#include "model/models.h"

namespace tforge {

/// The axes of its shard plans are the groups of TokenGroup.
const ModelKind& tokenformer_kind();

class TokenFormer final : public LanguageModel {
 public:
  explicit TokenFormer(const ModelPlace& place);

  /// Published initialisation: keys and embedding N(0, 0.02^2), values N(0, (2 / (L sqrt(d)))^2), final LayerNorm 1 and
  /// 0, scales from the token counts.
  void initialise(std::uint64_t seed) override;
  /// The standard deviations of that initialisation.
  static double key_deviation() { return 0.02; }
  static double value_deviation(const ModelConfig& config);

  /// The stored scale of a layer: an attribute of its keys.
  double scale(std::int64_t layer, TokenGroup group) const;
  void set_scale(std::int64_t layer, TokenGroup group, double scale);
  std::vector<StateNumber> state_numbers() const override;
  void set_state_number(const StateNumber& number) override;

  /// "layers.3.attention.query" or "layers.3.ffn": the path of a Pattention; its parameters add ".keys", ".values".
  static std::string layer_path(std::int64_t layer, TokenGroup group);

 protected:
  Birth birth(std::string_view path) const override;
  Var attention_input(Tape& tape, const Var& h, std::int64_t layer) override;
  Var attention_output(Tape& tape, Var heads, std::int64_t layer) override;
  Var feed_forward(Tape& tape, const Var& h, std::int64_t layer) override;

 private:
  using Layer = std::array<PattentionTokens, 5>;  // by TokenGroup
  const PattentionTokens& tokens_of(std::int64_t layer, TokenGroup group) const;
  void enter(std::int64_t layer, TokenGroup group) const;
  /// One Pattention from the whole width to the whole width; x's gradient is partial.
  Var project(Tape& tape, const Var& x, std::int64_t layer, TokenGroup group);

  std::vector<Layer> layers_;  // the parameters' Vars, looked up once
  ColumnPlan qkv_columns_;
};

}  // namespace tforge
