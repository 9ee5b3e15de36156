#pragma once
// What every kind of model has to show of a tiny run.
#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "support/tiny_run.h"
#include "train/communication_model.h"
#include "train/lone_rank.h"

namespace tforge::test {

/// The parameters of both checkpoints differ by no more than `bound` in any element.
inline void expect_close_content(const std::string& a, const std::string& b, double bound) {
  const CheckpointReader x = CheckpointReader::open(a), y = CheckpointReader::open(b);
  for (const CheckpointReader::Tensor& t : x.tensors()) {
    if (!t.path.starts_with("model/")) continue;
    const auto count = static_cast<std::size_t>(t.shape.elements());
    std::vector<double> p(count), q(count);
    x.read_rows(t.path, 0, t.shape.rows(), DType::f64, p.data());
    y.read_rows(t.path, 0, t.shape.rows(), DType::f64, q.data());
    for (std::size_t i = 0; i < count; ++i) ASSERT_NEAR(p[i], q[i], bound) << t.path << " element " << i;
  }
}

/// A step of `run` sends what step_exchanges() says: calls and bytes over dp and over tp.
inline void expect_traffic_of_formula(TinyRun& run, const RunConfig& config, const std::string& what) {
  const Communicator::Traffic dp = run.mesh.dp_comm->traffic(), tp = run.mesh.tp_comm->traffic();
  run.trainer.step();
  const std::vector<Bucket> buckets = run.trainer.model().parameters().buckets(bucket_bytes(config), run.mesh.dp);
  const std::vector<Exchange> formula = step_exchanges(
      config, run.trainer.model().plan(), buckets, {run.mesh.dp, run.mesh.tp, run.mesh.dp_index, run.mesh.tp_index});
  for (const auto& [axis, before, after] : {std::tuple{MeshAxis::dp, dp, run.mesh.dp_comm->traffic()},
                                            std::tuple{MeshAxis::tp, tp, run.mesh.tp_comm->traffic()}}) {
    const Volume volume = volume_of(formula, axis);
    EXPECT_EQ(volume.calls, static_cast<std::int64_t>(after.calls - before.calls)) << what << "\n"
                                                                                   << communication_text(formula);
    EXPECT_EQ(volume.bytes, static_cast<std::int64_t>(after.bytes - before.bytes)) << what << "\n"
                                                                                   << communication_text(formula);
  }
}

/// A step, whose kernels are in `profile`, took the memory and did the work of a rehearsal: exactly.
inline void expect_as_rehearsed(const Rehearsal& rehearsal, const MemoryReport& memory, const Profile& profile,
                                const std::string& what) {
  EXPECT_EQ(rehearsal.memory.total_peak, memory.total_peak) << what;
  EXPECT_EQ(rehearsal.memory.reserved, memory.reserved) << what;
  EXPECT_EQ(rehearsal.memory.peak, memory.peak) << what;
  ASSERT_EQ(rehearsal.kernels.size(), profile.entries().size()) << what;
  for (std::size_t i = 0; i < profile.entries().size(); ++i) {
    const Profile::Entry &planned = rehearsal.kernels[i], &done = profile.entries()[i];
    EXPECT_EQ(planned.name, done.name) << what;
    EXPECT_EQ(planned.calls, done.calls) << what << " " << done.name;
    EXPECT_EQ(planned.work.flops, done.work.flops) << what << " " << done.name;
    EXPECT_EQ(planned.work.bytes, done.work.bytes) << what << " " << done.name;
    EXPECT_EQ(planned.seconds, 0) << what;
  }
}

/// A new run of `config` on `layout` takes the memory, does the work and sends the bytes of a rehearsal: exactly.
inline void expect_rehearsed(const Lab& lab, const RunConfig& config, std::pair<int, int> layout,
                             const std::string& about) {
  TinyRun run(config, lab, mesh_of(layout));
  const std::string what =
      fmt::format("{} {} recompute {} saved {}", about, text_of(layout), static_cast<int>(config.train.saves.recompute),
                  static_cast<int>(config.train.saves.dtype));
  const Rehearsal rehearsal =
      rehearse(config, run.trainer.model().plan(), {run.mesh.dp, run.mesh.tp, run.mesh.dp_index, run.mesh.tp_index});
  train(run.trainer, 1);
  const Communicator::Traffic dp = run.mesh.dp_comm->traffic(), tp = run.mesh.tp_comm->traffic();
  Profile profile;
  run.stream.set_profile(&profile);
  train(run.trainer, 1);
  run.stream.set_profile(nullptr);

  expect_as_rehearsed(rehearsal, run.allocator.report(), profile, what);
  EXPECT_EQ(rehearsal.dp.calls, run.mesh.dp_comm->traffic().calls - dp.calls) << what;
  EXPECT_EQ(rehearsal.dp.bytes, run.mesh.dp_comm->traffic().bytes - dp.bytes) << what;
  EXPECT_EQ(rehearsal.tp.calls, run.mesh.tp_comm->traffic().calls - tp.calls) << what;
  EXPECT_EQ(rehearsal.tp.bytes, run.mesh.tp_comm->traffic().bytes - tp.bytes) << what;
}

}  // namespace tforge::test
