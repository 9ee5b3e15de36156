#include "train/saver.h"

#include <chrono>

#include "checkpoint/folder.h"
#include "core/log.h"

namespace tforge {

Saver::Saver(Communicator& world, Trainer& trainer, Journal& journal)
    : world_(world), trainer_(trainer), journal_(journal) {}

void Saver::save(Retention retention) {
  if (saved_step_ == trainer_.state().step) return;
  saved_step_ = trainer_.state().step;
  const RunSettings& run = trainer_.config().run;
  const auto before = std::chrono::steady_clock::now();
  const std::string path = run.dir + "/" + checkpoint_name(trainer_.state().step);
  const CheckpointInfo info = trainer_.save(world_, path, retention);
  seconds_ = std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count();
  if (world_.rank() != 0) return;
  for (const std::string& gone : prune_checkpoints(run.dir, static_cast<int>(run.keep_last))) {
    log::debug("removed {}", gone);
  }
  journal_.clear();
  log::info("saved {} ({:.1f} MB in {:.2f} s)", path, static_cast<double>(info.file_bytes) / 1e6, seconds_);
}

}  // namespace tforge
