// Every target over its seeds and over tests/fuzz/regressions/<target>/: inputs that once broke something.
#include <gtest/gtest.h>

#include <ostream>

#include "fuzz/input.h"
#include "support/source_file.h"

namespace tforge::fuzz {

/// Tests are listed with their parameter: GoogleTest would print its bytes.
void PrintTo(const Target& target, std::ostream* out) { *out << target.name; }

namespace {

class Regressions : public testing::TestWithParam<Target> {};

TEST_P(Regressions, SeedsAreRead) {
  const std::vector<std::string> seeds = GetParam().seeds();
  ASSERT_FALSE(seeds.empty());
  for (const std::string& seed : seeds) {
    EXPECT_NO_THROW(GetParam().run({reinterpret_cast<const std::uint8_t*>(seed.data()), seed.size()}));
  }
  EXPECT_NO_THROW(GetParam().run({}));
}

TEST_P(Regressions, NoneComesBack) {
  const std::filesystem::path folder = source_file(std::string("tests/fuzz/regressions/") + GetParam().name);
  if (!std::filesystem::exists(folder)) return;  // nothing was found yet
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const std::string bytes = bytes_of_file(entry.path());
    EXPECT_NO_THROW(GetParam().run({reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size()}))
        << entry.path();
  }
}

INSTANTIATE_TEST_SUITE_P(Fuzz, Regressions, testing::ValuesIn(targets().begin(), targets().end()),
                         [](const auto& target) { return std::string(target.param.name); });

TEST(Targets, AnUnknownNameIsRefused) { EXPECT_THROW(target("none"), std::invalid_argument); }

}  // namespace
}  // namespace tforge::fuzz
