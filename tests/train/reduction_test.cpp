// Gradients that are reduced while backward runs are those that are reduced after it.
#include <gtest/gtest.h>

#include <array>

#include "support/tiny_run.h"

namespace tforge::test {
namespace {

constexpr std::array<Reduction, 3> kReductions = {Reduction::blocking, Reduction::nonblocking, Reduction::polled};

RunConfig config_of(const Lab& lab, DType dtype, Reduction reduction, std::int64_t micro_batch) {
  RunConfig config = lab.config(dtype);
  config.train.micro_batch = micro_batch;
  config.parallel.reduction = reduction;
  config.parallel.bucket_mb = 0.02;  // many buckets even of this model
  return config;
}

/// All gradients of this rank's shard as they lie in memory.
std::string gradient_bits(TinyRun& run) {
  const Tensor& flat = run.trainer.model().parameters().gradients();
  return {static_cast<const char*>(flat.view().data), flat.bytes()};
}

TEST(Reduction, TheLookupOfThisModelIsKeptApartInTheLastMicroBatchOnly) {
  const Lab lab;
  EXPECT_FALSE(separate_lookup(config_of(lab, DType::f32, Reduction::blocking, 1), 2, 256));
  EXPECT_FALSE(separate_lookup(config_of(lab, DType::f32, Reduction::polled, 1), 1, 256));
  EXPECT_TRUE(separate_lookup(config_of(lab, DType::f32, Reduction::polled, 1), 2, 256));  // 2 * 32 rows
  EXPECT_FALSE(separate_lookup(config_of(lab, DType::f32, Reduction::polled, 0), 2, 86));  // 6 * 32 rows
  EXPECT_EQ(last_micro_batches(config_of(lab, DType::f32, Reduction::polled, 2), 4),
            (std::vector<std::int64_t>{2, 2, 1, 1}));
  EXPECT_EQ(last_micro_batches(config_of(lab, DType::f32, Reduction::polled, 2), 2), (std::vector<std::int64_t>{1, 1}));
}

TEST(Reduction, GivesTheSameGradientsInEachWay) {
  const Lab lab;
  for (const auto& layout : layouts()) {
    for (const std::int64_t micro : {0, 2}) {
      std::vector<StepResult> want;
      for (const Reduction reduction : kReductions) {
        TinyRun run(config_of(lab, DType::f64, reduction, micro), lab, mesh_of(layout));
        const auto got = train(run.trainer, 5);
        if (want.empty()) want = got;
        for (std::size_t i = 0; i < got.size(); ++i) {
          EXPECT_LE(relative(got[i].loss, want[i].loss), 1e-12) << text_of(layout) << " step " << i;
          EXPECT_LE(relative(got[i].grad_norm, want[i].grad_norm), 1e-10) << text_of(layout) << " step " << i;
        }
      }
    }
  }
}

TEST(Reduction, GivesTheSameBitsOnEveryRankAndInEveryRun) {
  const Lab lab;
  for (const auto& layout : layouts()) {
    for (const Reduction reduction : kReductions) {
      const RunConfig config = config_of(lab, DType::f32, reduction, 2);
      TinyRun run(config, lab, mesh_of(layout)), again(config, lab, mesh_of(layout));
      train(run.trainer, 3);
      train(again.trainer, 3);
      const std::string mine = gradient_bits(run);
      EXPECT_TRUE(gradient_bits(again) == mine) << text_of(layout);
      for (const std::string& other : run.mesh.dp_comm->all_gather_bytes(mine)) {
        EXPECT_TRUE(other == mine) << text_of(layout);
      }
    }
  }
}

TEST(Reduction, CountsWhatIsExposed) {
  const Lab lab;
  for (const Reduction reduction : kReductions) {
    TinyRun run(config_of(lab, DType::f32, reduction, 0), lab, mesh_of({test_world().size(), 1}));
    run.trainer.step();
    const Communicator::Traffic t = run.mesh.dp_comm->traffic();
    if (run.mesh.dp == 1) continue;
    EXPECT_GT(t.exposed_seconds, 0);
    EXPECT_LE(t.exposed_seconds, t.seconds);
    EXPECT_EQ(t.exposed_seconds == t.seconds, reduction == Reduction::blocking);
  }
}

}  // namespace
}  // namespace tforge::test
