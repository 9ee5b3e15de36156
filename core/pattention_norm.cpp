#include "core/pattention_norm.h"

#include <cmath>

#include "core/errors.h"

namespace tforge {

std::string_view name_of(PattentionNorm norm) {
  switch (norm) {
    case PattentionNorm::l2_norm_gelu: return "l2_norm_gelu";
    case PattentionNorm::gelu_l2_norm: return "gelu_l2_norm";
    case PattentionNorm::softmax: return "softmax";
  }
  return "?";
}

PattentionNorm pattention_norm_from_name(std::string_view name) {
  for (const PattentionNorm norm :
       {PattentionNorm::l2_norm_gelu, PattentionNorm::gelu_l2_norm, PattentionNorm::softmax}) {
    if (name == name_of(norm)) return norm;
  }
  throw ConfigError("'{}' is no normalisation; there are l2_norm_gelu, gelu_l2_norm and softmax", name);
}

double initial_scale(PattentionNorm norm, std::int64_t num_tokens) {
  const auto n = static_cast<double>(num_tokens);
  return norm == PattentionNorm::softmax ? n : std::sqrt(n);
}

}  // namespace tforge
