#include "parallel/start_watch.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <utility>

namespace tforge {
namespace {

void watch(const std::stop_token& stop, pid_t launcher, double timeout, const StartWatch::GiveUp& give_up) {
  const double interval = timeout > 0 ? std::clamp(timeout / 20, 0.01, 0.5) : 0.5;
  std::mutex mutex;
  std::unique_lock lock(mutex);
  std::condition_variable_any wake;
  for (double waited = 0; !stop.stop_requested(); waited += interval) {
    // An orphan belongs to another process.
    if (::getppid() != launcher) {
      give_up("what started this rank (mpirun, srun) is gone; MPI had not started yet");
      return;
    }
    if (timeout > 0 && waited > timeout) {
      give_up(
          fmt::format("MPI has not started within {} s (parallel.timeout_s): some ranks of the job are missing, or "
                      "cannot reach their launcher",
                      timeout));
      return;
    }
    wake.wait_for(lock, stop, std::chrono::duration<double>(interval), [] { return false; });
  }
}

}  // namespace

StartWatch::StartWatch(double timeout_seconds, GiveUp give_up)
    : thread_([launcher = ::getppid(), timeout_seconds, give_up = std::move(give_up)](const std::stop_token& stop) {
        watch(stop, launcher, timeout_seconds, give_up);
      }) {}

}  // namespace tforge
