#include "data/prefetcher.h"

#include <chrono>
#include <utility>

namespace tforge {

Prefetcher::Prefetcher(const Sampler& sampler) : sampler_(sampler), thread_([this] { run(); }) {}

Prefetcher::~Prefetcher() {
  {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return state_ != State::asked; });
    state_ = State::stopping;
  }
  changed_.notify_all();
  thread_.join();
}

void Prefetcher::read(const SampleRange& range, SampleTokens& to) const {
  const std::int64_t seq = sampler_.seq();
  to.inputs.resize(static_cast<std::size_t>(range.count * seq));
  to.targets.resize(to.inputs.size());
  for (std::int64_t i = 0; i < range.count; ++i) {
    sampler_.sample(range.first + static_cast<std::uint64_t>(i), to.inputs.data() + i * seq,
                    to.targets.data() + i * seq);
  }
}

void Prefetcher::run() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return state_ == State::asked || state_ == State::stopping; });
    if (state_ == State::stopping) return;
    const SampleRange range = range_;
    lock.unlock();
    std::exception_ptr failure;
    try {
      read(range, ahead_);
    } catch (...) {
      failure = std::current_exception();
    }
    lock.lock();
    failure_ = std::move(failure);
    state_ = State::ready;
    changed_.notify_all();
  }
}

const SampleTokens& Prefetcher::take(const SampleRange& wanted, const SampleRange& next) {
  const auto start = std::chrono::steady_clock::now();
  std::exception_ptr failure;
  bool hit = false;
  {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return state_ != State::asked; });
    hit = std::exchange(state_, State::idle) == State::ready && range_ == wanted;
    if (hit) {
      failure = std::exchange(failure_, nullptr);
      std::swap(taken_, ahead_);
    }
  }
  if (failure) std::rethrow_exception(failure);
  if (!hit) read(wanted, taken_);
  {
    const std::lock_guard lock(mutex_);
    range_ = next;
    state_ = State::asked;
  }
  changed_.notify_all();
  wait_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return taken_;
}

double Prefetcher::take_wait_seconds() { return std::exchange(wait_seconds_, 0.0); }

}  // namespace tforge
