#pragma once
// How a Pattention's new parameter tokens are born: a pure function of (old tokens, rule, seed, layer path, row).
// The same rows come out whatever the ranks. Why these rules: docs/growth.md.
#include <cstdint>
#include <string>
#include <string_view>

#include "core/device.h"
#include "core/pattention_norm.h"
#include "core/tensor.h"

namespace tforge {

///   rule                     new keys                          new values        scale
///   zero_key (default)       0                                 as at birth       kept: output preserved exactly
///   public_code              as at birth                       as at birth       from the new count
///   random_key_zero_value    as at birth                       0                 times sqrt(n_new / n_old)
///   mirror                   negatives of the old rows, then   0                 times sqrt(n_new / n_old): exact for
///                            N(0, 1 / n_old) mixtures of them                    l2_norm_gelu when the count doubles
/// For softmax the scale's factor is n_new / n_old, as its birth scale is n.
enum class GrowthRule : std::uint8_t { zero_key, public_code, random_key_zero_value, mirror };

/// "zero-key", "public", "random-key-zero-value", "mirror"
std::string_view name_of(GrowthRule rule);
/// Throws UsageError naming the rules for another name.
GrowthRule growth_rule_from_name(std::string_view name);

struct GrowthPlan {
  GrowthRule rule = GrowthRule::zero_key;
  std::uint64_t seed = 0;
  double noise = 0;  // noise on the old rows: standard deviation as a fraction of each row's root mean square
  PattentionNorm norm = PattentionNorm::l2_norm_gelu;
  double key_deviation = 0.02;
  double value_deviation = 0.01;
};

/// Throws UsageError when no rule can do what is asked: softmax cannot grow by zero keys without changing the output
/// (exp(0) = 1 takes weight from the old tokens), and values of deviation 0 under zero keys would never learn.
void check_growth(const GrowthPlan& plan);

/// The scale of the grown layer.
double grown_scale(const GrowthPlan& plan, double old_scale, std::int64_t n_old, std::int64_t n_new);

/// Rows first .. first + out.rows() of the grown keys of the layer at `path`. `old_keys` is the whole old tensor
/// [n_old, d_in] (mirror reads all of it). Old rows are copied, with noise if the plan has any.
void grown_keys(Stream& stream, const GrowthPlan& plan, std::string_view path, ConstTensorView old_keys,
                std::int64_t first, TensorView out);
/// The same of the values; `old_values` [n_old, d_out].
void grown_values(Stream& stream, const GrowthPlan& plan, std::string_view path, ConstTensorView old_values,
                  std::int64_t first, TensorView out);

}  // namespace tforge
