// Signals, time limits, the count of starts, and ranks that are slow.
#include <gtest/gtest.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <thread>

#include "core/errors.h"
#include "storage/atomic_file.h"
#include "support/scratch.h"
#include "train/starts.h"
#include "train/stop_request.h"
#include "train/stragglers.h"

namespace tforge {
namespace {

using test::error_of;
using test::Scratch;

constexpr double kNever = std::numeric_limits<double>::infinity();

void wait(double seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }

/// Runs `f` in a process of its own, since signals are for good.
#define IN_A_PROCESS(code, said, ...) EXPECT_EXIT(__VA_ARGS__, testing::ExitedWithCode(code), said)

TEST(StopSignals, ASecondOneLeavesAtOnce) {
  for (const int signal : {SIGUSR1, SIGINT, SIGTERM}) {
    IN_A_PROCESS(14, "a second signal: this rank leaves at once", {
      catch_stop_signals(30);
      ::raise(signal);
      wait(1.1);
      ::raise(signal);
      ::_exit(0);
    });
  }
}

TEST(StopSignals, OneThatIsDeliveredTwiceIsOne) {
  IN_A_PROCESS(0, "", {
    catch_stop_signals(30);
    if (stop_signal().level != StopLevel::none || stop_signal().seconds_left != kNever) ::_exit(1);
    ::raise(SIGUSR1);
    ::raise(SIGUSR1);
    if (stop_signal().level != StopLevel::save || stop_signal().seconds_left != kNever) ::_exit(2);
    ::_exit(0);
  });
}

TEST(StopSignals, TerminationAfterAWarningCountsItsGrace) {
  IN_A_PROCESS(0, "", {
    catch_stop_signals(10);
    ::raise(SIGUSR1);
    wait(1.1);
    ::raise(SIGTERM);
    catch_stop_signals(10);  // as after the start of MPI: nothing is forgotten
    const StopSignal asked = stop_signal();
    if (asked.level != StopLevel::grace) ::_exit(1);
    if (asked.seconds_left > 9 || asked.seconds_left < 5) ::_exit(2);
    ::_exit(0);
  });
}

TEST(StopSignals, NobodyOutlivesTheGrace) {
  IN_A_PROCESS(10, "the grace .run.grace_s. ends while this rank still waits", {
    catch_stop_signals(0.2);
    ::raise(SIGTERM);
    for (int i = 0; i < 100; ++i) wait(0.1);
    ::_exit(0);
  });
}

TEST(StopDecisions, AfterAStep) {
  const StopCosts costs{10, 5};
  EXPECT_EQ(decide_after_step({}, costs), StopDecision::go_on);
  EXPECT_EQ(decide_after_step({StopLevel::none, 20.6, 20.6}, costs), StopDecision::go_on);
  EXPECT_EQ(decide_after_step({StopLevel::none, 19.9, 19.9}, costs), StopDecision::save_and_stop)
      << "a slower step would be too long";
  EXPECT_EQ(decide_after_step({StopLevel::none, 5.4, 5.4}, {0.001, 5}), StopDecision::save_and_stop)
      << "what holds a step up does not depend on its length";
  EXPECT_EQ(decide_after_step({StopLevel::none, 14, kNever}, costs), StopDecision::save_and_stop);
  EXPECT_EQ(decide_after_step({StopLevel::none, -3, kNever}, costs), StopDecision::save_and_stop);
  EXPECT_EQ(decide_after_step({StopLevel::none, 4, 4}, costs), StopDecision::stop) << "the save does not fit";
  EXPECT_EQ(decide_after_step({StopLevel::save, kNever, kNever}, costs), StopDecision::save_and_stop);
  EXPECT_EQ(decide_after_step({StopLevel::save, 4, 4}, costs), StopDecision::stop);
  EXPECT_EQ(decide_after_step({StopLevel::grace, 27, 27}, costs), StopDecision::save_and_stop);
  EXPECT_EQ(decide_after_step({StopLevel::grace, 4.9, 4.9}, costs), StopDecision::stop);
}

TEST(StopDecisions, InsideAStep) {
  const StopCosts costs{10, 5};
  EXPECT_FALSE(gives_up_step({}, costs, 1));
  EXPECT_FALSE(gives_up_step({StopLevel::save, kNever, kNever}, costs, 1)) << "there is time";
  EXPECT_FALSE(gives_up_step({StopLevel::grace, 27, 27}, costs, 1));
  EXPECT_TRUE(gives_up_step({StopLevel::grace, 14, 14}, costs, 1));
  EXPECT_TRUE(gives_up_step({StopLevel::grace, 5.2, 5.2}, costs, 0)) << "while there is time for the save";
  EXPECT_FALSE(gives_up_step({StopLevel::grace, 14, 14}, costs, 0.5)) << "the rest is short";
  EXPECT_TRUE(gives_up_step({StopLevel::none, 9, 9}, costs, 0.5)) << "the job's end comes as surely as a signal";
  EXPECT_FALSE(gives_up_step({StopLevel::none, -1, kNever}, costs, 1)) << "train.max_time kills nobody";
  EXPECT_TRUE(gives_up_step({StopLevel::grace, 27, 27}, {}, 1)) << "a first step may take for ever";
  EXPECT_FALSE(gives_up_step({StopLevel::save, kNever, kNever}, {}, 1));
}

TEST(StopDecisions, InsideAnEvaluation) {
  const StopCosts costs{10, 5};
  EXPECT_FALSE(gives_up_evaluation({}, costs));
  EXPECT_FALSE(gives_up_evaluation({StopLevel::none, 20.6, 20.6}, costs));
  EXPECT_TRUE(gives_up_evaluation({StopLevel::none, 19.9, kNever}, costs)) << "while there is time for the save";
  EXPECT_TRUE(gives_up_evaluation({StopLevel::save, kNever, kNever}, costs));
  EXPECT_TRUE(gives_up_evaluation({StopLevel::grace, 27, 27}, costs));
}

class Variable {
 public:
  explicit Variable(const std::string& value) { ::setenv("SLURM_JOB_END_TIME", value.c_str(), 1); }
  ~Variable() { ::unsetenv("SLURM_JOB_END_TIME"); }
  Variable(const Variable&) = delete;
  Variable& operator=(const Variable&) = delete;
};

TEST(TimeLimits, TheSoonerOneCountsAndOnlyTheJobsEndIsHard) {
  const auto begun = TimeLimit::Clock::now();
  EXPECT_EQ(TimeLimit(begun, 0).state().seconds_left, kNever);
  const StopState soft = TimeLimit(begun, 100).state();
  EXPECT_GT(soft.seconds_left, 50);
  EXPECT_LE(soft.seconds_left, 100);
  EXPECT_EQ(soft.hard_seconds_left, kNever);
  const Variable end(std::to_string(std::time(nullptr) + 60));
  const StopState hard = TimeLimit(begun, 100).state();
  EXPECT_LE(hard.hard_seconds_left, 55) << "some seconds are kept free";
  EXPECT_GT(hard.hard_seconds_left, 30);
  EXPECT_EQ(hard.seconds_left, hard.hard_seconds_left);
  EXPECT_LE(TimeLimit(begun, 20).state().seconds_left, 20);
  EXPECT_EQ(hard.level, StopLevel::none);
}

TEST(TimeLimits, AnEndThatIsNoneIsRefusedOrIgnored) {
  const auto begun = TimeLimit::Clock::now();
  {
    const Variable past("1000000000");
    testing::internal::CaptureStderr();
    EXPECT_EQ(TimeLimit(begun, 0).state().hard_seconds_left, kNever);
    EXPECT_NE(testing::internal::GetCapturedStderr().find("warning: SLURM_JOB_END_TIME was"), std::string::npos);
  }
  const Variable wrong("tomorrow");
  EXPECT_EQ(error_of<ConfigError>([&] { TimeLimit(begun, 0); }),
            "SLURM_JOB_END_TIME = \"tomorrow\" is no time in seconds since 1970; unset it");
}

TEST(Starts, WithoutALaterStepAreALoop) {
  const Scratch scratch;
  const auto start = [&](std::int64_t step, const std::string& fingerprint = "f", std::int64_t most = 2) {
    return StartRecord::count(scratch.folder(), step, fingerprint, most);
  };
  EXPECT_EQ(start(0).starts(), 1);
  EXPECT_EQ(start(0).starts(), 2);
  EXPECT_EQ(start(0).starts(), 3);
  const std::string text = error_of<CrashLoopError>([&] { start(0); });
  EXPECT_EQ(text.find("3 starts from step 0 have saved no later step; read the log"), 0U) << text;
  EXPECT_NE(text.find("run.max_restarts = 2 is the limit"), std::string::npos) << text;
  EXPECT_NE(error_of<CrashLoopError>([&] { start(0); }), "") << "a refused start changes nothing";
  EXPECT_EQ(start(0, "f", 0).starts(), 4) << "no limit";
  EXPECT_EQ(start(0, "another configuration").starts(), 1);
  EXPECT_EQ(start(7, "another configuration").starts(), 1) << "a step was saved";
  EXPECT_EQ(start(7, "another configuration").starts(), 2);
}

TEST(Starts, ThatASignalHasStoppedDoNotCount) {
  const Scratch scratch;
  for (int i = 0; i < 5; ++i) StartRecord::count(scratch.folder(), 3, "f", 1).forgive();
  EXPECT_EQ(StartRecord::count(scratch.folder(), 3, "f", 1).starts(), 1);
  EXPECT_EQ(StartRecord::count(scratch.folder(), 3, "f", 1).starts(), 2);
  StartRecord::count(scratch.folder(), 9, "f", 1).remove();
  EXPECT_TRUE(std::filesystem::is_empty(scratch.folder()));
}

TEST(Starts, ADamagedRecordIsNamedAndLeftoversGo) {
  const Scratch scratch;
  std::ofstream(scratch.path(".starts.json.0123456789abcdef.tmp")) << "{";
  StartRecord::count(scratch.folder(), 0, "f", 1);
  EXPECT_FALSE(std::filesystem::exists(scratch.path(".starts.json.0123456789abcdef.tmp")));
  for (const char* damage : {"", "{", "[]", "{\"step\":0}", "{\"step\":\"0\",\"starts\":1,\"fingerprint\":\"f\"}",
                             "{\"step\":0,\"starts\":1,\"fingerprint\":7}"}) {
    std::ofstream(scratch.path("starts.json")) << damage;
    const std::string text = error_of<DataError>([&] { StartRecord::count(scratch.folder(), 0, "f", 1); });
    EXPECT_NE(text.find("starts.json is damaged; remove it"), std::string::npos) << damage << ": " << text;
  }
}

TEST(Stragglers, AreFoundOnceAfterManySlowStepsInARow) {
  Stragglers stragglers({1, 1, 1, 1});
  const std::vector<double> even = {1.0, 1.1, 1.0, 0.9}, uneven = {1.0, 1.1, 1.5, 0.9};
  for (int i = 0; i < 100; ++i) EXPECT_FALSE(stragglers.add(even));
  for (int again = 0; again < 2; ++again) {
    for (int i = 1; i < Stragglers::kSteps; ++i) EXPECT_FALSE(stragglers.add(uneven)) << i;
    const auto found = stragglers.add(uneven);
    ASSERT_TRUE(found);
    EXPECT_EQ(found->rank, 2);
    EXPECT_EQ(found->seconds, 1.5);
    EXPECT_EQ(found->peers_seconds, 1.0);
    for (int i = 0; i < 30; ++i) EXPECT_FALSE(stragglers.add(uneven));
    EXPECT_FALSE(stragglers.add(even));
  }
}

TEST(Stragglers, ARankWithMoreWorkIsNoStraggler) {
  Stragglers stragglers({2, 1, 1});
  Stragglers pair({1, 1});
  int found = 0;
  for (int i = 0; i < 40; ++i) {
    EXPECT_FALSE(stragglers.add(std::vector<double>{2, 1, 1}));
    if (const auto slow = pair.add(std::vector<double>{1, 1.3})) {
      EXPECT_EQ(slow->rank, 1);
      ++found;
    }
  }
  EXPECT_EQ(found, 1);
}

TEST(Stragglers, TheSpreadOfAStep) {
  const StepSpread odd = spread_of(std::vector<double>{3, 1, 2});
  EXPECT_EQ(odd.slowest_rank, 0);
  EXPECT_EQ(odd.slowest_seconds, 3);
  EXPECT_EQ(odd.median_seconds, 2);
  EXPECT_EQ(spread_of(std::vector<double>{4, 1, 2, 3}).median_seconds, 2.5);
  EXPECT_EQ(spread_of(std::vector<double>{5}).median_seconds, 5);
}

}  // namespace
}  // namespace tforge
