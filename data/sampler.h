#pragma once
// Training samples: windows of the train split in an order that depends on (seed, sample index) alone.
#include <cstdint>

#include "data/token_dataset.h"

namespace tforge {

/// Window w holds tokens [w * seq, w * seq + seq] of the split: `seq` inputs, and as targets the same moved on by one,
/// so that every token but the split's first is a target once an epoch (a rest of less than one window is left out).
/// Windows run across documents, as in the published training (packed sequences, attention not cut at documents).
///
/// Sample i is window Permutation(seed, "epoch <i / W>", W)(i % W) of W windows: any rank can take any sample without
/// having drawn the ones before, and a resumed run needs the next index alone. Threads may share a sampler.
class Sampler {
 public:
  /// Throws DataError when the split has no seq + 1 tokens.
  Sampler(const TokenSplit& split, std::int64_t seq, std::uint64_t seed);

  std::int64_t seq() const { return seq_; }
  std::uint64_t windows_per_epoch() const { return windows_; }
  /// Window of a sample.
  std::uint64_t window(std::uint64_t sample_index) const;
  /// Fills inputs [seq] and targets [seq]. Throws DataError for a damaged token.
  void sample(std::uint64_t sample_index, std::int32_t* inputs, std::int32_t* targets) const;

 private:
  TokenSplit split_;
  std::int64_t seq_;
  std::uint64_t seed_;
  std::uint64_t windows_;
};

}  // namespace tforge
