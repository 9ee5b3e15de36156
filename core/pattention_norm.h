#pragma once
// The three normalisations of Pattention, known to kernels, models, configurations and checkpoints alike.
#include <cstdint>
#include <string_view>

namespace tforge {

/// Let A = X K^T [T, n] and `scale` > 0 be a stored number of the layer (tau in the paper).
///   l2_norm_gelu:  P = gelu(scale * A / ||A||)          (born with scale = sqrt(n))
///   gelu_l2_norm:  P = scale * gelu(A) / ||gelu(A)||    (born with scale = sqrt(n))
///   softmax:       P = scale * softmax(A)               (born with scale = n)
/// Norms are over all n tokens of a row; gelu is the exact erf form; Y = P V.
/// Source: TokenFormer (arXiv 2410.23168), equations 4 and 16, and its public code.
enum class PattentionNorm : std::uint8_t { l2_norm_gelu, gelu_l2_norm, softmax };

std::string_view name_of(PattentionNorm norm);
/// Throws ConfigError for another name.
PattentionNorm pattention_norm_from_name(std::string_view name);
/// The scale that a layer of n tokens is born with.
double initial_scale(PattentionNorm norm, std::int64_t num_tokens);

/// Norms below this floor give P = 0 and pass no gradient.
inline constexpr double kNormFloor = 1e-12;

}  // namespace tforge
