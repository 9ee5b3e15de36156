#pragma once
// The start of MPI, watched: MPI_Init waits for its launcher and for all other ranks, for ever if it must. Open MPI's
// does not notice when mpirun dies while the two make contact (PMIx 4.2): the rank would stay behind, alone. Private to
// parallel/.
#include <functional>
#include <string>
#include <thread>

namespace tforge {

/// While it lives, a thread looks whether the process that started this one is still there, and counts the seconds
/// (a process that is stopped counts none). No launcher any more, or more than `timeout_seconds` (0 or less: no limit):
/// `give_up` is called once, by that thread, with one line that says which.
class StartWatch {
 public:
  using GiveUp = std::function<void(const std::string& report)>;
  StartWatch(double timeout_seconds, GiveUp give_up);

 private:
  std::jthread thread_;
};

}  // namespace tforge
