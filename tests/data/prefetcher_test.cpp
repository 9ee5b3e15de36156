// What comes out of the prefetcher is what the sampler gives, whatever was guessed, and failures come to the one who
// wants the samples.
#include "data/prefetcher.h"

#include <gtest/gtest.h>

#include <optional>

#include "support/corpus.h"
#include "support/scratch.h"

namespace tforge {
namespace {

using namespace test;

constexpr std::int64_t kSeq = 16;

class Prefetching : public ::testing::Test {
 protected:
  Prefetching() {
    TokenDatasetWriter writer(scratch_.path("a.h5"), Tokenizer::bytes(), "");
    for (const Split split : kSplits) {
      for (std::int32_t i = 0; i < 2000; ++i) writer.add(split, std::vector<std::int32_t>{i * 7 % 251});
      writer.end_document(split, 1, 1);
    }
    writer.commit();
    dataset_.emplace(scratch_.path("a.h5"));
    sampler_.emplace(dataset_->split(Split::train), kSeq, 3);
  }
  void expect_samples(const SampleTokens& got, const SampleRange& range) const {
    std::vector<std::int32_t> inputs(kSeq), targets(kSeq);
    ASSERT_EQ(got.inputs.size(), static_cast<std::size_t>(range.count * kSeq));
    ASSERT_EQ(got.targets.size(), got.inputs.size());
    for (std::int64_t i = 0; i < range.count; ++i) {
      sampler_->sample(range.first + static_cast<std::uint64_t>(i), inputs.data(), targets.data());
      const auto at = static_cast<std::ptrdiff_t>(i * kSeq);
      EXPECT_TRUE(std::equal(inputs.begin(), inputs.end(), got.inputs.begin() + at));
      EXPECT_TRUE(std::equal(targets.begin(), targets.end(), got.targets.begin() + at));
    }
  }

  const Scratch scratch_;
  std::optional<TokenDataset> dataset_;
  std::optional<Sampler> sampler_;
};

TEST_F(Prefetching, GivesTheSamplesAsked) {
  Prefetcher prefetcher(*sampler_);
  std::uint64_t at = 0;
  for (std::int64_t step = 0; step < 300; ++step) {
    const SampleRange wanted{at, 1 + step % 5};
    at += static_cast<std::uint64_t>(wanted.count);
    // Every third guess is wrong, in its place or in its length.
    SampleRange next{at, 1 + (step + 1) % 5};
    if (step % 3 == 1) next.first += 2;
    if (step % 9 == 2) next.count += 1;
    expect_samples(prefetcher.take(wanted, next), wanted);
  }
  EXPECT_GT(prefetcher.take_wait_seconds(), 0);
  EXPECT_EQ(prefetcher.take_wait_seconds(), 0);
}

TEST_F(Prefetching, EndsAtAnyMoment) {
  { const Prefetcher unused(*sampler_); }
  for (int i = 0; i < 50; ++i) {
    Prefetcher prefetcher(*sampler_);
    prefetcher.take({0, 2}, {2, 40});
  }
}

TEST_F(Prefetching, AFailureComesWithTheSamplesThatFailed) {
  // The tokens of the first window are outside the vocabulary.
  const Tokenizer tokenizer = Tokenizer::train_bpe(generated_lines(300, 2), 400);
  TokenDatasetWriter writer(scratch_.path("damaged.h5"), tokenizer, "");
  for (const Split split : kSplits) {
    for (int i = 0; i < 4 * kSeq + 1; ++i) {
      writer.add(split, std::vector<std::int32_t>{i < kSeq ? tokenizer.vocab_size() : i});
    }
    writer.end_document(split, 1, 1);
  }
  writer.commit();
  const TokenDataset damaged(scratch_.path("damaged.h5"));
  const Sampler sampler(damaged.split(Split::train), kSeq, 3);
  std::uint64_t bad = 0;
  while (sampler.window(bad) != 0) ++bad;
  const std::uint64_t good = bad == 0 ? 1 : 0;

  Prefetcher prefetcher(sampler);
  const auto want = [&](std::uint64_t index, std::uint64_t next) { prefetcher.take({index, 1}, {next, 1}); };
  want(good, bad);
  expect_error<DataError>([&] { want(bad, good); }, "is damaged: token");  // read ahead
  expect_error<DataError>([&] { want(bad, good); }, "is damaged: token");  // read at once
  want(good, bad);
  want(good, good);  // a failed guess that nobody wants
  want(good, bad);   // and one that nobody waits for
}

}  // namespace
}  // namespace tforge
