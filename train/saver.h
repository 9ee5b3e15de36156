#pragma once
// The checkpoints that a run writes into run.dir, beside the training.
//
// At a save point the rows are copied into a staging buffer and rank 0 lays the file out; a thread of each rank writes
// its rows and later digests its share of the file, without MPI and HDF5. At the ends of steps the ranks tell each
// other whose thread is done (train/step_report.h); when all are, the next part begins: rows, digests, commit. One save
// is under way at a time, and the next one waits for it.
//
// What the disk refuses (full, read-only, gone) does not end a run: the save is given up, its temporary removed where
// that is possible, and it is tried again with the state of then. Older checkpoints stay until a newer one is whole.
#include <chrono>
#include <cstdint>
#include <future>
#include <optional>
#include <span>
#include <string>

#include "checkpoint/staging.h"
#include "checkpoint/writer.h"
#include "parallel/communicator.h"
#include "train/journal.h"
#include "train/step_report.h"
#include "train/trainer.h"

namespace tforge {

class Saver {
 public:
  /// Where the rows are while they are written.
  enum class Rows : std::uint8_t {
    copied,    // in the staging buffer: training may go on
    in_place,  // in model and optimizer, which must not change until the save is no longer under way; on a device:
               // copied
  };

  /// Takes the staging buffer where run.save and run.save_every will need one. `world`, `trainer`, `journal` and
  /// `allocator`, of host memory, outlive it.
  Saver(Communicator& world, Trainer& trainer, Journal& journal, Allocator& allocator);
  /// Waits for this rank's thread; what it was writing is dropped.
  ~Saver();
  Saver(const Saver&) = delete;
  Saver& operator=(const Saver&) = delete;

  /// Begins to save the present state. Only when none is under way. Collective.
  void begin(Retention retention, Rows rows);

  /// Whether a save has been begun and neither committed nor given up. The same on every rank.
  bool under_way() const { return writer_.has_value(); }
  /// Waits for this rank's thread or for others, for a moment only.
  void wait();
  /// For the step report.
  SavePart part() const;
  /// Goes on with the save once the reports say that every rank's thread is done. Collective.
  void advance(std::span<const RankReport> reports);

  /// Step of the newest checkpoint that this run has saved; -1: none. The same on every rank.
  std::int64_t saved_step() const { return saved_step_; }
  /// Saves that the disk refused since the last that succeeded, and what it said.
  std::int64_t failures() const { return failures_; }
  const std::string& failure() const { return failure_; }
  /// Whether run.save_retry_s is over since the last failure, by rank 0's clock in the reports last heard.
  bool retry_due() const;

  /// How long it will take until a save of the present state is whole, the one under way included: as long as the
  /// slower of the last two took without their waits for the ends of steps, or a guess from the bytes before the first.
  /// The same on every rank.
  double estimated_seconds() const;

 private:
  using Clock = std::chrono::steady_clock;

  void start_thread();
  void committed(const CheckpointInfo& info);
  void give_up(const Error& error);
  /// Adds the time since `from` to that for which the training waited.
  void waited_since(Clock::time_point from);

  Communicator& world_;
  Trainer& trainer_;
  Journal& journal_;
  Staging staging_;
  double run_seconds_ = 0;  // rank 0's, as last heard

  // The save under way.
  CheckpointContents contents_;
  std::optional<CheckpointWriter> writer_;
  enum class Part : std::uint8_t { rows, digests } part_ = Part::rows;
  std::future<double> thread_;  // its seconds
  Clock::time_point begun_;
  double stall_ = 0;  // for which the training waited
  double work_ = 0;   // of the threads, the slowest rank's

  std::int64_t saved_step_ = -1;
  std::int64_t failures_ = 0;
  std::string failure_;
  double failed_at_ = 0;
  double last_seconds_ = 0, seconds_before_ = 0;  // of the last two saves
};

}  // namespace tforge
