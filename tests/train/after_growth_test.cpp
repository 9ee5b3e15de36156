// The first steps of a stage: what the configuration asks for old and new rows, moments, ages and the schedule.
#include <gtest/gtest.h>

#include "core/profile.h"
#include "kernels/adamw.h"
#include "model/tokenformer.h"
#include "support/tiny_run.h"

namespace tforge::test {
namespace {

constexpr int kOldSteps = 6;
constexpr std::array<std::int64_t, 5> kGrown = {50, 25, 40, 61, 200};  // the keys of attention stay

/// What a rank holds of one parameter.
struct Snapshot {
  std::vector<double> value, m, v;
  std::vector<AgeSegment> segments;
  bool operator==(const Snapshot&) const = default;
};

/// The rows held here that were there before the growth or not.
enum class Rows : std::uint8_t { old_ones, new_ones };

class AfterGrowth : public ::testing::Test {
 protected:
  AfterGrowth() : config_(lab_.config(DType::f64)) {
    small_ = config_.model;
    train_and_save(lab_, config_, kOldSteps, lab_.path("old"));
    ExpandRequest request;
    request.checkpoint = lab_.path("old");
    request.output = lab_.path("grown");
    request.growth.counts = counts_of(kGrown);
    expand_alone(request);
  }

  /// A layout in which shards cross the border between old and new rows.
  static Mesh mesh() { return mesh_of(layouts().back()); }

  std::int64_t old_rows(const Parameter& p) const {
    for (const TokenGroup group : kTokenGroups) {
      for (std::int64_t layer = 0; layer < small_.layers; ++layer) {
        if (p.path().starts_with(TokenFormer::layer_path(layer, group) + ".")) return small_.num_tokens(group);
      }
    }
    return p.spec.shape[0];
  }
  Snapshot snapshot(TinyRun& run, std::size_t i, Rows which) const {
    const Parameter& p = run.trainer.model().parameters().all()[i];
    const AdamW::State& state = run.trainer.optimizer().state(i);
    const std::int64_t held = std::clamp<std::int64_t>(old_rows(p) - p.first_row, 0, p.rows);
    const std::int64_t first = which == Rows::old_ones ? 0 : held;
    const std::int64_t rows = which == Rows::old_ones ? held : p.rows - held;
    Snapshot s;
    if (rows > 0)
      s = {rows_of(p.value(), first, rows), rows_of(state.m, first, rows), rows_of(state.v, first, rows), {}};
    for (const AgeSegment& segment : state.segments) {
      if ((segment.stage == 0) == (which == Rows::old_ones)) s.segments.push_back(segment);
    }
    return s;
  }
  std::vector<Snapshot> snapshots(TinyRun& run, Rows which) const {
    std::vector<Snapshot> all;
    for (std::size_t i = 0; i < run.trainer.model().parameters().all().size(); ++i)
      all.push_back(snapshot(run, i, which));
    return all;
  }
  /// All values held here that belong to `which`, one after another.
  std::vector<double> values(TinyRun& run, Rows which) const {
    std::vector<double> all;
    for (const Snapshot& s : snapshots(run, which)) all.insert(all.end(), s.value.begin(), s.value.end());
    return all;
  }
  /// The change of these values by the first step of a stage that this configuration begins.
  std::vector<double> first_change(Rows which) const {
    TinyRun run(config_, lab_, mesh(), lab_.path("grown"));
    std::vector<double> before = values(run, which);
    run.trainer.step();
    const std::vector<double> after = values(run, which);
    for (std::size_t i = 0; i < before.size(); ++i) before[i] = after[i] - before[i];
    return before;
  }

  /// The sum over the ranks of the mesh's tp group.
  static double sum_over(Communicator& tp, double x) {
    Stream stream;
    tp.all_reduce(stream, TensorView{&x, DType::f64, Device::cpu, Shape{1}, 1}, ReduceOp::sum);
    return x;
  }
  static double squares(const std::vector<double>& x) {
    double sum = 0;
    for (const double v : x) sum += v * v;
    return sum;
  }

  Lab lab_;
  RunConfig config_;
  ModelConfig small_;
};

TEST_F(AfterGrowth, NewRowsLearnFromTheFirstStep) {
  config_.train.clip = 0;
  TinyRun run(config_, lab_, mesh(), lab_.path("grown"));
  const auto new_gradient = [&](const std::string& role) {
    double sum = 0;
    for (const Parameter& p : run.trainer.model().parameters().all()) {
      const std::int64_t held = std::clamp<std::int64_t>(old_rows(p) - p.first_row, 0, p.rows);
      if (p.path().ends_with(role) && held < p.rows) sum += squares(rows_of(p.gradient, held, p.rows - held));
    }
    return sum_over(*run.mesh.tp_comm, sum);
  };
  run.trainer.step();
  EXPECT_GT(new_gradient(".keys"), 0.0);
  EXPECT_EQ(new_gradient(".values"), 0.0);  // GELU(0) = 0: their weight is still zero
  run.trainer.step();
  EXPECT_GT(new_gradient(".keys"), 0.0);
  EXPECT_GT(new_gradient(".values"), 0.0);
}

/// Parts of a run's flat tensors, stepped one by one, segment by segment.
class OneByOne {
 public:
  explicit OneByOne(TinyRun& run) : run_(run) {
    for (std::size_t i = 0; i < parameters().size(); ++i) {
      const AdamW::State& state = run_.trainer.optimizer().state(i);
      copies_.push_back({parameters()[i].value().clone(run_.allocator), state.m.clone(run_.allocator),
                         state.v.clone(run_.allocator)});
    }
  }
  /// Follows the step that the run has just taken without clipping, and expects its bits.
  void expect_same(const RunConfig& config, double lr) {
    for (std::size_t i = 0; i < parameters().size(); ++i) {
      const Parameter& p = parameters()[i];
      const AdamW::State& state = run_.trainer.optimizer().state(i);
      for (std::size_t k = 0; k < state.segments.size(); ++k) {
        const std::int64_t end = k + 1 < state.segments.size() ? state.segments[k + 1].first_row : p.rows;
        const RowRange rows{state.segments[k].first_row, end - state.segments[k].first_row};
        kernels::AdamWStep step;
        step.lr = lr;
        step.beta1 = config.train.beta1;
        step.beta2 = config.train.beta2;
        step.eps = config.train.eps;
        step.weight_decay = p.spec.decay == Decay::yes ? config.train.weight_decay : 0;
        step.bias1 = 1 - std::pow(step.beta1, static_cast<double>(state.segments[k].age));
        step.bias2 = 1 - std::pow(step.beta2, static_cast<double>(state.segments[k].age));
        const auto part = [&](const Tensor& x) { return x.rows(rows.first, rows.rows); };
        Tensor value = part(copies_[i].value), m = part(copies_[i].m), v = part(copies_[i].v);
        const Tensor gradient = part(p.gradient);
        kernels::adamw_update(run_.stream, step, value.view(), gradient.view(), m.view(), v.view());
      }
      EXPECT_TRUE(values_of(copies_[i].value) == values_of(p.value())) << p.path();
      EXPECT_TRUE(values_of(copies_[i].m) == values_of(state.m)) << p.path();
      EXPECT_TRUE(values_of(copies_[i].v) == values_of(state.v)) << p.path();
    }
  }

 private:
  struct Copy {
    Tensor value, m, v;
  };
  std::deque<Parameter>& parameters() { return run_.trainer.model().parameters().all(); }

  TinyRun& run_;
  std::vector<Copy> copies_;
};

TEST_F(AfterGrowth, NeighboursOfOneAgeAreOneUpdate) {
  config_.train.clip = 0;
  config_.train.growth.new_rows_warmup_steps = 0;
  const auto calls_of_a_step = [&](TinyRun run) {
    run.trainer.step();
    OneByOne alone(run);
    Profile profile;
    run.stream.set_profile(&profile);
    const StepResult result = run.trainer.step();
    run.stream.set_profile(nullptr);
    alone.expect_same(config_, result.lr);
    std::map<std::string_view, std::int64_t> calls;
    for (const Profile::Entry& entry : profile.entries()) calls[entry.name] = entry.calls;
    return std::pair(calls["adamw_update"], calls["sum_of_squares"]);
  };
  // The last norm does not decay, and is held whole.
  EXPECT_EQ(calls_of_a_step({config_, lab_, alone()}), (std::pair<std::int64_t, std::int64_t>(2, 2)));
  // 2 layers have 8 grown matrices each, whose new rows part the old ones; the norm does not ask for ages.
  EXPECT_EQ(calls_of_a_step({config_, lab_, alone(), lab_.path("grown")}),
            (std::pair<std::int64_t, std::int64_t>(2 * 2 * 8 + 1, 2)));
}

TEST_F(AfterGrowth, FrozenOldRowsAreUntouched) {
  config_.train.growth.old_rows = OldRows::freeze;
  TinyRun run(config_, lab_, mesh(), lab_.path("grown"));
  const std::vector<Snapshot> old = snapshots(run, Rows::old_ones);
  const std::vector<double> fresh = values(run, Rows::new_ones);
  StepResult result;
  for (int i = 0; i < 3; ++i) result = run.trainer.step();
  EXPECT_TRUE(snapshots(run, Rows::old_ones) == old);
  if (!fresh.empty()) {
    EXPECT_NE(values(run, Rows::new_ones), fresh);
  }
  // They have no share in the norm either.
  double sum = 0;
  for (const Parameter& p : run.trainer.model().parameters().all()) {
    const std::int64_t held = std::clamp<std::int64_t>(old_rows(p) - p.first_row, 0, p.rows);
    if (held < p.rows) sum += squares(rows_of(p.gradient, held, p.rows - held));
  }
  EXPECT_NEAR(result.grad_norm / std::sqrt(sum_over(*run.mesh.tp_comm, sum)), 1.0, 1e-12);
}

TEST_F(AfterGrowth, OldRowsHaveARateOfTheirOwn) {
  const std::vector<double> full = first_change(Rows::old_ones), full_new = first_change(Rows::new_ones);
  config_.train.growth.old_rows = OldRows::rate;
  config_.train.growth.old_rows_rate = 0.25;
  const std::vector<double> part = first_change(Rows::old_ones);
  ASSERT_FALSE(full.empty());
  double largest = 0;
  for (std::size_t i = 0; i < full.size(); ++i) {
    EXPECT_NEAR(part[i], 0.25 * full[i], 1e-12);
    largest = std::max(largest, std::abs(full[i]));
  }
  EXPECT_GT(largest, 1e-5);
  EXPECT_EQ(first_change(Rows::new_ones), full_new);
}

TEST_F(AfterGrowth, NewRowsWarmUpOverTheirOwnAge) {
  const std::vector<double> full = first_change(Rows::new_ones), full_old = first_change(Rows::old_ones);
  config_.train.growth.new_rows_warmup_steps = 8;
  const std::vector<double> part = first_change(Rows::new_ones);
  for (std::size_t i = 0; i < full.size(); ++i) EXPECT_NEAR(part[i], full[i] / 8, 1e-12);
  EXPECT_EQ(first_change(Rows::old_ones), full_old);
}

TEST_F(AfterGrowth, MomentsOfOldRowsAreKeptOrReset) {
  TinyRun kept(config_, lab_, mesh(), lab_.path("grown"));
  config_.train.growth.moments = OldMoments::reset;
  TinyRun reset(config_, lab_, mesh(), lab_.path("grown"));
  double moments_kept = 0;
  for (std::size_t i = 0; i < kept.trainer.model().parameters().all().size(); ++i) {
    const Snapshot a = snapshot(kept, i, Rows::old_ones), b = snapshot(reset, i, Rows::old_ones);
    EXPECT_EQ(a.value, b.value);
    EXPECT_EQ(a.segments, (std::vector<AgeSegment>{{0, kOldSteps, 0}}));
    EXPECT_EQ(b.segments, (std::vector<AgeSegment>{{0, 0, 0}}));
    moments_kept += squares(a.m);
    EXPECT_EQ(squares(b.m) + squares(b.v), 0.0);
  }
  EXPECT_GT(moments_kept, 0.0);
}

TEST_F(AfterGrowth, WhatAGrowthAsksForHappensOnce) {
  config_.train.growth.moments = OldMoments::reset;
  config_.train.growth.restart_peak_fraction = 0.5;
  {
    TinyRun run(config_, lab_, mesh(), lab_.path("grown"));
    EXPECT_EQ(run.trainer.state().schedule_start, kOldSteps);
    EXPECT_EQ(run.trainer.state().growths_applied, 4);
    const std::vector<StepResult> results = train(run.trainer, 3);
    EXPECT_DOUBLE_EQ(results[0].lr, 0.5 * config_.train.lr / 5);  // the warm-up begins again
    run.trainer.save(test_world(), lab_.path("later"), Retention::rolling);
    train(run.trainer, 2);
    run.trainer.save(test_world(), lab_.path("whole"), Retention::rolling);
  }
  TinyRun run(config_, lab_, mesh(), lab_.path("later"));
  EXPECT_EQ(run.trainer.state().schedule_start, kOldSteps);
  EXPECT_EQ(run.trainer.optimizer().state(0).segments[0].age, 3);
  EXPECT_GT(squares(values_of(run.trainer.optimizer().state(0).v)), 0.0);
  train(run.trainer, 2);
  run.trainer.save(test_world(), lab_.path("resumed"), Retention::rolling);
  expect_same_content(lab_.path("whole"), lab_.path("resumed"));
}

TEST_F(AfterGrowth, ScheduleContinuesWhenAsked) {
  config_.train.growth.schedule = GrowthSchedule::continues;
  TinyRun run(config_, lab_, mesh(), lab_.path("grown"));
  EXPECT_EQ(run.trainer.state().schedule_start, 0);
  EXPECT_DOUBLE_EQ(run.trainer.step().lr, make_schedule(config_.train, 0).lr(kOldSteps));
}

}  // namespace
}  // namespace tforge::test
