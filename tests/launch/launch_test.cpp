// How jobs of several ranks start and end: exit codes and messages.
#include <gtest/gtest.h>

#include <string>

#include "support/command.h"

namespace {

using tforge::test::Ended, tforge::test::has, tforge::test::has_line, tforge::test::run;

Ended run_ranks(int ranks, const std::string& arguments) {
  return run(std::string(TFORGE_MPIRUN) + " " + std::to_string(ranks) + " " + TFORGE_CHILD + " " + arguments);
}

TEST(Launch, RanksStartAndEnd) {
  const Ended ended = run_ranks(2, "nothing 2");
  EXPECT_EQ(ended.code, 0) << ended.text;
  EXPECT_TRUE(has(ended, "rank 0 of 2 is done") && has(ended, "rank 1 of 2 is done")) << ended.text;
}

TEST(Launch, ARankAloneNeedsNoLauncher) {
  const Ended ended = run(std::string(TFORGE_CHILD) + " nothing");
  EXPECT_EQ(ended.code, 0) << ended.text;
  EXPECT_EQ(ended.text, "rank 0 of 1 is done\n");
}

TEST(Launch, TensorsLargerThanOneCallGoInPieces) {
  const Ended ended = run_ranks(3, "verbs");
  EXPECT_EQ(ended.code, 0) << ended.text;
}

TEST(Launch, ACollectiveThatDoesNotFinishNamesWhoIsLateAndExits12) {
  const Ended ended = run_ranks(2, "sleep");
  EXPECT_EQ(ended.code, 12) << ended.text;
  EXPECT_TRUE(has_line(ended,
                       "error: rank 1 \\(.*, pid [0-9]+\\) is stuck or slow: in no collective for .*, phase \"start\"; "
                       "limit 1 s \\(parallel.timeout_s\\): rank 0 \\(.*\\) waits in all_reduce \\(collective [0-9]+, "
                       "64 bytes\\) for .*, phase \"forward\", step 7"))
      << ended.text;
}

TEST(Launch, AStartedReductionThatDoesNotFinishExits12) {
  const Ended ended = run_ranks(2, "sleep_started");
  EXPECT_EQ(ended.code, 12) << ended.text;
  EXPECT_TRUE(has_line(
      ended, "error: rank 1 .* is stuck or slow: .* rank 0 .* waits in finish \\(collective [0-9]+, 64 bytes\\).*"))
      << ended.text;
}

TEST(Launch, WithoutHeartbeatsOnlyWhoWaitsIsKnown) {
  const Ended ended = run_ranks(2, "sleep_local");
  EXPECT_EQ(ended.code, 12) << ended.text;
  EXPECT_TRUE(
      has_line(ended, "error: rank 0 \\(.*\\) of 2 waits in all_reduce .*another rank is dead, stuck or in another.*"))
      << ended.text;
}

TEST(Launch, AStoppedRankIsNamedByTheOthers) {
  for (const std::string rank : {"0", "1"}) {
    const Ended ended = run_ranks(2, "stop" + rank);
    EXPECT_EQ(ended.code, 12) << ended.text;
    EXPECT_TRUE(has_line(
        ended, "error: rank " + rank + " \\(.*, pid [0-9]+\\) is missing: no (heartbeat|answer to heartbeats) for .*"))
        << ended.text;
  }
}

TEST(Launch, AJobThatIsSuspendedAsAWholeGoesOn) {
  const Ended ended = run_ranks(2, "suspend");
  EXPECT_EQ(ended.code, 0) << ended.text;
  EXPECT_FALSE(has(ended, "error")) << ended.text;
}

TEST(Launch, OneRankThatThrowsEndsAllWithItsMessageAndCode) {
  const Ended ended = run_ranks(3, "throw");
  EXPECT_EQ(ended.code, 2) << ended.text;
  EXPECT_TRUE(has(ended, "error: rank 1: tokens.h5 is truncated")) << ended.text;
  EXPECT_FALSE(has(ended, "is done")) << ended.text;
}

TEST(Launch, AWorldThatIsLeftWithoutShutdownEndsAll) {
  const Ended ended = run_ranks(2, "leave");
  EXPECT_EQ(ended.code, 70) << ended.text;
}

TEST(Launch, ARankCountThatContradictsTheLauncherIsRefused) {
  // What a rank sees that SLURM started without its MPI plugin: two tasks, and MPI with one rank in each.
  const Ended ended = run(std::string("SLURM_NTASKS=2 ") + TFORGE_CHILD + " nothing");
  EXPECT_EQ(ended.code, 3) << ended.text;
  EXPECT_EQ(ended.text,
            "error: MPI sees 1 ranks, but SLURM_NTASKS says that 2 were started: they would be independent jobs. "
            "Start with `mpirun -n 2 PROGRAM`, or under SLURM with `srun --mpi=pmix -n 2 PROGRAM`\n");
}

TEST(Launch, ARankCountOtherThanExpectedIsRefused) {
  const Ended ended = run_ranks(2, "nothing 4");
  EXPECT_EQ(ended.code, 3) << ended.text;
  EXPECT_TRUE(has(ended, "4 ranks are expected, MPI sees 2.")) << ended.text;
}

}  // namespace
