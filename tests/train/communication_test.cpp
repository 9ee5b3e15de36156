// The formulas of what a step sends, against what the communicators count; and the model of what it costs.
#include "train/communication_model.h"

#include <gtest/gtest.h>

#include <array>

#include "support/run_checks.h"

namespace tforge::test {
namespace {

void expect_counted(const Lab& lab, const RunConfig& config, std::pair<int, int> layout) {
  TinyRun run(config, lab, mesh_of(layout));
  expect_traffic_of_formula(run, config,
                            fmt::format("{} {} reduction {} micro-batch {} recompute {}", text_of(layout),
                                        name_of(config.model.norm), static_cast<int>(config.parallel.reduction),
                                        config.train.micro_batch, static_cast<int>(config.train.saves.recompute)));
}

TEST(Communication, AStepSendsWhatTheFormulasSay) {
  const Lab lab;
  for (const auto& layout : layouts()) {
    for (const PattentionNorm norm :
         {PattentionNorm::l2_norm_gelu, PattentionNorm::gelu_l2_norm, PattentionNorm::softmax}) {
      for (const Reduction reduction : {Reduction::blocking, Reduction::polled}) {
        for (const std::int64_t micro : {0, 2}) {
          RunConfig config = lab.config(norm == PattentionNorm::softmax ? DType::f64 : DType::f32, norm);
          config.train.micro_batch = micro;
          config.parallel.reduction = reduction;
          config.parallel.bucket_mb = 0.02;
          config.parallel.zero = norm == PattentionNorm::gelu_l2_norm ? 1 : 0;
          expect_counted(lab, config, layout);
        }
      }
      RunConfig config = lab.config(DType::f32, norm);
      config.train.saves.recompute = Recompute::block;
      expect_counted(lab, config, layout);
    }
  }
}

TEST(Communication, RingCosts) {
  const Link link{.bytes_per_second = 1e9, .latency = 1e-6};
  const Exchange reduce{"x", MeshAxis::dp, Collective::all_reduce, 3, 4'000'000, Timing::during_backward};
  EXPECT_DOUBLE_EQ(ring_seconds(reduce, 4, link), 6 * (3e-6 + 1e-3));
  const Exchange scatter{"x", MeshAxis::dp, Collective::reduce_scatter, 3, 4'000'000, Timing::in_line};
  EXPECT_DOUBLE_EQ(ring_seconds(scatter, 4, link), 3 * (3e-6 + 1e-3));
  const Exchange gather{"x", MeshAxis::dp, Collective::all_gather, 1, 1'000'000, Timing::in_line};
  EXPECT_DOUBLE_EQ(ring_seconds(gather, 4, link), 3 * (1e-6 + 1e-3));
  EXPECT_EQ(ring_seconds(gather, 1, link), 0);
}

TEST(Communication, BackwardHidesWhatItOverlapsButNotTheLastBucket) {
  const Link link{.bytes_per_second = 1e9, .latency = 0};
  const MeshPlace place{.dp = 2};
  const std::vector<Exchange> all = {
      {"buckets", MeshAxis::dp, Collective::all_reduce, 4, 4'000'000, Timing::during_backward},  // 4 of 1 ms
      {"loss", MeshAxis::dp, Collective::all_reduce, 1, 500'000, Timing::in_line}};              // 0.5 ms
  EXPECT_DOUBLE_EQ(predict(all, place, link, 10e-3).communication, 4.5e-3);
  EXPECT_DOUBLE_EQ(predict(all, place, link, 10e-3).exposed, 1.5e-3);
  EXPECT_DOUBLE_EQ(predict(all, place, link, 1e-3).exposed, 3.5e-3);
}

}  // namespace
}  // namespace tforge::test
