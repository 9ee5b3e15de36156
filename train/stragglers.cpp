#include "train/stragglers.h"

#include <algorithm>
#include <cmath>

#include "core/errors.h"

namespace tforge {

namespace {

/// Reorders `values`.
double median(std::vector<double>& values) {
  const auto middle = values.begin() + std::ssize(values) / 2;
  std::nth_element(values.begin(), middle, values.end());
  if (values.size() % 2 == 1) return *middle;
  return (*middle + *std::max_element(values.begin(), middle)) / 2;
}

}  // namespace

StepSpread spread_of(std::span<const double> seconds) {
  const auto slowest = std::ranges::max_element(seconds);
  std::vector<double> all(seconds.begin(), seconds.end());
  return {static_cast<int>(slowest - seconds.begin()), *slowest, median(all)};
}

Stragglers::Stragglers(std::vector<double> work) : work_(std::move(work)), slow_steps_(work_.size(), 0) {}

std::optional<Stragglers::Finding> Stragglers::add(std::span<const double> seconds) {
  if (seconds.size() != work_.size()) throw InternalError("seconds of {} ranks, not {}", seconds.size(), work_.size());
  std::optional<Finding> found;
  const double least = std::ranges::min(seconds);
  for (std::size_t r = 0; r < work_.size(); ++r) {
    peers_.clear();
    if (seconds[r] <= kFactor * least) {  // almost always, for almost all
      slow_steps_[r] = 0;
      continue;
    }
    for (std::size_t other = 0; other < work_.size(); ++other) {
      if (other != r && std::abs(work_[other] - work_[r]) <= 0.05 * work_[r]) peers_.push_back(seconds[other]);
    }
    const double usual = peers_.empty() ? 0 : median(peers_);
    slow_steps_[r] = !peers_.empty() && seconds[r] > kFactor * usual ? slow_steps_[r] + 1 : 0;
    if (slow_steps_[r] == kSteps && !found) found = Finding{static_cast<int>(r), seconds[r], usual};
  }
  return found;
}

}  // namespace tforge
