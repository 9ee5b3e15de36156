// ZeRO-1: moments sharded over dp by whole rows change nothing but where they are.
#include <gtest/gtest.h>

#include <cstring>

#include "support/tiny_run.h"

namespace tforge::test {
namespace {

constexpr int kSteps = 6;

RunConfig with_zero(RunConfig config, std::int64_t zero) {
  config.parallel.zero = zero;
  return config;
}

double tolerance(DType dtype) { return dtype == DType::f32 ? 1e-6 : 1e-12; }

/// max|a - b| / max|b| of rows [first, first + rows) of `whole` against `part`.
double difference(const Tensor& part, const Tensor& whole, const RowRange& range) {
  const std::vector<double> a = values_of(part), b = rows_of(whole, range.first, range.rows);
  double worst = 0, largest = 0;
  for (std::size_t i = 0; i < b.size(); ++i) {
    worst = std::max(worst, std::abs(a[i] - b[i]));
    largest = std::max(largest, std::abs(b[i]));
  }
  return worst == 0 ? 0 : worst / largest;
}

/// Values, owned moments and ages of two runs of one layout.
void expect_same_model(TinyRun& sharded, TinyRun& whole, double bound, const std::string& what) {
  double worst = 0;
  for (std::size_t i = 0; i < whole.trainer.model().parameters().all().size(); ++i) {
    const Parameter& p = sharded.trainer.model().parameters().all()[i];
    const Parameter& q = whole.trainer.model().parameters().all()[i];
    const AdamW::State &s = sharded.trainer.optimizer().state(i), &t = whole.trainer.optimizer().state(i);
    const double largest = std::max(
        {difference(p.value(), q.value(), {0, q.rows}), difference(s.m, t.m, s.owned), difference(s.v, t.v, s.owned)});
    EXPECT_LE(largest, bound) << what << ", " << p.path();
    EXPECT_EQ(s.segments, t.segments) << what << ", " << p.path();
    worst = std::max(worst, largest);
  }
  if (test_world().rank() == 0) std::printf("%s: within %.1e\n", what.c_str(), worst);
}

/// Every rank of `group` has the same bytes.
void expect_agreed(Communicator& group, const void* data, std::size_t size, const std::string& what) {
  const std::string mine(static_cast<const char*>(data), size);
  for (const std::string& other : group.all_gather_bytes(mine)) EXPECT_TRUE(other == mine) << what;
}

TEST(Zero, IsTheUnshardedRun) {
  const Lab lab;
  for (const DType dtype : {DType::f32, DType::f64}) {
    for (const Reduction reduction : {Reduction::blocking, Reduction::polled}) {
      RunConfig config = lab.config(dtype);
      config.train.clip = 0.5;
      config.train.micro_batch = 1;
      config.parallel.reduction = reduction;
      config.parallel.bucket_mb = 0.02;
      for (const auto& layout : layouts()) {
        TinyRun whole(config, lab, mesh_of(layout)), sharded(with_zero(config, 1), lab, mesh_of(layout));
        const std::vector<StepResult> want = train(whole.trainer, kSteps), got = train(sharded.trainer, kSteps);
        EXPECT_GT(want[0].grad_norm, config.train.clip);
        for (std::size_t i = 0; i < want.size(); ++i) {
          EXPECT_LE(relative(got[i].loss, want[i].loss), tolerance(dtype));
          EXPECT_LE(relative(got[i].grad_norm, want[i].grad_norm), tolerance(dtype));
          expect_agreed(test_world(), &got[i].grad_norm, sizeof(double), "norm");
        }
        expect_same_model(sharded, whole, 10 * tolerance(dtype), text_of(layout) + " " + std::string(name_of(dtype)));
        const Tensor values = sharded.trainer.model().parameters().values();
        expect_agreed(*sharded.mesh.dp_comm, values.view().data, values.bytes(), "values");
      }
    }
  }
}

TEST(Zero, IsTheUnshardedRunAfterGrowth) {
  const Lab lab;
  RunConfig config = lab.config(DType::f64);
  train_and_save(lab, config, 4, lab.path("old"));
  ExpandRequest request;
  request.checkpoint = lab.path("old");
  request.output = lab.path("grown");
  request.growth.counts = counts_of({50, 25, 40, 61, 200});
  expand_alone(request);
  for (const OldRows old_rows : {OldRows::freeze, OldRows::rate}) {
    config.train.growth.old_rows = old_rows;
    config.train.growth.old_rows_rate = 0.25;
    config.train.growth.new_rows_warmup_steps = 3;
    config.train.growth.moments = old_rows == OldRows::rate ? OldMoments::reset : OldMoments::keep;
    for (const auto& layout : layouts()) {
      TinyRun whole(config, lab, mesh_of(layout), lab.path("grown"));
      TinyRun sharded(with_zero(config, 1), lab, mesh_of(layout), lab.path("grown"));
      EXPECT_EQ(whole.trainer.optimizer().state(1).segments.size(), 2U);
      expect_same_model(sharded, whole, 0, text_of(layout) + " grown");
      const std::vector<StepResult> want = train(whole.trainer, kSteps), got = train(sharded.trainer, kSteps);
      for (std::size_t i = 0; i < want.size(); ++i) {
        EXPECT_LE(relative(got[i].grad_norm, want[i].grad_norm), 1e-11);
      }
      expect_same_model(sharded, whole, 1e-11, text_of(layout) + " grown and trained");
    }
  }
}

TEST(Zero, EachRankHoldsItsShareOfTheMoments) {
  const Lab lab;
  const RunConfig config = lab.config(DType::f32);
  const auto moments = static_cast<std::size_t>(Purpose::moments);
  for (const auto& layout : layouts()) {
    const TinyRun whole(config, lab, mesh_of(layout)), sharded(with_zero(config, 1), lab, mesh_of(layout));
    const auto all = static_cast<double>(whole.allocator.report().in_use[moments]);
    const auto mine = static_cast<double>(sharded.allocator.report().in_use[moments]);
    const double share = 1.0 / layout.first;
    EXPECT_NEAR(mine / all, share, 0.05 * share) << text_of(layout);
    double sum = mine;
    Stream stream;
    sharded.mesh.dp_comm->all_reduce(stream, TensorView{&sum, DType::f64, Device::cpu, Shape{1}, 1}, ReduceOp::sum);
    EXPECT_EQ(sum, all) << text_of(layout);
  }
}

TEST(Zero, CheckpointsAreThoseOfAnySetting) {
  const Lab lab;
  const RunConfig config = lab.config(DType::f32);
  train_and_save(lab, config, 3, lab.path("alone"));
  for (const auto& layout : layouts()) {
    {
      TinyRun run(with_zero(config, 1), lab, mesh_of(layout), lab.path("alone"));
      run.trainer.save(test_world(), lab.path("sharded"), Retention::rolling);
      expect_same_content(lab.path("alone"), lab.path("sharded"));
      test_world().barrier();
    }
    TinyRun back(config, lab, alone(), lab.path("sharded"));
    save_alone(back, lab.path("back"));
    expect_same_content(lab.path("alone"), lab.path("back"));
    test_world().barrier();
  }
}

TEST(Zero, SameLayoutResumesWithTheSameBits) {
  const Lab lab;
  const RunConfig config = with_zero(lab.config(DType::f32), 1);
  for (const auto& layout : layouts()) {
    {
      TinyRun run(config, lab, mesh_of(layout));
      train(run.trainer, 3);
      run.trainer.save(test_world(), lab.path("half"), Retention::rolling);
      train(run.trainer, 3);
      run.trainer.save(test_world(), lab.path("whole"), Retention::rolling);
    }
    TinyRun run(config, lab, mesh_of(layout), lab.path("half"));
    train(run.trainer, 3);
    run.trainer.save(test_world(), lab.path("resumed"), Retention::rolling);
    expect_same_content(lab.path("whole"), lab.path("resumed"));
    test_world().barrier();
  }
}

TEST(Zero, TwoRanksHandOverToAnyOthers) {
  if (test_world().size() == 1) GTEST_SKIP() << "two ranks are needed";
  const Lab lab;
  const RunConfig config = lab.config(DType::f64);
  {
    const auto pair = test_world().split(test_world().rank() < 2 ? 0 : 1, test_world().rank());
    if (test_world().rank() < 2) {
      TinyRun run(with_zero(config, 1), lab, Mesh::create(*pair, 2, 1));
      train(run.trainer, 4);
      run.trainer.save(*pair, lab.path("pair"), Retention::rolling);
    }
    test_world().barrier();
  }
  TinyRun reference(config, lab, alone(), lab.path("pair"));
  const std::vector<StepResult> want = train(reference.trainer, 4);
  for (const auto& layout : layouts()) {
    for (const std::int64_t zero : {0, 1}) {
      TinyRun run(with_zero(config, zero), lab, mesh_of(layout), lab.path("pair"));
      const std::vector<StepResult> got = train(run.trainer, 4);
      for (std::size_t i = 0; i < want.size(); ++i) {
        EXPECT_LE(relative(got[i].loss, want[i].loss), 1e-10) << text_of(layout) << " zero " << zero;
        EXPECT_LE(relative(got[i].grad_norm, want[i].grad_norm), 1e-9) << text_of(layout) << " zero " << zero;
      }
    }
  }
}

TEST(Zero, RefusesRowsThatAreNotThoseOfTheModel) {
  const Lab lab;
  TinyRun run(lab.config(DType::f32), lab, alone());
  ParameterSet& parameters = run.trainer.model().parameters();
  std::vector<RowRange> owned(parameters.all().size());
  const AdamW none(run.allocator, parameters, owned);
  EXPECT_EQ(none.state(0).m.elements(), 0);
  owned[0] = {250, 7};
  expect_error<InternalError>([&] { AdamW(run.allocator, parameters, owned); }, "embedding", ExitCode::internal);
  owned[0] = {250, 6};
  owned.back() = {0, 16};
  expect_error<InternalError>([&] { AdamW(run.allocator, parameters, owned); }, "final_norm.bias", ExitCode::internal);
  owned.pop_back();
  expect_error<InternalError>([&] { AdamW(run.allocator, parameters, owned); }, "22 parameters", ExitCode::internal);
}

}  // namespace
}  // namespace tforge::test
