#include "train/stop_request.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <system_error>

#include "core/errors.h"
#include "core/log.h"

namespace tforge {

namespace {

constexpr std::int64_t kSecond = 1'000'000'000;
/// A signal that follows the last one this soon is the same.
constexpr std::int64_t kSameSignal = kSecond;
/// Parts of the grace: what stopping is planned for, and when the process leaves wherever it is.
constexpr double kPlanned = 0.9;
constexpr double kLast = 0.95;
/// Kept free before the end of the job: ranks end, files close, the launcher reports.
constexpr double kMargin = 5;
/// What the next step may take for each second of the last one, and what a step of any length may be held up by besides
/// (a busy machine, a slow file system), before the time for the save is touched.
constexpr double kSlowerStep = 1.5;
constexpr double kHeldUp = 0.5;

// What the handlers write. Lock-free atomics are the only state that a handler may share with threads.
std::atomic<int> signal_level{0};
std::atomic<std::int64_t> last_signal_ns{-kSameSignal};
std::atomic<std::int64_t> grace_began_ns{0};
std::atomic<std::int64_t> grace_ns{0};
static_assert(std::atomic<int>::is_always_lock_free && std::atomic<std::int64_t>::is_always_lock_free);
timer_t last_moment{};
std::atomic<bool> has_timer{false};

std::int64_t now_ns() {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);  // may be called by a handler
  return now.tv_sec * kSecond + now.tv_nsec;
}

template <std::size_t N>
[[noreturn]] void leave(const char (&line)[N], ExitCode code) {
  // stdio may not be used in a handler. Whether the line arrives is not known; there is nobody to tell.
  [[maybe_unused]] const auto written = ::write(STDERR_FILENO, line, N - 1);
  ::_exit(static_cast<int>(code));
}

void on_last_moment(int) {
  leave("tf_train: SIGTERM: the grace (run.grace_s) ends while this rank still waits; it leaves with what is saved\n",
        ExitCode::requeue);
}

void on_signal(int signal) {
  const int error = errno;
  const int asked = static_cast<int>(signal == SIGTERM ? StopLevel::grace : StopLevel::save);
  const std::int64_t now = now_ns();
  int before = signal_level.load();
  while (asked > before) {
    // First the time, so that nobody who sees the level takes this signal for an old one.
    last_signal_ns.store(now);
    if (asked == static_cast<int>(StopLevel::grace)) grace_began_ns.store(now);
    if (!signal_level.compare_exchange_weak(before, asked)) continue;
    if (asked == static_cast<int>(StopLevel::grace) && has_timer.load()) {
      const auto after = static_cast<std::int64_t>(kLast * static_cast<double>(grace_ns.load()));
      itimerspec when{};
      when.it_value.tv_sec = after / kSecond;
      when.it_value.tv_nsec = after % kSecond;
      ::timer_settime(last_moment, 0, &when, nullptr);
    }
    errno = error;
    return;
  }
  if (now - last_signal_ns.load() < kSameSignal) {
    errno = error;
    return;
  }
  leave("tf_train: error: a second signal: this rank leaves at once, with what is saved\n", ExitCode::interrupted);
}

[[noreturn]] void fail(const char* what) {
  throw ResourceError("signals: {}: {}", what, std::generic_category().message(errno));
}

void handle(int signal, void (*handler)(int)) {
  struct sigaction action {};
  action.sa_handler = handler;
  action.sa_flags = SA_RESTART;
  ::sigemptyset(&action.sa_mask);
  for (const int other : {SIGUSR1, SIGINT, SIGTERM}) ::sigaddset(&action.sa_mask, other);
  if (::sigaction(signal, &action, nullptr) != 0) fail("a handler cannot be set");
}

double seconds_until(TimeLimit::Clock::time_point end) {
  return std::chrono::duration<double>(end - TimeLimit::Clock::now()).count();
}

/// What one more step, or one more batch of an evaluation, needs. A run steps towards the end of its time until this no
/// longer fits, so a step that is slower than the last by any amount comes at the worst moment sooner or later.
double seconds_to_go_on(const StopCosts& costs) {
  return kSlowerStep * std::max(costs.step, 0.0) + kHeldUp + costs.save;
}

}  // namespace

void catch_stop_signals(double grace_seconds) {
  grace_ns.store(static_cast<std::int64_t>(grace_seconds * static_cast<double>(kSecond)));
  handle(SIGALRM, on_last_moment);
  if (!has_timer.load()) {
    sigevent event{};
    event.sigev_notify = SIGEV_SIGNAL;
    event.sigev_signo = SIGALRM;
    if (::timer_create(CLOCK_MONOTONIC, &event, &last_moment) != 0) fail("no timer");
    has_timer.store(true);
  }
  for (const int signal : {SIGUSR1, SIGINT, SIGTERM}) handle(signal, on_signal);
}

StopSignal stop_signal() {
  StopSignal asked;
  asked.level = static_cast<StopLevel>(signal_level.load());
  if (asked.level == StopLevel::grace) {
    const auto gone = static_cast<double>(now_ns() - grace_began_ns.load());
    asked.seconds_left = (kPlanned * static_cast<double>(grace_ns.load()) - gone) / static_cast<double>(kSecond);
  }
  return asked;
}

TimeLimit::TimeLimit(Clock::time_point begun, double max_seconds) {
  const auto after = [](Clock::time_point start, double seconds) {
    // Years are for ever, and fit the clock.
    constexpr double kForEver = 1e9;
    return start +
           std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(std::min(seconds, kForEver)));
  };
  if (max_seconds > 0) soft_ = after(begun, max_seconds);
  const char* text = std::getenv("SLURM_JOB_END_TIME");
  if (text == nullptr || *text == '\0') return;
  std::int64_t end = 0;
  const char* last = text + std::strlen(text);
  const auto [stop, error] = std::from_chars(text, last, end);
  if (error != std::errc() || stop != last) {
    throw ConfigError("SLURM_JOB_END_TIME = \"{}\" is no time in seconds since 1970; unset it", text);
  }
  const double left = static_cast<double>(end) -
                      std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
  if (left <= 0) {
    log::warning(
        "SLURM_JOB_END_TIME was {:.0f} s ago, so it is not the end of this job and is ignored; set train.max_time to "
        "stop in time",
        -left);
    return;
  }
  hard_ = after(Clock::now(), left - kMargin);
}

StopState TimeLimit::state() const {
  const StopSignal signal = stop_signal();
  StopState state;
  state.level = signal.level;
  state.hard_seconds_left = signal.seconds_left;
  if (hard_) state.hard_seconds_left = std::min(state.hard_seconds_left, seconds_until(*hard_));
  state.seconds_left = state.hard_seconds_left;
  if (soft_) state.seconds_left = std::min(state.seconds_left, seconds_until(*soft_));
  return state;
}

StopDecision decide_after_step(const StopState& agreed, const StopCosts& costs) {
  if (agreed.level == StopLevel::none && agreed.seconds_left >= seconds_to_go_on(costs)) {
    return StopDecision::go_on;
  }
  return costs.save <= agreed.hard_seconds_left ? StopDecision::save_and_stop : StopDecision::stop;
}

bool gives_up_step(const StopState& own, const StopCosts& costs, double left) {
  // How long a first step takes is not known: whoever is told to end does not wait for it.
  if (costs.step < 0) return own.level == StopLevel::grace;
  return own.hard_seconds_left < left * costs.step + kHeldUp + costs.save;
}

bool gives_up_evaluation(const StopState& own, const StopCosts& costs) {
  return own.level != StopLevel::none || own.seconds_left < seconds_to_go_on(costs);
}

std::string reason_of(const StopState& agreed, const StopCosts& costs) {
  switch (agreed.level) {
    case StopLevel::grace: return "SIGTERM";
    case StopLevel::save: return "SIGUSR1 or SIGINT";
    case StopLevel::none: break;
  }
  return agreed.hard_seconds_left < seconds_to_go_on(costs) ? "the job's time ends (SLURM_JOB_END_TIME)"
                                                            : "train.max_time is over";
}

}  // namespace tforge
