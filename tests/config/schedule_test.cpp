// Learning rates that can be checked by hand.
#include "train/schedule.h"

#include <gtest/gtest.h>

#include <cmath>

#include "core/errors.h"

namespace tforge {
namespace {

TrainConfig config(ScheduleKind kind) {
  TrainConfig t;
  t.schedule = kind;
  t.lr = 8.0;
  t.steps = 20;
  t.warmup_steps = 4;
  t.final_lr_fraction = 0.25;  // floor 2
  return t;
}

TEST(Schedule, WarmUpIsLinearAndReachesThePeak) {
  for (const ScheduleKind kind : {ScheduleKind::cosine, ScheduleKind::wsd, ScheduleKind::constant}) {
    const Schedule s = make_schedule(config(kind), 0);
    EXPECT_EQ(s.lr(0), 2.0);
    EXPECT_EQ(s.lr(1), 4.0);
    EXPECT_EQ(s.lr(3), 8.0);
    EXPECT_EQ(s.lr(4), 8.0);
  }
}

TEST(Schedule, CosineGoesToTheFloor) {
  const Schedule s = make_schedule(config(ScheduleKind::cosine), 0);  // D = 16
  EXPECT_NEAR(s.lr(8), 2 + 6 * 0.5 * (1 + std::sqrt(0.5)), 1e-12);    // a quarter of the way: cos(pi / 4)
  EXPECT_NEAR(s.lr(12), 5.0, 1e-12);                                  // half-way
  EXPECT_GT(s.lr(19), 2.0);
  EXPECT_NEAR(s.lr(20), 2.0, 1e-12);
  EXPECT_NEAR(s.lr(1000), 2.0, 1e-12);
}

TEST(Schedule, CosineOverFewerSteps) {
  TrainConfig t = config(ScheduleKind::cosine);
  t.decay_steps = 8;
  const Schedule s = make_schedule(t, 0);
  EXPECT_NEAR(s.lr(8), 5.0, 1e-12);
  EXPECT_NEAR(s.lr(12), 2.0, 1e-12);
  EXPECT_NEAR(s.lr(19), 2.0, 1e-12);
}

TEST(Schedule, WarmupStableDecay) {
  TrainConfig t = config(ScheduleKind::wsd);
  t.decay_steps = 6;
  const Schedule s = make_schedule(t, 0);
  EXPECT_EQ(s.lr(13), 8.0);
  EXPECT_EQ(s.lr(14), 8.0);
  EXPECT_EQ(s.lr(15), 7.0);
  EXPECT_EQ(s.lr(19), 3.0);
  EXPECT_EQ(s.lr(20), 2.0);
  t.decay_steps = 0;  // the last tenth: two steps
  EXPECT_EQ(make_schedule(t, 0).lr(18), 8.0);
  EXPECT_EQ(make_schedule(t, 0).lr(19), 5.0);
}

TEST(Schedule, ConstantStays) {
  const Schedule s = make_schedule(config(ScheduleKind::constant), 0);
  EXPECT_EQ(s.lr(19), 8.0);
  EXPECT_EQ(s.lr(1 << 20), 8.0);
}

TEST(Schedule, RestartAtAGrowthIsTheSameCurveLowerAndLater) {
  TrainConfig t = config(ScheduleKind::cosine);
  const Schedule born = make_schedule(t, 0);
  t.steps = 120;  // a growth at step 100, 20 steps left
  t.growth.restart_peak_fraction = 0.5;
  const Schedule grown = make_schedule(t, 100);
  for (std::int64_t step = 0; step < 25; ++step) EXPECT_NEAR(grown.lr(100 + step), born.lr(step) / 2, 1e-15);
  EXPECT_THROW(grown.lr(99), InternalError);
}

TEST(Schedule, ContinuedScheduleKnowsNoGrowth) {
  TrainConfig t = config(ScheduleKind::cosine);
  t.growth.restart_peak_fraction = 0.5;  // only a restart uses it
  EXPECT_EQ(make_schedule(t, 0).lr(12), make_schedule(config(ScheduleKind::cosine), 0).lr(12));
}

TEST(Schedule, NoWarmUp) {
  TrainConfig t = config(ScheduleKind::cosine);
  t.warmup_steps = 0;
  EXPECT_EQ(make_schedule(t, 0).lr(0), 8.0);
}

TEST(Schedule, RestartWithTooFewStepsLeft) {
  TrainConfig t = config(ScheduleKind::wsd);
  EXPECT_THROW(make_schedule(t, 17), ConfigError);  // 3 left, 4 of warm-up
}

}  // namespace
}  // namespace tforge
