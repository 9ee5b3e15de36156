#pragma once
// What every kind of model has to show of a tiny run.
#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "model/activation_memory.h"
#include "support/tiny_run.h"
#include "train/communication_model.h"

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

/// A step of a new run of `config`, tensor-parallel over all ranks at hand, takes between `least` and `most` of what
/// activation_bytes() says, beside parameters, gradients and moments.
inline void expect_memory_of_formula(const Lab& lab, const RunConfig& config, double least, double most,
                                     const std::string& what) {
  TinyRun run(config, lab, mesh_of({1, test_world().size()}));
  train(run.trainer, 1);
  const MemoryReport& report = run.allocator.report();
  std::size_t fixed = 0;
  for (const Purpose p : {Purpose::weights, Purpose::gradients, Purpose::moments}) {
    fixed += report.peak[static_cast<std::size_t>(p)];
  }
  const auto peak = static_cast<double>(report.total_peak - fixed);
  const auto estimate =
      static_cast<double>(activation_bytes(config.model, run.trainer.model().plan(), run.mesh.tp_index,
                                           config.train.dtype, config.train.saves, config.train.batch, config.seq()));
  const std::string measured = fmt::format("{} recompute {} saved {}: {:.0f} of {:.0f} bytes", what,
                                           static_cast<int>(config.train.saves.recompute),
                                           static_cast<int>(config.train.saves.dtype), peak, estimate);
  EXPECT_LE(peak, most * estimate) << measured;
  EXPECT_GE(peak, least * estimate) << measured;
}

}  // namespace tforge::test
