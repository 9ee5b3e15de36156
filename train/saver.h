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

 private:
  Communicator& world_;
  Trainer& trainer_;
  Journal& journal_;
  std::int64_t saved_step_ = -1;
};

}  // namespace tforge
