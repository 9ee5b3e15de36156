#pragma once
// What the ranks tell each other at the end of a step, and while they wait for a save. All hear all of it, so all
// decide alike.
#include <span>
#include <type_traits>
#include <vector>

#include "parallel/communicator.h"
#include "train/stop_request.h"

namespace tforge {

/// What this rank's part of a save is doing.
enum class SavePart : std::int64_t { at_rest, under_way };

/// What one rank knows.
struct RankReport {
  double run_seconds = 0;  // since the run began. The clock of rank 0 counts
  StopState stop;
  SavePart save = SavePart::at_rest;
  double step_seconds = 0;     // of the last step
  double compute_seconds = 0;  // of these, not spent in collectives
};

/// What all ranks together have been asked for: the most urgent of it.
StopState agreed_stop(std::span<const RankReport> reports);
/// The last step of the slowest.
double slowest_step(std::span<const RankReport> reports);

class StepReport {
 public:
  explicit StepReport(Communicator& world);

  /// Everyone's report in rank order, until the next call. One small collective that asks for no memory.
  std::span<const RankReport> exchange(const RankReport& mine);

 private:
  static_assert(std::is_trivially_copyable_v<RankReport>, "it travels as it lies in memory");

  Communicator& world_;
  Stream stream_;
  std::vector<RankReport> all_;
  std::vector<std::int64_t> counts_;
};

}  // namespace tforge
