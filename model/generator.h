#pragma once
// Sampling text from a model, token by token, with a key-value cache.
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "model/tokenformer.h"

namespace tforge {

struct SamplingOptions {
  double temperature = 1.0;  // 0: greedy, the most likely token (the lowest id of equals)
  std::int64_t top_k = 0;    // keep the k most likely; 0: all
  double top_p = 1.0;        // then keep the fewest that hold this much probability
  std::uint64_t seed = 0;
};

enum class CacheUse : std::uint8_t { cached, recomputed };
/// What happens at the trained length: stop there, or drop the oldest half of the window and go on.
enum class PastEnd : std::uint8_t { stop, slide };

struct GenerateOptions {
  SamplingOptions sampling;
  std::int64_t tokens = 100;
  CacheUse cache = CacheUse::cached;
  PastEnd past_end = PastEnd::stop;
};

/// The token that follows, from f32 or f64 logits [vocab]. Depends on (seed, position) and the logits alone.
/// Throws ConfigError for options out of range.
std::int32_t sample_token(ConstTensorView logits, const SamplingOptions& options, std::uint64_t position);

/// Appends up to options.tokens tokens to `prompt` (at least one token) and returns those that were appended;
/// `on_token` is called with each as it comes. All ranks of the model's tp group call it and get the same tokens.
/// Fewer tokens come back when the trained length is reached and past_end is stop.
/// Throws ConfigError for an empty prompt or one longer than the trained length.
std::vector<std::int32_t> generate(TokenFormer& model, Allocator& allocator, Stream& stream,
                                   std::span<const std::int32_t> prompt, const GenerateOptions& options,
                                   const std::function<void(std::int32_t)>& on_token = {});

}  // namespace tforge
