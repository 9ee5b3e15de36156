#include "data/text.h"

#include <gtest/gtest.h>

#include "support/corpus.h"

namespace tforge {
namespace {

std::optional<std::uint64_t> first_fault(std::string_view text, std::size_t piece) {
  Utf8Checker checker;
  for (std::size_t i = 0; i < text.size(); i += piece) {
    if (const auto fault = checker.feed(text.substr(i, piece))) return fault;
  }
  return checker.finish();
}

TEST(Utf8, EveryCharacterIsWellFormed) {
  std::string text;
  for (char32_t c = 0; c < 0x110000; ++c) {
    if (c < 0xd800 || c > 0xdfff) test::append_utf8(text, c);
  }
  EXPECT_EQ(first_fault(text, text.size()), std::nullopt);
  EXPECT_EQ(first_fault(text, 1), std::nullopt);
}

TEST(Utf8, FaultsAreFoundAtTheirFirstByte) {
  const std::string head = "0123456789 \xe2\x82\xac ";  // 15 bytes
  for (const std::string fault :
       {"\x80", "\xbf", "\xc0\x80", "\xc1\xbf", "\xe0\x9f\xbf", "\xed\xa0\x80", "\xf0\x8f\xbf\xbf", "\xf4\x90\x80\x80",
        "\xf5\x80\x80\x80", "\xff", "\xc3", "\xe2\x82", "\xf0\x9f\x98", "\xe2\x28\xa1"}) {
    for (const std::string tail : {"", "a", "more text than eight bytes"}) {
      for (const std::size_t piece : {1U, 3U, 1000U}) {
        EXPECT_EQ(first_fault(head + fault + tail, piece), 15U) << fault;
      }
    }
  }
}

TEST(WordCounter, CountsAsWc) {
  for (const auto& [text, words] : std::vector<std::pair<std::string, std::uint64_t>>{
           {"", 0}, {"   \n\t", 0}, {"one", 1}, {" one  two\nthree\r\n", 3}, {"caf\xc3\xa9 \xe2\x80\x83 x", 3}}) {
    for (std::size_t piece = 1; piece <= text.size() + 1; ++piece) {
      WordCounter counter;
      for (std::size_t i = 0; i < text.size(); i += piece) counter.feed(std::string_view(text).substr(i, piece));
      EXPECT_EQ(counter.words(), words) << text;
    }
  }
}

TEST(WholeCharacters, HoldsBackWhatMayBecomeOne) {
  EXPECT_EQ(whole_characters(""), 0U);
  EXPECT_EQ(whole_characters("ab"), 2U);
  EXPECT_EQ(whole_characters("a\xc3"), 1U);
  EXPECT_EQ(whole_characters("a\xc3\xa9"), 3U);
  EXPECT_EQ(whole_characters("\xf0\x9f\x98"), 0U);
  EXPECT_EQ(whole_characters("\xf0\x9f\x98\x80"), 4U);
  EXPECT_EQ(whole_characters("a\x80"), 2U);
  EXPECT_EQ(whole_characters("\xff"), 1U);
}

}  // namespace
}  // namespace tforge
