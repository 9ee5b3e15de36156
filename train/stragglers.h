#pragma once
// Which rank the others wait for: each rank's own computing seconds of a step, without what it spent in collectives.
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace tforge {

struct StepSpread {
  int slowest_rank = 0;
  double slowest_seconds = 0;
  double median_seconds = 0;  // over all ranks
};

/// Of the seconds of all ranks, in rank order; at least one.
StepSpread spread_of(std::span<const double> seconds);

/// Finds ranks that are slower than their peers step after step.
class Stragglers {
 public:
  static constexpr double kFactor = 1.2;
  static constexpr std::int64_t kSteps = 20;

  /// `work[r]`: what rank r has to compute in a step, in any unit. Its peers are the other ranks whose work differs by
  /// at most 5 %: ranks with more sequences or more rows are slower without being slow.
  explicit Stragglers(std::vector<double> work);

  struct Finding {
    int rank = 0;
    double seconds = 0;        // in this step
    double peers_seconds = 0;  // median of its peers in this step
  };
  /// Adds a step. A rank that has taken more than kFactor times the median of its peers in kSteps steps in a row is
  /// found once, and again after a step in which it was not.
  std::optional<Finding> add(std::span<const double> seconds);

 private:
  std::vector<double> work_;
  std::vector<std::int64_t> slow_steps_;
  std::vector<double> peers_;  // scratch
};

}  // namespace tforge
