// The formulas of what a step sends, against what the communicators count; and the model of what it costs.
#include "train/communication_model.h"

#include <gtest/gtest.h>

#include <array>

#include "support/tiny_run.h"

namespace tforge::test {
namespace {

Volume counted(const Communicator::Traffic& before, const Communicator::Traffic& after) {
  return {static_cast<std::int64_t>(after.calls - before.calls), static_cast<std::int64_t>(after.bytes - before.bytes)};
}

void expect_counted(const Lab& lab, const RunConfig& config, std::pair<int, int> layout) {
  TinyRun run(config, lab, mesh_of(layout));
  const Communicator::Traffic dp = run.mesh.dp_comm->traffic(), tp = run.mesh.tp_comm->traffic();
  run.trainer.step();
  const std::vector<Bucket> buckets = run.trainer.model().parameters().buckets(bucket_bytes(config), run.mesh.dp);
  const std::vector<Exchange> model = step_exchanges(config, run.trainer.model().plan(), buckets,
                                                     {run.mesh.dp, run.mesh.tp, run.mesh.dp_index, run.mesh.tp_index});
  const Volume over_dp = counted(dp, run.mesh.dp_comm->traffic()), over_tp = counted(tp, run.mesh.tp_comm->traffic());
  const std::string what =
      fmt::format("{} {} reduction {} micro-batch {} recompute {}\n{}", text_of(layout), name_of(config.model.norm),
                  static_cast<int>(config.parallel.reduction), config.train.micro_batch,
                  static_cast<int>(config.train.saves.recompute), communication_text(model));
  EXPECT_EQ(volume_of(model, MeshAxis::dp).calls, over_dp.calls) << what;
  EXPECT_EQ(volume_of(model, MeshAxis::dp).bytes, over_dp.bytes) << what;
  EXPECT_EQ(volume_of(model, MeshAxis::tp).calls, over_tp.calls) << what;
  EXPECT_EQ(volume_of(model, MeshAxis::tp).bytes, over_tp.bytes) << what;
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
