// main() of the tests that run on several ranks: every rank runs every test, and a failure on any rank fails the job.
#include "support/mpi_world.h"

#include <gtest/gtest.h>

#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "core/errors.h"

namespace tforge {
namespace {

Communicator* the_world = nullptr;

/// On ranks other than 0: silent but for failures. On all ranks: a rank whose test failed ends the job at once, since
/// the others may be waiting for it inside a collective; between tests the ranks meet.
class RankListener final : public testing::EmptyTestEventListener {
 public:
  void OnTestPartResult(const testing::TestPartResult& result) override {
    if (the_world->rank() == 0 || !result.failed()) return;
    std::printf("rank %d: %s:%d: %s\n", the_world->rank(), result.file_name() == nullptr ? "?" : result.file_name(),
                result.line_number(), result.message());
  }
  void OnTestEnd(const testing::TestInfo& info) override {
    if (info.result()->Failed()) {
      std::printf("rank %d: %s.%s failed\n", the_world->rank(), info.test_suite_name(), info.name());
      the_world->abort(1);
    }
    the_world->barrier();
  }
};

/// TFORGE_EXPECT_RANKS, or 0 when it is missing or no number.
int expected_ranks() {
  const char* text = std::getenv("TFORGE_EXPECT_RANKS");
  int ranks = 0;
  if (text != nullptr) std::from_chars(text, text + std::strlen(text), ranks);
  return ranks;
}

int run(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  WorldOptions options;
  options.timeout_seconds = 60;
  const auto world = create_world(options);
  if (expected_ranks() != world->size()) {
    if (world->rank() == 0) {
      std::fprintf(stderr, "this test was started with %d ranks, TFORGE_EXPECT_RANKS says %d\n", world->size(),
                   expected_ranks());
    }
    world->shutdown();
    return 2;
  }
  the_world = world.get();

  testing::TestEventListeners& listeners = testing::UnitTest::GetInstance()->listeners();
  if (world->rank() != 0) delete listeners.Release(listeners.default_result_printer());
  listeners.Append(new RankListener);
  const int result = RUN_ALL_TESTS();
  // A rank that ran another number of tests, or failed outside one, counts as well.
  const auto ran = world->all_gather_bytes(std::to_string(testing::UnitTest::GetInstance()->test_to_run_count()) +
                                           (result == 0 ? " passed" : " failed"));
  bool agreed = result == 0;
  for (const std::string& other : ran) agreed = agreed && other == ran.front();
  world->shutdown();
  return agreed ? 0 : 1;
}

}  // namespace

Communicator& test_world() { return *the_world; }

}  // namespace tforge

int main(int argc, char** argv) {
  try {
    return tforge::run(argc, argv);
  } catch (const tforge::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return static_cast<int>(error.code());
  }
}
