#pragma once
// The learning rate as a pure function of the step.
#include <cstdint>

#include "train/config.h"

namespace tforge {

/// Let s = step - start be the update's place in the schedule, N = steps - start its length, W = warmup_steps,
/// P = peak, F = floor. Steps count from 0.
///   warm-up   s < W:       P (s + 1) / W
///   cosine    t = s - W:   F + (P - F) (1 + cos(pi t / D)) / 2    for t < D, else F;  D = decay_steps, or N - W
///   wsd       t = s - (N - D):  P for t < 0, else P - (P - F) t / D;   D = decay_steps, or N / 10 (at least 1)
///   constant               P
/// Past the end (s >= N) cosine and wsd stay at F.
struct Schedule {
  ScheduleKind kind = ScheduleKind::cosine;
  double peak = 0;
  double floor = 0;
  std::int64_t start = 0;
  std::int64_t length = 0;
  std::int64_t warmup_steps = 0;
  std::int64_t decay_steps = 0;

  /// Learning rate of the update number `step` (from 0, over all stages). Throws InternalError for step < start.
  double lr(std::int64_t step) const;
};

/// The schedule of a model's life so far. `start` is the step at which its current schedule began: 0 at birth; at a
/// growth with train.growth.schedule = "restart", the step of the growth (then the peak is
/// train.lr * restart_peak_fraction and the length is what is left of train.steps); with "continue" it stays.
/// Throws ConfigError when warm-up and decay do not fit into what is left.
Schedule make_schedule(const TrainConfig& train, std::int64_t start);

}  // namespace tforge
