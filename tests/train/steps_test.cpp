// Steps that are skipped, cut into micro-batches, or end a run.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <limits>

#include "checkpoint/folder.h"
#include "support/tiny_run.h"
#include "train/run.h"

namespace tforge::test {
namespace {

/// Everything that an update may change on this rank.
std::vector<std::vector<double>> everything(TinyRun& run) {
  std::vector<std::vector<double>> all;
  for (std::size_t i = 0; i < run.trainer.model().parameters().all().size(); ++i) {
    const AdamW::State& state = run.trainer.optimizer().state(i);
    all.push_back(values_of(run.trainer.model().parameters().all()[i].value()));
    all.push_back(values_of(state.m));
    all.push_back(values_of(state.v));
    all.push_back({static_cast<double>(state.segments[0].age)});
  }
  return all;
}

/// Every layout, with moments unsharded and sharded.
std::vector<std::pair<std::pair<int, int>, std::int64_t>> settings() {
  std::vector<std::pair<std::pair<int, int>, std::int64_t>> all;
  for (const auto& layout : layouts()) {
    for (const std::int64_t zero : {0, 1}) all.emplace_back(layout, zero);
  }
  return all;
}

TEST(BadStep, ChangesNothingButTheCounters) {
  const Lab lab;
  for (const auto& [layout, zero] : settings()) {
    RunConfig config = lab.config(DType::f32);
    config.parallel.zero = zero;
    TinyRun run(config, lab, mesh_of(layout));
    train(run.trainer, 3);
    // One number of one shard is spoilt, on every replica of it; all ranks must see it.
    float* spoilt = nullptr;
    if (run.mesh.tp_index == run.mesh.tp - 1) {
      spoilt = run.trainer.model().parameters().find("layers.1.ffn.values").value().span<float>().data();
    }
    const float good = spoilt != nullptr ? *spoilt : 0;
    for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
      const std::vector<std::vector<double>> before = everything(run);
      const std::int64_t skipped = run.trainer.state().skipped_steps;
      if (spoilt != nullptr) *spoilt = bad;
      const StepResult result = run.trainer.step();
      if (spoilt != nullptr) *spoilt = good;
      EXPECT_EQ(result.update, Update::skipped) << text_of(layout) << " " << bad;
      EXPECT_EQ(run.trainer.state().skipped_steps, skipped + 1);
      EXPECT_TRUE(everything(run) == before) << text_of(layout) << " " << bad;
    }
    EXPECT_EQ(run.trainer.state().step, 5);
    EXPECT_EQ(run.trainer.state().samples, 30);
    EXPECT_EQ(run.trainer.step().update, Update::applied);
    EXPECT_EQ(run.trainer.optimizer().state(0).segments[0].age, 4);
  }
}

TEST(BadStep, OneBadGradientOfOneRankSpoilsTheNormOfAll) {
  const Lab lab;
  for (const auto& [layout, zero] : settings()) {
    RunConfig config = lab.config(DType::f32);
    config.parallel.zero = zero;
    TinyRun run(config, lab, mesh_of(layout));
    run.trainer.step();
    const auto norm = [&] { return run.trainer.optimizer().gradient_norm(run.stream, config.train, 0, run.mesh); };
    EXPECT_TRUE(std::isfinite(norm()));
    if (run.mesh.tp_index == run.mesh.tp - 1) {
      run.trainer.model().parameters().find("layers.1.ffn.values").gradient.span<float>().back() =
          std::numeric_limits<float>::quiet_NaN();
    }
    EXPECT_FALSE(std::isfinite(norm())) << text_of(layout);
  }
}

TEST(MicroBatches, GiveTheWholeBatch) {
  const Lab lab;
  RunConfig config = lab.config(DType::f64);
  config.train.clip = 0.3;
  for (const auto& layout : layouts()) {
    TinyRun whole(config, lab, mesh_of(layout));
    const std::vector<StepResult> want = train(whole.trainer, 4);
    for (const std::int64_t micro : {1, 4}) {
      config.train.micro_batch = micro;
      TinyRun run(config, lab, mesh_of(layout));
      const std::vector<StepResult> got = train(run.trainer, 4);
      for (std::size_t i = 0; i < got.size(); ++i) {
        EXPECT_LE(relative(got[i].loss, want[i].loss), 1e-12) << text_of(layout) << ", micro-batch " << micro;
        EXPECT_LE(relative(got[i].grad_norm, want[i].grad_norm), 1e-11) << text_of(layout) << ", micro-batch " << micro;
      }
    }
    config.train.micro_batch = 0;
  }
}

// ---- poll points ----

/// How often a rank is asked, until `last` (0: never) throws.
struct Polls {
  std::int64_t last = 0;
  std::int64_t asked = 0;
  std::vector<double> left{};
  struct Stop {};
  void operator()(double part) {
    left.push_back(part);
    if (++asked == last) throw Stop{};
  }
};

/// Equally many on every rank.
void expect_agreed(std::int64_t count) {
  for (const std::string& other : test_world().all_gather_bytes(std::to_string(count))) {
    EXPECT_EQ(other, std::to_string(count));
  }
}

TEST(PollPoints, AStepThatIsGivenUpLeavesNoTrace) {
  const Lab lab;
  for (const auto& [layout, zero] : settings()) {
    RunConfig config = lab.config(DType::f32);
    config.train.batch = 13;
    config.train.micro_batch = 1;
    config.parallel.zero = zero;
    config.parallel.reduction = zero == 1 ? Reduction::polled : Reduction::blocking;
    TinyRun plain(config, lab, mesh_of(layout));
    const std::vector<StepResult> want = train(plain.trainer, 4);
    TinyRun run(config, lab, mesh_of(layout));
    train(run.trainer, 2);
    const std::vector<std::vector<double>> before = everything(run);
    Polls all, second{.last = 2};
    EXPECT_THROW(run.trainer.step([&](double left) { second(left); }), Polls::Stop) << text_of(layout);
    EXPECT_EQ(second.asked, 2);
    EXPECT_TRUE(everything(run) == before) << text_of(layout);
    EXPECT_EQ(run.trainer.state().step, 2);
    EXPECT_EQ(run.trainer.state().samples, 26);
    // As if it had not been: the step that is asked and goes on, and the one after it.
    const StepResult third = run.trainer.step([&](double left) { all(left); });
    EXPECT_EQ(third.loss, want[2].loss) << text_of(layout);
    EXPECT_EQ(run.trainer.step().loss, want[3].loss) << text_of(layout);
    EXPECT_TRUE(everything(run) == everything(plain)) << text_of(layout);
    EXPECT_EQ(all.asked, 13 / layout.first - 1) << text_of(layout);
    expect_agreed(all.asked);
    EXPECT_TRUE(std::ranges::all_of(all.left, [](double part) { return part > 0 && part < 1; }));
    EXPECT_TRUE(std::ranges::is_sorted(all.left, std::greater<>()));
  }
}

TEST(PollPoints, AnEvaluationIsAskedEquallyOftenEverywhere) {
  const Lab lab;
  for (const auto& layout : layouts()) {
    TinyRun run(lab.config(DType::f32), lab, mesh_of(layout));
    const EvalResult want = run.trainer.evaluate(Split::validation, {.batch = 3});
    for (const std::int64_t batch : {1, 3, 1000}) {
      Polls all;
      const EvalResult got = run.trainer.evaluate(Split::validation, {.batch = batch, .poll = [&] { all(0); }});
      EXPECT_EQ(got.tokens, want.tokens);
      EXPECT_EQ(all.asked > 0, batch < 1000) << text_of(layout);
      expect_agreed(all.asked);
    }
    Polls first{.last = 1};
    EXPECT_THROW(run.trainer.evaluate(Split::validation, {.batch = 1, .poll = [&] { first(0); }}), Polls::Stop);
    EXPECT_EQ(run.trainer.evaluate(Split::validation, {.batch = 3}).nll_sum, want.nll_sum) << text_of(layout);
  }
}

// ---- run_training ----

RunRequest request_of(const RunConfig& config) {
  RunRequest request;
  request.asked.config = config;
  request.asked.config.model.vocab = 0;
  request.asked.config.run.threads = 1;
  request.asked.config.run.save_every = 0;
  request.asked.config.train.eval_every = 0;
  return request;
}

TEST(RunTraining, StopsAtTheLastGoodCheckpointWhenItDiverges) {
  const Lab lab;
  RunConfig config = lab.config(DType::f32);
  config.train.steps = 5;
  EXPECT_EQ(run_training(test_world(), request_of(config)), ExitCode::done);
  const std::string last = config.run.dir + "/" + checkpoint_name(5);
  const std::string digest = CheckpointReader::open(last).info().digest;
  test_world().barrier();

  RunConfig wild = config;
  wild.train.steps = 40;
  wild.train.lr = 1e38;
  wild.train.schedule = ScheduleKind::constant;
  wild.train.warmup_steps = 0;
  wild.train.max_bad_steps = 3;
  expect_error<DivergedError>([&] { run_training(test_world(), request_of(wild)); }, "3 updates in a row",
                              ExitCode::diverged);
  ASSERT_TRUE(latest_checkpoint(config.run.dir));
  EXPECT_EQ(latest_checkpoint(config.run.dir)->path, last);
  EXPECT_EQ(CheckpointReader::open(last).info().digest, digest);
  test_world().barrier();

  config.train.steps = 7;
  EXPECT_EQ(run_training(test_world(), request_of(config)), ExitCode::done);
  EXPECT_EQ(latest_checkpoint(config.run.dir)->step, 7);
}

TEST(RunTraining, EndsAtItsLimits) {
  const Lab lab;
  RunConfig config = lab.config(DType::f32);
  config.train.steps = 12;
  config.train.max_tokens = 4 * 6 * 32 - 1;  // in the middle of the fourth step
  EXPECT_EQ(run_training(test_world(), request_of(config)), ExitCode::done);
  EXPECT_EQ(latest_checkpoint(config.run.dir)->step, 4);
  test_world().barrier();

  config.train.max_tokens = 0;
  config.train.max_time = 1e-6;
  EXPECT_EQ(run_training(test_world(), request_of(config)), ExitCode::requeue);
  EXPECT_EQ(latest_checkpoint(config.run.dir)->step, 5);
  test_world().barrier();

  // What is requeued goes on to the same end as a run that was never stopped.
  config.train.max_time = 0;
  EXPECT_EQ(run_training(test_world(), request_of(config)), ExitCode::done);
  RunConfig other = config;
  other.run.dir = lab.path("other");
  EXPECT_EQ(run_training(test_world(), request_of(other)), ExitCode::done);
  expect_same_content(config.run.dir + "/" + checkpoint_name(12), other.run.dir + "/" + checkpoint_name(12));
}

}  // namespace
}  // namespace tforge::test
