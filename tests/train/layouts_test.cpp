// One training run is the same run on every layout of the ranks, and after a stop.
#include <gtest/gtest.h>

#include "model/tokenformer.h"
#include "support/tiny_run.h"

namespace tforge::test {
namespace {

constexpr int kSteps = 50;

/// Losses agree to `loss_tolerance` at every step; norms to `norm_tolerance` in the first `norm_steps`.
void expect_agreement(const std::vector<StepResult>& got, const std::vector<StepResult>& want, double loss_tolerance,
                      std::size_t norm_steps, double norm_tolerance, const std::string& what) {
  ASSERT_EQ(got.size(), want.size());
  double worst_loss = 0, worst_norm = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    worst_loss = std::max(worst_loss, relative(got[i].loss, want[i].loss));
    if (i < norm_steps) worst_norm = std::max(worst_norm, relative(got[i].grad_norm, want[i].grad_norm));
    EXPECT_EQ(got[i].update, Update::applied);
    EXPECT_LE(relative(got[i].loss, want[i].loss), loss_tolerance) << what << ", step " << i;
    if (i < norm_steps) {
      EXPECT_LE(relative(got[i].grad_norm, want[i].grad_norm), norm_tolerance) << what << ", step " << i;
    }
  }
  if (test_world().rank() == 0) std::printf("%s: loss within %.1e, norm %.1e\n", what.c_str(), worst_loss, worst_norm);
}

TEST(Layouts, LossesOfFiftyStepsF32) {
  const Lab lab;
  const RunConfig config = lab.config(DType::f32);
  TinyRun reference(config, lab, alone());
  const auto want = train(reference.trainer, kSteps);
  EXPECT_LT(want.back().loss, 0.7 * want.front().loss);  // there is something to agree about
  for (const auto& layout : layouts()) {
    TinyRun run(config, lab, mesh_of(layout));
    expect_agreement(train(run.trainer, kSteps), want, 1e-4, 1, 1e-6, text_of(layout));
  }
}

TEST(Layouts, LossesAndNormsOfFiftyStepsF64) {
  const Lab lab;
  const RunConfig config = lab.config(DType::f64);
  TinyRun reference(config, lab, alone());
  const auto want = train(reference.trainer, kSteps);
  for (const auto& layout : layouts()) {
    TinyRun run(config, lab, mesh_of(layout));
    expect_agreement(train(run.trainer, kSteps), want, 1e-9, kSteps, 1e-9, text_of(layout));
  }
}

TEST(Layouts, AllNormalisations) {
  const Lab lab;
  for (const PattentionNorm norm : {PattentionNorm::gelu_l2_norm, PattentionNorm::softmax}) {
    const RunConfig config = lab.config(DType::f64, norm);
    TinyRun reference(config, lab, alone());
    const auto want = train(reference.trainer, 6);
    for (const auto& layout : layouts()) {
      TinyRun run(config, lab, mesh_of(layout));
      expect_agreement(train(run.trainer, 6), want, 1e-10, 6, 1e-9,
                       fmt::format("{} {}", text_of(layout), name_of(norm)));
    }
  }
}

TEST(Resume, SameLayoutGivesTheSameBits) {
  const Lab lab;
  const RunConfig config = lab.config(DType::f32);
  for (const auto& layout : layouts()) {
    const std::string half = lab.path("half"), whole = lab.path("whole"), resumed = lab.path("resumed");
    {
      TinyRun run(config, lab, mesh_of(layout));
      train(run.trainer, kSteps / 2);
      run.trainer.save(test_world(), half, Retention::rolling);
      train(run.trainer, kSteps / 2);
      run.trainer.save(test_world(), whole, Retention::rolling);
    }
    TinyRun run(config, lab, mesh_of(layout), half);
    EXPECT_EQ(run.trainer.state().step, kSteps / 2);
    train(run.trainer, kSteps / 2);
    run.trainer.save(test_world(), resumed, Retention::rolling);
    expect_same_content(whole, resumed);
    EXPECT_NE(CheckpointReader::open(half).tensor("model/embedding").content_digest,
              CheckpointReader::open(whole).tensor("model/embedding").content_digest);
    test_world().barrier();
  }
}

TEST(Resume, OtherLayoutStaysClose) {
  const Lab lab;
  const RunConfig config = lab.config(DType::f32);
  TinyRun reference(config, lab, alone());
  train(reference.trainer, kSteps / 2);
  save_alone(reference, lab.path("alone"));
  const auto want = train(reference.trainer, kSteps / 2);
  for (const auto& first : layouts()) {
    const std::string half = lab.path("half_" + text_of(first));
    {
      // From one rank to this layout.
      TinyRun run(config, lab, mesh_of(first), lab.path("alone"));
      expect_agreement(train(run.trainer, kSteps / 2), want, 1e-4, 1, 1e-6, "1x1 to " + text_of(first));
    }
    {
      TinyRun run(config, lab, mesh_of(first));
      train(run.trainer, kSteps / 2);
      run.trainer.save(test_world(), half, Retention::rolling);
    }
    for (const auto& second : layouts()) {
      if (first == second) continue;
      TinyRun run(config, lab, mesh_of(second), half);
      expect_agreement(train(run.trainer, kSteps / 2), want, 1e-4, 0, 0, text_of(first) + " to " + text_of(second));
    }
    TinyRun run(config, lab, alone(), half);
    expect_agreement(train(run.trainer, kSteps / 2), want, 1e-4, 0, 0, text_of(first) + " to 1x1");
  }
}

/// In f64 other samples would show at once: the losses of two samples differ by far more than rounding.
TEST(Resume, SamplesGoOnWhateverRanksAndMicroBatches) {
  const Lab lab;
  RunConfig config = lab.config(DType::f64);
  TinyRun reference(config, lab, alone());
  train(reference.trainer, 5);
  save_alone(reference, lab.path("five"));
  const auto want = train(reference.trainer, 4);
  for (const auto& layout : layouts()) {
    for (const std::int64_t micro : {1, 2, 4}) {
      config.train.micro_batch = micro;
      const std::string what = fmt::format("{} micro-batch {}", text_of(layout), micro);
      const std::string seven = lab.path("seven");
      {
        TinyRun run(config, lab, mesh_of(layout), lab.path("five"));
        expect_agreement(train(run.trainer, 2), {want.begin(), want.begin() + 2}, 1e-10, 2, 1e-9, what);
        run.trainer.save(test_world(), seven, Retention::rolling);
      }
      // And back: on one rank, all at once.
      config.train.micro_batch = 0;
      TinyRun run(config, lab, alone(), seven);
      expect_agreement(train(run.trainer, 2), {want.begin() + 2, want.end()}, 1e-10, 2, 1e-9, what + " and back");
      test_world().barrier();
    }
  }
  EXPECT_GT(relative(want[2].loss, want[3].loss), 1e-6);
}

TEST(Resume, ReadsTheSameBitsOnEveryLayout) {
  const Lab lab;
  const RunConfig config = lab.config(DType::f32);
  train_and_save(lab, config, 3, lab.path("alone"));
  for (const auto& layout : layouts()) {
    TinyRun run(config, lab, mesh_of(layout), lab.path("alone"));
    run.trainer.save(test_world(), lab.path("again"), Retention::rolling);
    expect_same_content(lab.path("alone"), lab.path("again"));
    test_world().barrier();
  }
}

TEST(Resume, TheDataGoesOnOnOtherRanksAndMicroBatches) {
  const Lab lab;
  RunConfig config = lab.config(DType::f64);
  TinyRun reference(config, lab, alone());
  train(reference.trainer, 4);
  save_alone(reference, lab.path("alone"));
  const auto want = train(reference.trainer, 4);
  for (const auto& layout : layouts()) {
    for (const std::int64_t micro : {0, 1, 2}) {
      config.train.micro_batch = micro;
      TinyRun run(config, lab, mesh_of(layout), lab.path("alone"));
      EXPECT_EQ(run.trainer.state().samples, 4 * config.train.batch);
      // Another sample, or one twice, changes a loss in its second or third digit.
      expect_agreement(train(run.trainer, 4), want, 1e-10, 4, 1e-9,
                       fmt::format("{} micro-batch {}", text_of(layout), micro));
      EXPECT_EQ(run.trainer.state().samples, 8 * config.train.batch);
    }
  }
}

TEST(MicroBatches, CoverTheBatchOnceInOrder) {
  const Lab lab;
  RunConfig config = lab.config(DType::f32);
  config.train.batch = 11;
  for (const Determinism mode : {Determinism::same_layout, Determinism::layout_independent}) {
    config.run.deterministic = mode;
    for (const int dp : {1, 2, 3, 4}) {
      for (const std::int64_t micro : {0, 1, 2, 3}) {
        config.train.micro_batch = micro;
        std::int64_t next = 0;
        for (int r = 0; r < dp; ++r) {
          std::int64_t shard = 0;
          for (const MicroRange& range : micro_batches(config, dp, r)) {
            EXPECT_EQ(range.first, next);
            EXPECT_GT(range.count, 0);
            EXPECT_TRUE(micro == 0 || range.count <= micro);
            EXPECT_TRUE(range.shard == shard || range.shard == shard + 1);
            shard = range.shard;
            next = range.first + range.count;
          }
          EXPECT_EQ(shard + 1, deal_shards(config, dp).count(r));
        }
        EXPECT_EQ(next, config.train.batch);
      }
    }
  }
}

// ---- token_shards = "append" ----

ExpandRequest doubled(const Lab& lab, const RunConfig& config) {
  ExpandRequest request;
  request.checkpoint = lab.path("small");
  request.output = lab.path("grown");
  std::array<std::int64_t, 5> tokens = config.model.tokens;
  for (std::int64_t& n : tokens) n *= 2;
  request.growth.counts = counts_of(tokens);
  return request;
}

TEST(AppendedShards, OldRankKeepsEveryOldRow) {
  if (test_world().size() == 1) GTEST_SKIP() << "no rank to add";
  const Lab lab;
  RunConfig config = lab.config(DType::f64);
  train_and_save(lab, config, 10, lab.path("small"));
  expand_alone(doubled(lab, config));
  const CheckpointReader parent = CheckpointReader::open(lab.path("small"));
  const CheckpointReader grown = CheckpointReader::open(lab.path("grown"));
  config.train.growth.new_rows_warmup_steps = 3;
  TinyRun reference(config, lab, alone(), lab.path("grown"));
  const auto want = train(reference.trainer, 5);

  for (const auto& layout : layouts()) {
    if (layout.second == 1) continue;
    config.parallel.token_shards = TokenShards::even;
    std::int64_t moved_if_even = 0;
    {
      TinyRun even(config, lab, mesh_of(layout), lab.path("grown"));
      for (const TokenGroup group : kTokenGroups) {
        const auto g = static_cast<std::size_t>(group);
        moved_if_even += ShardBorders::moved_rows(stored_borders(grown)[g], even.trainer.model().plan().units[g]);
      }
    }
    // An even split of a doubled model over two ranks moves nothing either; over more it does.
    if (layout.second > 2) {
      EXPECT_GT(moved_if_even, 0) << text_of(layout);
    }

    config.parallel.token_shards = TokenShards::append;
    TinyRun run(config, lab, mesh_of(layout), lab.path("grown"));
    const bool old_rank = run.mesh.tp_index == 0;
    for (const TokenGroup group : kTokenGroups) {
      const auto g = static_cast<std::size_t>(group);
      EXPECT_EQ(ShardBorders::moved_rows(stored_borders(grown)[g], run.trainer.model().plan().units[g]), 0);
      for (std::int64_t layer = 0; layer < 2; ++layer) {
        for (const char* role : {".keys", ".values"}) {
          const std::string path = TokenFormer::layer_path(layer, group) + role;
          const Parameter& p = run.trainer.model().parameters().find(path);
          const std::int64_t old_rows = config.model.tokens[g];
          if (!old_rank) {
            EXPECT_GE(p.first_row, old_rows) << path;
            EXPECT_GT(p.rows, 0) << path;
            continue;
          }
          EXPECT_EQ(p.first_row, 0) << path;
          ASSERT_EQ(p.rows, old_rows) << path;
          std::vector<double> stored(static_cast<std::size_t>(old_rows * config.model.dim));
          parent.read_rows("model/" + path, 0, old_rows, DType::f64, stored.data());
          EXPECT_EQ(values_of(p.value()), stored) << path;
        }
      }
    }
    expect_agreement(train(run.trainer, 5), want, 1e-9, 5, 1e-9, text_of(layout));
    EXPECT_LT(want.back().loss, want.front().loss);

    // And it can stop and go on with the same shards.
    run.trainer.save(test_world(), lab.path("later"), Retention::rolling);
    TinyRun again(config, lab, mesh_of(layout), lab.path("later"));
    EXPECT_EQ(again.trainer.model().plan().units, run.trainer.model().plan().units);
    test_world().barrier();
  }
}

TEST(AppendedShards, EvenSplitMovesOldRows) {
  if (test_world().size() == 1) GTEST_SKIP() << "no rank to add";
  const Lab lab;
  RunConfig config = lab.config(DType::f32);
  train_and_save(lab, config, 1, lab.path("small"));
  ExpandRequest request = doubled(lab, config);
  for (auto& [name, n] : request.growth.counts)
    n = n / 2 + 4;  // a few more: half of the old ones belong to another rank
  expand_alone(request);
  const CheckpointReader grown = CheckpointReader::open(lab.path("grown"));
  TinyRun run(config, lab, mesh_of({1, test_world().size()}), lab.path("grown"));
  for (const TokenGroup group : kTokenGroups) {
    const auto g = static_cast<std::size_t>(group);
    EXPECT_GT(ShardBorders::moved_rows(stored_borders(grown)[g], run.trainer.model().plan().units[g]), 0);
  }
}

TEST(AppendedShards, RefusedWhenAnAddedRankWouldOwnNothing) {
  if (test_world().size() == 1) GTEST_SKIP() << "no rank to add";
  const Lab lab;
  RunConfig config = lab.config(DType::f32);
  train_and_save(lab, config, 1, lab.path("small"));
  config.parallel.token_shards = TokenShards::append;
  expect_error<ConfigError>(
      [&] {
        TinyRun(config, lab, mesh_of({1, test_world().size()}), lab.path("small"));
      },
      "model.tokens.query");
}

}  // namespace
}  // namespace tforge::test
