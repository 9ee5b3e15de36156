#pragma once
// What rank 0 writes for people and programs to follow a run: metrics.jsonl, progress, and the lines of the log that
// belong to a step. On the other ranks a journal does nothing.
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "parallel/communicator.h"
#include "train/metrics.h"
#include "train/progress.h"
#include "train/step_report.h"
#include "train/stragglers.h"
#include "train/trainer.h"

namespace tforge {

class Journal {
 public:
  /// Goes on after the updates that `trainer` has made already. Throws ResourceError. Collective.
  Journal(Communicator& world, Trainer& trainer);

  /// The update that has just been made, in `seconds`, what was sent in it, and what each rank has reported of it.
  void step(const Trainer& trainer, const StepResult& result, double seconds, const Communicator::Traffic& traffic,
            std::span<const RankReport> reports);
  void evaluation(const Trainer& trainer, const EvalResult& result);
  /// A checkpoint that is whole now, the seconds from its first copy on and those for which training waited.
  struct SaveTimes {
    double total = 0;
    double stall = 0;
  };
  void saved(const Trainer& trainer, const CheckpointInfo& info, const SaveTimes& times);
  /// To be called before a line is logged: progress may be drawn where it would go.
  void clear();

 private:
  struct Files {
    Files(const RunConfig& config, std::int64_t first_step, std::vector<double> work);
    MetricsWriter metrics;
    Progress progress;
    Stragglers stragglers;
    std::vector<double> compute_seconds;  // of the ranks, in this step
  };
  std::vector<std::string> hosts_;  // of the ranks
  std::optional<Files> files_;
};

}  // namespace tforge
