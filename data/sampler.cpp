#include "data/sampler.h"

#include "core/errors.h"
#include "core/rng.h"

namespace tforge {

Sampler::Sampler(const TokenSplit& split, std::int64_t seq, std::uint64_t seed)
    : split_(split), seq_(seq), seed_(seed), windows_(0) {
  if (seq < 1) throw InternalError("a sampler of windows of {} tokens", seq);
  const auto length = static_cast<std::uint64_t>(seq);
  if (split.tokens() <= length) {
    throw DataError("{} holds {} tokens, a window of {} needs {}; take more text or shorter windows", split.name(),
                    split.tokens(), seq, length + 1);
  }
  windows_ = (split.tokens() - 1) / length;
}

std::uint64_t Sampler::window(std::uint64_t sample_index) const {
  const std::uint64_t epoch = sample_index / windows_;
  return Permutation(seed_, fmt::format("epoch {}", epoch), windows_)(sample_index % windows_);
}

void Sampler::sample(std::uint64_t sample_index, std::int32_t* inputs, std::int32_t* targets) const {
  const auto length = static_cast<std::uint64_t>(seq_);
  const std::uint64_t first = window(sample_index) * length;
  split_.copy(first, length, inputs);
  split_.copy(first + 1, length, targets);
}

}  // namespace tforge
