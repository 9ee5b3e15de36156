#include "data/sampler.h"

#include <gtest/gtest.h>

#include <set>

#include "support/corpus.h"
#include "support/scratch.h"

namespace tforge {
namespace {

using namespace test;

/// A train split whose token i is i % 251, of `tokens` tokens in documents of 10.
TokenDataset counting_dataset(const std::string& path, int tokens) {
  TokenDatasetWriter writer(path, Tokenizer::bytes(), "");
  for (const Split split : kSplits) {
    const int count = split == Split::train ? tokens : 1;
    for (int i = 0; i < count; ++i) {
      writer.add(split, std::vector<std::int32_t>{i % 251});
      if (i % 10 == 9 || i + 1 == count) writer.end_document(split, 1, 1);
    }
  }
  writer.commit();
  return TokenDataset(path);
}

TEST(Sampler, WindowsAreShiftedByOneAndCrossDocuments) {
  const test::Scratch scratch;
  const TokenDataset dataset = counting_dataset(scratch.path("a.h5"), 1000);
  const Sampler sampler(dataset.split(Split::train), 16, 3);
  EXPECT_EQ(sampler.windows_per_epoch(), 62U);  // (1000 - 1) / 16
  std::vector<std::int32_t> inputs(16), targets(16);
  for (std::uint64_t i = 0; i < 200; ++i) {
    sampler.sample(i, inputs.data(), targets.data());
    const auto first = static_cast<std::int32_t>(sampler.window(i) * 16);
    for (std::int32_t j = 0; j < 16; ++j) {
      EXPECT_EQ(inputs[static_cast<std::size_t>(j)], (first + j) % 251);
      EXPECT_EQ(targets[static_cast<std::size_t>(j)], (first + j + 1) % 251);
    }
  }
}

TEST(Sampler, EachEpochTakesEachWindowOnceInAnotherOrder) {
  const test::Scratch scratch;
  const TokenDataset dataset = counting_dataset(scratch.path("a.h5"), 1000);
  const Sampler sampler(dataset.split(Split::train), 16, 3);
  const std::uint64_t windows = sampler.windows_per_epoch();
  std::vector<std::vector<std::uint64_t>> epochs;
  for (std::uint64_t epoch = 0; epoch < 3; ++epoch) {
    std::vector<std::uint64_t> order;
    for (std::uint64_t i = 0; i < windows; ++i) order.push_back(sampler.window(epoch * windows + i));
    EXPECT_EQ(std::set<std::uint64_t>(order.begin(), order.end()).size(), windows);
    EXPECT_LT(*std::max_element(order.begin(), order.end()), windows);
    EXPECT_FALSE(std::is_sorted(order.begin(), order.end()));
    epochs.push_back(order);
  }
  EXPECT_NE(epochs[0], epochs[1]);
  EXPECT_NE(epochs[1], epochs[2]);
}

TEST(Sampler, OrderDependsOnSeedAndIndexAlone) {
  const test::Scratch scratch;
  const TokenDataset dataset = counting_dataset(scratch.path("a.h5"), 5000);
  const Sampler one(dataset.split(Split::train), 8, 11), same(dataset.split(Split::train), 8, 11),
      other(dataset.split(Split::train), 8, 12);
  std::vector<std::uint64_t> forwards, backwards, elsewhere;
  for (std::uint64_t i = 0; i < 1500; ++i) forwards.push_back(one.window(i));
  for (std::uint64_t i = 1500; i-- > 0;) backwards.push_back(same.window(i));
  for (std::uint64_t i = 0; i < 1500; ++i) elsewhere.push_back(other.window(i));
  std::reverse(backwards.begin(), backwards.end());
  EXPECT_EQ(forwards, backwards);
  EXPECT_NE(forwards, elsewhere);
}

TEST(Sampler, OneWindowIsTheLeast) {
  const test::Scratch scratch;
  const TokenDataset dataset = counting_dataset(scratch.path("a.h5"), 17);
  const Sampler sampler(dataset.split(Split::train), 16, 0);
  EXPECT_EQ(sampler.windows_per_epoch(), 1U);
  EXPECT_EQ(sampler.window(5), 0U);
  expect_error<DataError>([&] { Sampler(dataset.split(Split::train), 17, 0); },
                          "a.h5: train holds 17 tokens, a window of 17 needs 18");
}

}  // namespace
}  // namespace tforge
