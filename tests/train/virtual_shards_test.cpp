// run.deterministic = "layout_independent": a run is the same run, bit by bit, on every layout of the ranks.
#include <gtest/gtest.h>

#include "support/run_checks.h"
#include "train/layout_price.h"

namespace tforge::test {
namespace {

void expect_same(const std::vector<StepResult>& got, const std::vector<StepResult>& want, const std::string& what) {
  ASSERT_EQ(got.size(), want.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    EXPECT_EQ(got[i].update, Update::applied);
    EXPECT_EQ(got[i].loss, want[i].loss) << what << ", step " << i;
    EXPECT_EQ(got[i].grad_norm, want[i].grad_norm) << what << ", step " << i;
  }
}

/// The layouts of the ranks at hand that the shards can be dealt to.
std::vector<std::pair<int, int>> layouts_for(const RunConfig& config) {
  std::vector<std::pair<int, int>> some;
  for (const auto& layout : layouts()) {
    if (layout.first <= config.parallel.virtual_dp && layout.second <= config.parallel.virtual_tp) {
      some.push_back(layout);
    }
  }
  return some;
}

void expect_layout_independent(const Lab& lab, const RunConfig& config, int steps, const std::string& what) {
  TinyRun reference(config, lab, alone());
  const auto want = train(reference.trainer, steps);
  EXPECT_LT(want.back().loss, want.front().loss) << what;
  const EvalResult score = reference.trainer.evaluate(Split::validation, {0, 0, 2, 0});
  save_alone(reference, lab.path("alone"));
  for (const auto& layout : layouts_for(config)) {
    const std::string where = what + " on " + text_of(layout);
    TinyRun run(config, lab, mesh_of(layout));
    expect_same(train(run.trainer, steps), want, where);
    EXPECT_EQ(run.trainer.evaluate(Split::validation, {0, 0, 2, 0}).nll_sum, score.nll_sum) << where;
    run.trainer.save(test_world(), lab.path("here"), Retention::rolling);
    expect_same_content(lab.path("alone"), lab.path("here"));
    test_world().barrier();
  }
}

TEST(LayoutIndependent, EveryNormalisation) {
  const Lab lab;
  for (const PattentionNorm norm :
       {PattentionNorm::l2_norm_gelu, PattentionNorm::gelu_l2_norm, PattentionNorm::softmax}) {
    expect_layout_independent(lab, independent(lab.config(DType::f32, norm)), 12, std::string(name_of(norm)));
  }
}

TEST(LayoutIndependent, MicroBatchesZeroRecomputationAndSavedDtype) {
  const Lab lab;
  RunConfig config = independent(lab.config(DType::f32));
  config.train.micro_batch = 1;
  config.parallel.zero = 1;
  config.parallel.bucket_mb = 0.02;
  config.train.saves = {Recompute::block, SavedDType::bf16};
  expect_layout_independent(lab, config, 8, "block, bf16, zero 1");
  config = independent(lab.config(DType::f64, PattentionNorm::softmax));
  config.train.saves = {Recompute::scores, SavedDType::same};
  config.train.clip = 0.05;
  expect_layout_independent(lab, config, 8, "f64, scores");
}

TEST(LayoutIndependent, OtherNumbersOfShards) {
  const Lab lab;
  RunConfig config = independent(lab.config(DType::f32), 3, 2);
  expect_layout_independent(lab, config, 8, "3 x 2");
  config = independent(lab.config(DType::f32), 6, 1);
  config.parallel.zero = 1;
  expect_layout_independent(lab, config, 8, "6 x 1");
  config = independent(lab.config(DType::f32), 1, 7);
  expect_layout_independent(lab, config, 8, "1 x 7");
}

TEST(LayoutIndependent, StopsOnOneLayoutAndGoesOnOnAnother) {
  const Lab lab;
  const RunConfig config = independent(lab.config(DType::f32));
  TinyRun reference(config, lab, alone());
  const auto want = train(reference.trainer, 12);
  save_alone(reference, lab.path("whole"));
  const auto some = layouts_for(config);
  for (std::size_t i = 0; i < some.size(); ++i) {
    const auto first = some[i], second = some[(i + 1) % some.size()];
    {
      TinyRun run(config, lab, mesh_of(first));
      train(run.trainer, 5);
      run.trainer.save(test_world(), lab.path("first"), Retention::rolling);
    }
    {
      TinyRun run(config, lab, mesh_of(second), lab.path("first"));
      train(run.trainer, 3);
      run.trainer.save(test_world(), lab.path("second"), Retention::rolling);
    }
    TinyRun run(config, lab, mesh_of(first), lab.path("second"));
    expect_same(train(run.trainer, 4), {want.begin() + 8, want.end()}, text_of(first) + " at the end");
    run.trainer.save(test_world(), lab.path("third"), Retention::rolling);
    expect_same_content(lab.path("whole"), lab.path("third"));
    test_world().barrier();
  }
}

TEST(LayoutIndependent, AfterAGrowthTheShardsAreCutAnew) {
  const Lab lab;
  RunConfig config = independent(lab.config(DType::f32));
  train_and_save(lab, config, 5, lab.path("small"));
  ExpandRequest request;
  request.checkpoint = lab.path("small");
  request.output = lab.path("grown");
  std::array<std::int64_t, 5> tokens = config.model.tokens;
  for (std::int64_t& n : tokens) n += 11;
  request.growth.counts = counts_of(tokens);
  expand_alone(request);
  config.train.growth.old_rows = OldRows::freeze;
  config.train.growth.new_rows_warmup_steps = 3;
  TinyRun reference(config, lab, alone(), lab.path("grown"));
  const auto want = train(reference.trainer, 5);
  for (const auto& layout : layouts_for(config)) {
    TinyRun run(config, lab, mesh_of(layout), lab.path("grown"));
    const std::int64_t rows = config.model.tokens[4] + 11;
    EXPECT_EQ(run.trainer.model().plan().shards->units[4], ShardBorders::even(rows, 4, "ffn"));
    expect_same(train(run.trainer, 5), want, text_of(layout));
  }
}

TEST(LayoutIndependent, AStepSendsWhatTheFormulasSay) {
  const Lab lab;
  for (const PattentionNorm norm :
       {PattentionNorm::l2_norm_gelu, PattentionNorm::gelu_l2_norm, PattentionNorm::softmax}) {
    for (const std::int64_t zero : {0, 1}) {
      RunConfig config = independent(lab.config(DType::f32, norm));
      config.parallel.zero = zero;
      config.parallel.bucket_mb = 0.02;
      config.train.micro_batch = 1 + zero;
      if (zero == 0) config.train.saves.recompute = Recompute::block;
      for (const auto& layout : layouts_for(config)) {
        TinyRun run(config, lab, mesh_of(layout));
        const MeshPlace place{run.mesh.dp, run.mesh.tp, run.mesh.dp_index, run.mesh.tp_index};
        expect_traffic_of_formula(run, config, text_of(layout));
        const LayoutPrice price = layout_price(config, place);
        EXPECT_EQ(price.sent > price.sent_same_layout, test_world().size() > 1);
      }
    }
  }
}

TEST(LayoutIndependent, RefusesWhatCannotBeDealt) {
  const Lab lab;
  const auto with = [&](const RunConfig& config, std::pair<int, int> layout) {
    return [&lab, config, layout] { TinyRun(config, lab, mesh_of(layout)); };
  };
  const int p = test_world().size();
  if (p > 1) {
    expect_error<ConfigError>(
        with(independent(lab.config(DType::f32), 1, 4), {p, 1}),
        fmt::format("parallel.virtual_dp = 1 shards cannot be dealt to {} data-parallel ranks", p));
    expect_error<ConfigError>(
        with(independent(lab.config(DType::f32), 4, 1), {1, p}),
        fmt::format("parallel.virtual_tp = 1 shards cannot be dealt to {} tensor-parallel ranks", p));
  }
  expect_error<ConfigError>(with(independent(lab.config(DType::f32), 4, 25), {p, 1}),
                            "model.tokens.value = 24 cannot be cut into parallel.virtual_tp = 25 shards");
}

}  // namespace
}  // namespace tforge::test
