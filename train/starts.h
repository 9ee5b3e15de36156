#pragma once
// The crash-loop guard: how often a run was started from the same step.
//
// run.dir/starts.json holds the step that the last starts went on from, their number, and a fingerprint of
// configuration and build. A start from a later step, or with another configuration or build, is the first again. A
// start that a signal has stopped does not count: preemption is nobody's fault. One that ended at the end of its time
// without a new step counts, since the next will fare alike; so does one that just vanished (SIGKILL, a lost node).
#include <cstdint>
#include <string>

namespace tforge {

class StartRecord {
 public:
  /// Counts this start of the run in `folder` (which exists), from `step`. For one process. Throws CrashLoopError when
  /// more than `max_restarts` starts (0: any number) after the first have got no further; DataError for a damaged
  /// record. A record that cannot be written is a warning: the run itself may be well.
  static StartRecord count(const std::string& folder, std::int64_t step, const std::string& fingerprint,
                           std::int64_t max_restarts);

  /// Starts from this step, with this one.
  std::int64_t starts() const { return starts_; }
  /// This start was stopped from outside.
  void forgive();
  /// The run is at its end.
  void remove() const;

 private:
  StartRecord(std::string path, std::int64_t step, std::string fingerprint, std::int64_t starts)
      : path_(std::move(path)), step_(step), fingerprint_(std::move(fingerprint)), starts_(starts) {}
  void write() const;

  std::string path_;
  std::int64_t step_;
  std::string fingerprint_;
  std::int64_t starts_;
};

}  // namespace tforge
