#pragma once
// The checkpoints that a run writes into run.dir.
#include <cstdint>

#include "parallel/communicator.h"
#include "train/journal.h"
#include "train/trainer.h"

namespace tforge {

class Saver {
 public:
  /// All three outlive it.
  Saver(Communicator& world, Trainer& trainer, Journal& journal);

  /// Saves the present state, unless that has been done, and removes checkpoints that run.keep_last does not keep.
  /// Collective.
  void save(Retention retention);
  /// What a save takes: as long as the last one did, on this rank; 0 before the first.
  double estimated_seconds() const { return seconds_; }

 private:
  Communicator& world_;
  Trainer& trainer_;
  Journal& journal_;
  std::int64_t saved_step_ = -1;
  double seconds_ = 0;
};

}  // namespace tforge
