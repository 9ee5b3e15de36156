// What a job says whose collectives on devices fail or hang: over the shim in NCCL's place, on emulated devices.
#include <gtest/gtest.h>

#include <string>

#include "support/command.h"

namespace {

using tforge::test::Ended, tforge::test::has_line, tforge::test::run;

Ended run_ranks(int ranks, const std::string& arguments, const std::string& environment = "") {
  return run("env " + environment + " " + TFORGE_MPIRUN + " " + std::to_string(ranks) + " " + TFORGE_CHILD + " " +
             arguments);
}

TEST(Nccl, RanksReduceAndEnd) {
  const Ended ended = run_ranks(2, "nothing");
  EXPECT_EQ(ended.code, 0) << ended.text;
}

TEST(Nccl, AnErrorBehindACollectiveNamesRankAndCollectiveAndExits12) {
  const Ended ended = run_ranks(2, "nothing", "TFORGE_NCCL_SHIM_FAULT=1:3");
  EXPECT_EQ(ended.code, 12) << ended.text;
  EXPECT_TRUE(has_line(ended,
                       "error: rank 1 \\(1 of 2 in its group\\): all_reduce of 64 bytes failed on the device: NCCL: "
                       "remote process exited or there was a network error.*"))
      << ended.text;
}

TEST(Nccl, ARankThatNeverComesIsNamed) {
  const Ended ended = run_ranks(2, "late");
  EXPECT_EQ(ended.code, 12) << ended.text;
  EXPECT_TRUE(has_line(ended,
                       "error: rank 1 .* is stuck or slow: in no collective for .*, phase \"backward\", step 2; .* "
                       "rank 0 .* waits in all_reduce \\(collective [0-9]+, 64 bytes\\) for .*, phase \"backward\", "
                       "step 2"))
      << ended.text;
}

TEST(Nccl, ACollectiveThatNeverEndsOnTheDeviceIsNamed) {
  const Ended ended = run_ranks(2, "stuck");
  EXPECT_EQ(ended.code, 12) << ended.text;
  EXPECT_TRUE(
      has_line(ended, "error: every rank waits in the same collective and none gets on: .* wait in all_reduce .*"))
      << ended.text;
}

}  // namespace
