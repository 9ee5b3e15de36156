#include "parallel/buckets.h"

#include <gtest/gtest.h>

#include <array>

#include "core/errors.h"

namespace tforge {
namespace {

using Borders = std::vector<std::int64_t>;

/// A table of 10 rows of 4, three matrices of 2 rows of 8, a vector of 5; each starts at a multiple of 16.
const std::array<FlatBlock, 5> kBlocks = {
    {{0, 40, 4, Bucketing::alone}, {48, 16, 8}, {64, 16, 8}, {80, 16, 8}, {96, 5, 1}}};
constexpr std::int64_t kTotal = 112;

TEST(Buckets, CloseAtParameterBordersFromTheLastToTheFirst) {
  const std::vector<Bucket> b = make_buckets(kBlocks, kTotal, 32, 1);
  ASSERT_EQ(b.size(), 3U);
  EXPECT_EQ(b[0].borders, (Borders{80, 112}));  // 16 of the vector with its padding, and 16
  EXPECT_EQ(b[0].first_parameter, 3);
  EXPECT_EQ(b[0].parameters, 2);
  EXPECT_EQ(b[1].borders, (Borders{48, 80}));
  EXPECT_EQ(b[1].first_parameter, 1);
  EXPECT_EQ(b[1].parameters, 2);
  EXPECT_EQ(b[2].borders, (Borders{0, 48}));  // alone, however much room there is
  EXPECT_EQ(b[2].parameters, 1);
}

TEST(Buckets, AParameterThatIsLargerIsABucketOfItsOwn) {
  const std::vector<Bucket> b = make_buckets(kBlocks, kTotal, 1, 1);
  ASSERT_EQ(b.size(), 5U);
  for (std::size_t i = 0; i < 5; ++i) EXPECT_EQ(b[i].begin(), kBlocks[4 - i].offset);
  // One that is nearly full takes the next parameter whole.
  EXPECT_EQ(make_buckets(kBlocks, kTotal, 17, 1)[0].elements(), 32);
  EXPECT_EQ(make_buckets(kBlocks, kTotal, 1000, 1).size(), 2U);
}

TEST(Buckets, RanksOwnWholeRows) {
  // The even parts of 48 elements begin at 16 and 32, of 64 at 21 and 42.
  const std::vector<Bucket> b = make_buckets(kBlocks, kTotal, 1000, 3);
  ASSERT_EQ(b.size(), 2U);
  EXPECT_EQ(b[0].borders, (Borders{48, 72, 88, 112}));
  EXPECT_EQ(b[1].borders, (Borders{0, 16, 32, 48}));
  EXPECT_EQ(b[0].elements(1), 16);
  // Of padding: the last row start is 36, what follows belongs to the last rank.
  EXPECT_EQ(make_buckets(kBlocks, kTotal, 1000, 48)[1].begin(40), 36);
  EXPECT_EQ(make_buckets(kBlocks, kTotal, 1000, 48)[1].begin(45), 48);
}

TEST(Buckets, CoverEverythingOnceAtAnyNumberOfRanks) {
  for (const std::int64_t size : {1, 20, 33, 500}) {
    for (int ranks = 1; ranks <= 200; ++ranks) {
      std::int64_t end = kTotal;
      int parameter = 5;
      for (const Bucket& b : make_buckets(kBlocks, kTotal, size, ranks)) {
        ASSERT_EQ(b.borders.size(), static_cast<std::size_t>(ranks) + 1);
        ASSERT_EQ(b.end(), end);
        ASSERT_EQ(b.first_parameter + b.parameters, parameter);
        for (int r = 0; r < ranks; ++r) ASSERT_LE(b.begin(r), b.end(r));
        end = b.begin();
        parameter = b.first_parameter;
      }
      ASSERT_EQ(end, 0);
      ASSERT_EQ(parameter, 0);
    }
  }
}

TEST(Buckets, RefuseWhatIsNoFlatTensor) {
  const std::array<FlatBlock, 2> overlap = {{{0, 16, 4}, {8, 8, 4}}}, late = {{{16, 16, 4}, {32, 16, 4}}},
                                 ragged = {{{0, 15, 4}, {16, 16, 4}}};
  EXPECT_THROW(make_buckets(overlap, 32, 8, 1), InternalError);
  EXPECT_THROW(make_buckets(late, 48, 8, 1), InternalError);
  EXPECT_THROW(make_buckets(ragged, 32, 8, 1), InternalError);
  EXPECT_THROW(make_buckets(kBlocks, 100, 8, 1), InternalError);
  EXPECT_THROW(make_buckets(kBlocks, kTotal, 0, 1), InternalError);
  EXPECT_THROW(make_buckets(kBlocks, kTotal, 8, 0), InternalError);
}

}  // namespace
}  // namespace tforge
