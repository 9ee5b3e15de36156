#pragma once
// The tokens of the next micro-batch, read while this one is computed.
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "data/sampler.h"

namespace tforge {

/// Samples [first, first + count) of a sampler.
struct SampleRange {
  std::uint64_t first = 0;
  std::int64_t count = 0;
  friend bool operator==(const SampleRange&, const SampleRange&) = default;
};

/// Their inputs and targets, [count * seq] each.
struct SampleTokens {
  std::vector<std::int32_t> inputs, targets;
};

/// Reads one range ahead in a thread of its own, so that a page that is not in memory yet (a cold file, a network file
/// system) is waited for while something is computed. The thread does nothing but read the sampler's mapped file.
/// What take() gives depends on the range alone, never on what was prefetched: a wrong guess costs time only.
/// One thread uses a prefetcher. In the steady state it asks for no memory.
class Prefetcher {
 public:
  /// The sampler must outlive it.
  explicit Prefetcher(const Sampler& sampler);
  /// Waits for a read under way; what it failed with is dropped.
  ~Prefetcher();
  Prefetcher(const Prefetcher&) = delete;
  Prefetcher& operator=(const Prefetcher&) = delete;

  /// The samples of `wanted`, valid until the next call; then reads `next` in the background. Throws what reading
  /// `wanted` threw (DataError); a failure to read `next` shows when it is wanted.
  const SampleTokens& take(const SampleRange& wanted, const SampleRange& next);
  /// Seconds that take() has spent waiting and reading since the last call.
  double take_wait_seconds();

 private:
  void run();
  void read(const SampleRange& range, SampleTokens& to) const;

  const Sampler& sampler_;
  SampleTokens taken_, ahead_;
  double wait_seconds_ = 0;

  std::mutex mutex_;  // guards what follows; `ahead_` too while a read is not under way
  std::condition_variable changed_;
  SampleRange range_;  // of `ahead_`
  enum class State : std::uint8_t { idle, asked, ready, stopping } state_ = State::idle;
  std::exception_ptr failure_;
  std::thread thread_;  // last: starts when everything else is there
};

}  // namespace tforge
