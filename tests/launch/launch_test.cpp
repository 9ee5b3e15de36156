// How jobs of several ranks start and end: exit codes and messages.
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <array>
#include <cstdio>
#include <string>

namespace {

struct Ended {
  int code = -1;
  std::string text;  // standard output and error
};

Ended run(const std::string& command) {
  Ended ended;
  FILE* pipe = popen((command + " 2>&1").c_str(), "r");
  if (pipe == nullptr) return ended;
  std::array<char, 4096> buffer{};
  for (std::size_t n = 0; (n = fread(buffer.data(), 1, buffer.size(), pipe)) > 0;) ended.text.append(buffer.data(), n);
  const int status = pclose(pipe);
  ended.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return ended;
}

Ended run_ranks(int ranks, const std::string& arguments) {
  return run(std::string(TFORGE_MPIRUN) + " " + std::to_string(ranks) + " " + TFORGE_CHILD + " " + arguments);
}

bool has(const Ended& ended, const std::string& words) { return ended.text.find(words) != std::string::npos; }

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

TEST(Launch, ACollectiveThatDoesNotFinishNamesItselfAndExits12) {
  const Ended ended = run_ranks(2, "sleep");
  EXPECT_EQ(ended.code, 12) << ended.text;
  EXPECT_TRUE(has(ended,
                  "error: rank 0 of 2: all_reduce (collective 1, 64 bytes) did not finish within 1 s in phase "
                  "\"forward\", step 7"))
      << ended.text;
}

TEST(Launch, AStartedReductionThatDoesNotFinishExits12) {
  const Ended ended = run_ranks(2, "sleep_started");
  EXPECT_EQ(ended.code, 12) << ended.text;
  EXPECT_TRUE(has(ended, "error: rank 0 of 2: finish (collective 1, 64 bytes) did not finish within 1 s"))
      << ended.text;
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
