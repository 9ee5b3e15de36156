#include "parallel/shard.h"

#include <gtest/gtest.h>

#include "core/errors.h"

namespace tforge {
namespace {

using Borders = std::vector<std::int64_t>;

TEST(ShardBorders, SplitsEvenlyWithTheLargerSharesFirst) {
  EXPECT_EQ(ShardBorders::even(5, 3, "keys").borders, (Borders{0, 2, 4, 5}));
  EXPECT_EQ(ShardBorders::even(97, 2, "words").borders, (Borders{0, 49, 97}));
  EXPECT_EQ(ShardBorders::even(4, 3, "heads").borders, (Borders{0, 2, 3, 4}));
  EXPECT_EQ(ShardBorders::even(3, 3, "keys").borders, (Borders{0, 1, 2, 3}));
  const ShardBorders five = ShardBorders::even(5, 3, "keys");
  EXPECT_EQ(five.ranks(), 3);
  EXPECT_EQ(five.total(), 5);
  EXPECT_EQ(five.begin(2), 4);
  EXPECT_EQ(five.count(1), 2);
}

TEST(ShardBorders, RefusesMoreRanksThanRows) {
  try {
    ShardBorders::even(2, 3, "block 0 ffn keys");
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_STREQ(error.what(),
                 "block 0 ffn keys: 2 rows cannot be split over 3 ranks; use at most 2 tensor-parallel ranks");
  }
}

TEST(ShardBorders, AppendKeepsEveryOldRow) {
  const ShardBorders one = ShardBorders::even(8, 1, "keys");
  const ShardBorders two = ShardBorders::append(one, 16, 2, "keys");
  EXPECT_EQ(two.borders, (Borders{0, 8, 16}));
  EXPECT_EQ(ShardBorders::moved_rows(one, two), 0);
  const ShardBorders four = ShardBorders::append(two, 21, 4, "keys");
  EXPECT_EQ(four.borders, (Borders{0, 8, 16, 19, 21}));
  EXPECT_EQ(ShardBorders::moved_rows(two, four), 0);
  // No added rank: the last one takes the added rows.
  EXPECT_EQ(ShardBorders::append(two, 20, 2, "keys").borders, (Borders{0, 8, 20}));
  EXPECT_EQ(ShardBorders::append(two, 16, 2, "keys"), two);
}

TEST(ShardBorders, AppendRefusesWhatItCannotKeep) {
  const ShardBorders two = ShardBorders::even(8, 2, "keys");
  EXPECT_THROW(ShardBorders::append(two, 16, 1, "keys"), ConfigError);
  EXPECT_THROW(ShardBorders::append(two, 7, 2, "keys"), ConfigError);
  EXPECT_THROW(ShardBorders::append(two, 9, 4, "keys"), ConfigError);
}

TEST(ShardBorders, CountsOldRowsThatMove) {
  const ShardBorders one = ShardBorders::even(8, 1, "keys");
  // 16 rows on 2 ranks, evenly: rank 0 keeps rows 0..8, rank 1 owns new ones only.
  EXPECT_EQ(ShardBorders::moved_rows(one, ShardBorders::even(16, 2, "keys")), 0);
  // 8 rows on 2 ranks: rows 4..8 move to rank 1.
  EXPECT_EQ(ShardBorders::moved_rows(one, ShardBorders::even(8, 2, "keys")), 4);
  // 2 ranks of 4 rows become 3 ranks of 4 of 12: nothing moves. Of 5, 5, 5 rows: row 4 goes to rank 0, none to rank 2.
  const ShardBorders two = ShardBorders::even(8, 2, "keys");
  EXPECT_EQ(ShardBorders::moved_rows(two, ShardBorders::even(12, 3, "keys")), 0);
  EXPECT_EQ(ShardBorders::moved_rows(two, ShardBorders::even(15, 3, "keys")), 1);
  // Back to one rank: the rows of rank 1 move.
  EXPECT_EQ(ShardBorders::moved_rows(two, one), 4);
}

}  // namespace
}  // namespace tforge
