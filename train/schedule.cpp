#include "train/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "core/errors.h"

namespace tforge {

double Schedule::lr(std::int64_t step) const {
  if (step < start) throw InternalError("learning rate of step {} of a schedule that begins at {}", step, start);
  const std::int64_t s = step - start;
  if (s < warmup_steps) return peak * static_cast<double>(s + 1) / static_cast<double>(warmup_steps);
  const auto progress = [&](std::int64_t t) {
    return decay_steps > 0 ? std::min(1.0, static_cast<double>(t) / static_cast<double>(decay_steps)) : 1.0;
  };
  switch (kind) {
    case ScheduleKind::cosine: {
      const double p = progress(s - warmup_steps);
      return floor + (peak - floor) * 0.5 * (1 + std::cos(std::numbers::pi * p));
    }
    case ScheduleKind::wsd: {
      const std::int64_t t = s - (length - decay_steps);
      return t < 0 ? peak : peak - (peak - floor) * progress(t);
    }
    case ScheduleKind::constant: return peak;
  }
  throw InternalError("unknown schedule");
}

Schedule make_schedule(const TrainConfig& train, std::int64_t start) {
  Schedule s;
  s.kind = train.schedule;
  s.peak = train.lr * (start > 0 ? train.growth.restart_peak_fraction : 1.0);
  s.floor = s.peak * train.final_lr_fraction;
  s.start = start;
  s.length = std::max<std::int64_t>(train.steps - start, 0);
  s.warmup_steps = train.warmup_steps;
  s.decay_steps = train.decay_steps;
  if (s.length > 0 && s.warmup_steps + s.decay_steps > s.length) {
    throw ConfigError(
        "train.warmup_steps = {} and train.decay_steps = {} do not fit into the {} steps from {} to "
        "train.steps = {}",
        s.warmup_steps, s.decay_steps, s.length, start, train.steps);
  }
  if (s.decay_steps == 0) {
    const std::int64_t after_warmup = std::max<std::int64_t>(s.length - s.warmup_steps, 0);
    s.decay_steps = s.kind == ScheduleKind::cosine ? after_warmup
                                                   : std::min(std::max<std::int64_t>(s.length / 10, 1), after_warmup);
  }
  return s;
}

}  // namespace tforge
