#pragma once
// Sampling text from a model, token by token, with a key-value cache.
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "model/language_model.h"

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
  std::int64_t tokens = 100;  // to add at most
  std::int64_t samples = 1;   // continuations of the prompt, computed side by side
  CacheUse cache = CacheUse::cached;
  PastEnd past_end = PastEnd::stop;
};

/// The token that follows, from f32 or f64 logits [vocab]. Depends on (seed, draw) and the logits alone.
/// Throws ConfigError for options out of range.
std::int32_t sample_token(ConstTensorView logits, const SamplingOptions& options, std::uint64_t draw);
/// The number of the draw for token `position` of a sample: what a sample says does not depend on how many there are.
constexpr std::uint64_t draw_of(std::uint64_t sample, std::uint64_t position) { return sample << 32 | position; }

/// Continues `prompt` (at least one token) options.samples times by up to options.tokens tokens each, and returns for
/// each sample the tokens that were added; all samples get equally many. `on_token` is called with the sample and its
/// token as it comes, position by position. `allocator` and `stream` are the model's; sampling is the processor's. All
/// ranks of the model's tp group call it and get the same tokens. Fewer tokens come back when the trained length is
/// reached and past_end is stop. Throws ConfigError for options out of range, an empty prompt or one longer than the
/// trained length.
std::vector<std::vector<std::int32_t>> generate(LanguageModel& model, Allocator& allocator, Stream& stream,
                                                std::span<const std::int32_t> prompt, const GenerateOptions& options,
                                                const std::function<void(std::int64_t, std::int32_t)>& on_token = {});

}  // namespace tforge
