#pragma once
// What rank 0 writes for people and programs to follow a run: metrics.jsonl, progress, and the lines of the log that
// belong to a step. On the other ranks a journal does nothing.
#include <cstdint>
#include <optional>

#include "parallel/communicator.h"
#include "train/metrics.h"
#include "train/progress.h"
#include "train/trainer.h"

namespace tforge {

class Journal {
 public:
  /// Goes on after the updates that `trainer` has made already. Throws ResourceError.
  Journal(const Communicator& world, const Trainer& trainer);

  /// The update that has just been made, in `seconds`, and what was sent in it.
  void step(Trainer& trainer, const StepResult& result, double seconds, const Communicator::Traffic& traffic);
  void evaluation(const Trainer& trainer, const EvalResult& result);
  /// To be called before a line is logged: progress may be drawn where it would go.
  void clear();

 private:
  struct Files {
    Files(const RunConfig& config, std::int64_t first_step);
    MetricsWriter metrics;
    Progress progress;
  };
  std::optional<Files> files_;
};

}  // namespace tforge
