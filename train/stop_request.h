#pragma once
// When a run stops before its end: signals, the end of the job's time, train.max_time.
//
// | signal                     | asks for                                                                            |
// | SIGUSR1, SIGINT (Ctrl-C)   | save and stop: the step under way is finished                                       |
// | SIGTERM                    | stop within the grace: the step is given up, and nothing saved, where time is short |
// | one more                   | leave now                                                                           |
// SIGTERM after SIGUSR1 or SIGINT is not "one more": a launcher warns first and then means it. A signal that comes
// within a second of the one before is the same one, which launchers deliver twice: to the step and through srun.
//
// Nothing here communicates. Ranks agree where they meet: on what StopState says, at the end of a step (step report),
// and on giving up what is under way at poll points in between.
#include <chrono>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>

namespace tforge {

/// In the order of urgency.
enum class StopLevel : std::uint8_t { none, save, grace };

/// Catches the three signals; `grace_seconds` is the time from SIGTERM to SIGKILL (SLURM's KillWait). Called before MPI
/// starts and again afterwards, since a library may have replaced the handlers; what has come in between is kept. From
/// then on a second signal ends the process at once with ExitCode::interrupted, and a process that has not ended
/// when 95 % of the grace are over, wherever it waits, ends with ExitCode::requeue.
void catch_stop_signals(double grace_seconds);

/// What this process has been asked for, and how much of the grace is left to plan with (90 % of it in all; infinite
/// unless the level is grace).
struct StopSignal {
  StopLevel level = StopLevel::none;
  double seconds_left = std::numeric_limits<double>::infinity();
};
StopSignal stop_signal();

/// What a rank knows; ranks agree on the highest level and the least seconds.
struct StopState {
  StopLevel level = StopLevel::none;
  double seconds_left = std::numeric_limits<double>::infinity();       // until the process should have stopped
  double hard_seconds_left = std::numeric_limits<double>::infinity();  // until it is killed
};

/// What the next step and a save are expected to take. Seconds; negative: not known yet.
struct StopCosts {
  double step = -1;
  double save = 0;
};

/// The time that this process has.
class TimeLimit {
 public:
  using Clock = std::chrono::steady_clock;

  /// `begun`: when train.max_time (`max_seconds`; 0: none) began to count. The end of the SLURM job is read from
  /// SLURM_JOB_END_TIME; one that lies in the past already is not the end of this job: it is ignored with a warning.
  /// Throws ConfigError when the variable is no number.
  TimeLimit(Clock::time_point begun, double max_seconds);

  /// With the signals' state and the clocks' as of now.
  StopState state() const;

 private:
  std::optional<Clock::time_point> soft_, hard_;
};

/// At the end of a step: whether the run goes on.
enum class StopDecision : std::uint8_t { go_on, save_and_stop, stop };
/// The same on every rank when `agreed` and `costs` are. Goes on while a save still fits behind a step that is half as
/// long again as the last one and half a second. stop: what has been saved must do, a save would not be done in time.
StopDecision decide_after_step(const StopState& agreed, const StopCosts& costs);

/// This rank's vote inside a step of which `left` (0 to 1) is still to do: true when finishing it and saving would take
/// longer than the process lives, half a second counted in.
bool gives_up_step(const StopState& own, const StopCosts& costs, double left);
/// This rank's vote inside an evaluation, which no later step needs: true once anything asks for a stop, or there would
/// be no time for a step either.
bool gives_up_evaluation(const StopState& own, const StopCosts& costs);

/// Why, for people: "SIGTERM", "SIGUSR1 or SIGINT", "the job's time ends (SLURM_JOB_END_TIME)", "train.max_time is
/// over".
std::string reason_of(const StopState& agreed, const StopCosts& costs);

/// Thrown on every rank alike by a poll point at which the ranks have agreed to give up what is under way.
struct GivenUp {};

}  // namespace tforge
