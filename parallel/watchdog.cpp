#include "parallel/watchdog.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "core/errors.h"
#include "parallel/communicator.h"

namespace tforge {
namespace {

std::atomic<const char*> phase_name{"start"};
std::atomic<std::int64_t> phase_step{-1};

std::int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

void set_phase(const char* phase, std::int64_t step) {
  phase_name.store(phase, std::memory_order_relaxed);
  phase_step.store(step, std::memory_order_relaxed);
}

Watchdog::Watchdog(int rank, int ranks, double timeout_seconds)
    : rank_(rank), ranks_(ranks), timeout_ns_(static_cast<std::int64_t>(timeout_seconds * 1e9)) {
  if (timeout_ns_ > 0) thread_ = std::thread([this] { run(); });
}

Watchdog::~Watchdog() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_one();
  thread_.join();
}

void Watchdog::begin(const char* name, std::uint64_t bytes) {
  // Release: whoever sees one of these sees the end of the collective before as well.
  name_.store(name, std::memory_order_release);
  bytes_.store(bytes, std::memory_order_release);
  begun_ns_.store(now_ns(), std::memory_order_release);
  sequence_.fetch_add(1, std::memory_order_release);
}

void Watchdog::end() { sequence_.fetch_add(1, std::memory_order_release); }

void Watchdog::run() {
  // Late by at most a tenth of the limit, and by a second at the most.
  const std::chrono::nanoseconds interval(std::min<std::int64_t>(timeout_ns_ / 10 + 1, 1'000'000'000));
  std::unique_lock lock(mutex_);
  while (!wake_.wait_for(lock, interval, [this] { return stop_; })) {
    const std::uint64_t sequence = sequence_.load(std::memory_order_acquire);
    if (sequence % 2 == 0) continue;
    const char* name = name_.load(std::memory_order_acquire);
    const std::uint64_t bytes = bytes_.load(std::memory_order_acquire);
    const std::int64_t begun = begun_ns_.load(std::memory_order_acquire);
    // A record that changed while it was read belongs to a collective that finished.
    if (sequence_.load(std::memory_order_acquire) != sequence) continue;
    if (now_ns() - begun > timeout_ns_) give_up(name, (sequence + 1) / 2, bytes);
  }
}

void Watchdog::give_up(const char* name, std::uint64_t number, std::uint64_t bytes) const {
  const std::int64_t step = phase_step.load(std::memory_order_relaxed);
  const std::string at = step < 0 ? "" : fmt::format(", step {}", step);
  fmt::print(stderr,
             "error: rank {} of {}: {} (collective {}, {} bytes) did not finish within {} s in phase \"{}\"{}; "
             "another rank is dead, stuck or in another collective; see its last line\n",
             rank_, ranks_, name, number, bytes, static_cast<double>(timeout_ns_) * 1e-9,
             phase_name.load(std::memory_order_relaxed), at);
  std::fflush(stderr);
  std::_Exit(static_cast<int>(ExitCode::hang));
}

}  // namespace tforge
