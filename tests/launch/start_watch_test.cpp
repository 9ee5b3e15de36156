// The watch over the start of MPI, in processes whose launcher dies or whose MPI never starts.
#include "parallel/start_watch.h"

#include <gtest/gtest.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <string>
#include <thread>

namespace tforge {
namespace {

/// What the rank says before it ends, "" when it went on without a word. The rank is a process of its own, which waits
/// under the watch for `seconds`; its launcher is another one, which lives for `launcher_seconds`.
std::string said(double timeout_seconds, double launcher_seconds, double seconds) {
  const auto wait = [](double s) { std::this_thread::sleep_for(std::chrono::duration<double>(s)); };
  std::array<int, 2> ends{};
  EXPECT_EQ(::pipe(ends.data()), 0);
  // The orphan comes to this process, which waits for it.
  EXPECT_EQ(::prctl(PR_SET_CHILD_SUBREAPER, 1), 0);
  const pid_t launcher = ::fork();
  if (launcher == 0) {
    if (::fork() == 0) {
      {
        const StartWatch watch(timeout_seconds, [&](const std::string& report) {
          ::_exit(::write(ends[1], report.data(), report.size()) < 0 ? 1 : 12);
        });
        wait(seconds);
      }
      ::_exit(0);
    }
    wait(launcher_seconds);
    ::_exit(0);
  }
  ::close(ends[1]);
  std::string text;
  std::array<char, 512> buffer{};
  for (ssize_t n = 0; (n = ::read(ends[0], buffer.data(), buffer.size())) > 0;) {
    text.append(buffer.data(), static_cast<std::size_t>(n));
  }
  ::close(ends[0]);
  int code = -1;
  for (int status = 0, left = 2; left > 0; --left) {
    if (::wait(&status) != launcher) code = WEXITSTATUS(status);
  }
  EXPECT_EQ(code, text.empty() ? 0 : 12);
  return text;
}

TEST(StartWatch, ARankWhoseLauncherIsGoneEnds) {
  EXPECT_EQ(said(0, 0.2, 60), "what started this rank (mpirun, srun) is gone; MPI had not started yet");
}

TEST(StartWatch, AStartThatTakesTooLongEnds) {
  EXPECT_EQ(said(0.3, 2, 60).substr(0, 49), "MPI has not started within 0.3 s (parallel.timeou");
}

TEST(StartWatch, AStartInTimeGoesOn) {
  EXPECT_EQ(said(60, 1, 0.3), "");
  EXPECT_EQ(said(0, 1, 0.3), "");
}

}  // namespace
}  // namespace tforge
