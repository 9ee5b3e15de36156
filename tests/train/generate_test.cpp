// Generation: the cache changes nothing, ranks agree, and how a token is drawn.
#include <gtest/gtest.h>

#include "core/rng.h"
#include "model/generator.h"
#include "support/tiny_run.h"

namespace tforge::test {
namespace {

class Generate : public ::testing::Test {
 protected:
  /// A model that has seen enough to be of several minds.
  void train_one(DType dtype) { train_and_save(lab_, config(dtype), 20, lab_.path("model")); }
  RunConfig config(DType dtype) const { return lab_.config(dtype); }
  std::vector<std::int32_t> prompt(std::size_t tokens) const {
    std::vector<std::int32_t> p(tokens);
    lab_.dataset().split(Split::test).copy(3, tokens, p.data());
    return p;
  }
  static GenerateOptions options(CacheUse cache, double temperature, std::int64_t tokens = 20) {
    GenerateOptions o;
    o.sampling.temperature = temperature;
    o.sampling.seed = 5;
    o.tokens = tokens;
    o.cache = cache;
    return o;
  }
  static std::vector<std::int32_t> generated(TinyRun& run, const std::vector<std::int32_t>& prompt,
                                             const GenerateOptions& o) {
    return generate(run.trainer.model(), run.allocator, run.stream, prompt, o)[0];
  }

  Lab lab_;
};

TEST_F(Generate, CachedTokensAreTheRecomputedOnes) {
  for (const DType dtype : {DType::f32, DType::f64}) {
    train_one(dtype);
    TinyRun reference(config(dtype), lab_, alone(), lab_.path("model"));
    TinyRun run(config(dtype), lab_, mesh_of(layouts().back()), lab_.path("model"));
    for (const double temperature : {0.0, 1.0}) {
      const auto cached = generated(run, prompt(6), options(CacheUse::cached, temperature));
      EXPECT_EQ(cached.size(), 20U);
      EXPECT_EQ(cached, generated(run, prompt(6), options(CacheUse::recomputed, temperature))) << temperature;
      EXPECT_EQ(cached, generated(reference, prompt(6), options(CacheUse::cached, temperature))) << temperature;
    }
    EXPECT_NE(generated(run, prompt(6), options(CacheUse::cached, 1.0)),
              generated(run, prompt(6), options(CacheUse::cached, 0.0)));
  }
}

TEST_F(Generate, CachedLogitsAreTheRecomputedOnes) {
  train_one(DType::f64);
  TinyRun run(config(DType::f64), lab_, mesh_of(layouts().back()), lab_.path("model"));
  LanguageModel& model = run.trainer.model();
  Tape tape(run.allocator, run.stream, TapeMode::inference);
  // Two sequences of 9 tokens, given to the cache as 4 + 1 + 4.
  const std::vector<std::int32_t> text = prompt(18);
  const auto columns = [&](std::size_t first, std::size_t count) {
    std::vector<std::int32_t> part;
    for (const std::size_t sequence : {0U, 1U}) {
      const auto at = text.begin() + static_cast<std::ptrdiff_t>(9 * sequence + first);
      part.insert(part.end(), at, at + static_cast<std::ptrdiff_t>(count));
    }
    return Tensor::of<std::int32_t>(run.allocator, Shape{static_cast<std::int64_t>(part.size())}, part,
                                    Purpose::activations);
  };
  const std::vector<double> all = values_of(model.logits(tape, columns(0, 9), 2));
  KvCache cache = model.make_cache(2, 10);
  std::size_t seen = 0;
  for (const std::size_t count : {4U, 1U, 4U}) {
    const std::vector<double> last = values_of(model.extend(tape, columns(seen, count), cache));
    seen += count;
    for (std::size_t b = 0; b < 2; ++b) {
      for (std::size_t w = 0; w < 256; ++w) {
        ASSERT_NEAR(last[b * 256 + w], all[(b * 9 + seen - 1) * 256 + w], 1e-12) << seen << " " << b << " " << w;
      }
    }
  }
  EXPECT_EQ(cache.length(), 9);
  EXPECT_THROW(model.extend(tape, columns(0, 2), cache), InternalError);
  EXPECT_THROW(model.make_cache(1, 33), ConfigError);
}

TEST_F(Generate, PastTheTrainedLength) {
  train_one(DType::f64);
  TinyRun run(config(DType::f64), lab_, mesh_of(layouts().back()), lab_.path("model"));
  // 30 + 3: the last token is drawn from a full window of 32.
  GenerateOptions o = options(CacheUse::cached, 1.0, 50);
  std::vector<std::int32_t> heard;
  const auto stopped = generate(run.trainer.model(), run.allocator, run.stream, prompt(30), o,
                                [&](std::int64_t, std::int32_t token) { heard.push_back(token); });
  ASSERT_EQ(stopped.size(), 1U);
  EXPECT_EQ(stopped[0].size(), 3U);
  EXPECT_EQ(heard, stopped[0]);

  // Sliding: each token follows the window, of which the newest 16 tokens are left whenever it would pass 32.
  o.past_end = PastEnd::slide;
  Tape tape(run.allocator, run.stream, TapeMode::inference);
  std::vector<std::int32_t> window = prompt(30), want;
  while (want.size() < 50) {
    if (window.size() > 32) window.erase(window.begin(), window.end() - 16);
    const auto n = static_cast<std::int64_t>(window.size());
    const Tensor logits = run.trainer.model().logits(
        tape, Tensor::of<std::int32_t>(run.allocator, Shape{n}, window, Purpose::activations), 1);
    const Tensor last = logits.rows(n - 1, 1);
    want.push_back(sample_token(last.view(), o.sampling, want.size()));
    window.push_back(want.back());
  }
  EXPECT_EQ(generated(run, prompt(30), o), want);
  o.cache = CacheUse::recomputed;
  EXPECT_EQ(generated(run, prompt(30), o), want);

  expect_error<ConfigError>([&] { generated(run, prompt(33), o); }, "the prompt has 33 tokens");
  expect_error<ConfigError>([&] { generated(run, {}, o); }, "a prompt of at least one token");
}

TEST_F(Generate, SamplesSideBySideAreThoseDrawnAlone) {
  train_one(DType::f64);
  TinyRun run(config(DType::f64), lab_, mesh_of(layouts().back()), lab_.path("model"));
  for (const CacheUse cache : {CacheUse::cached, CacheUse::recomputed}) {
    GenerateOptions o = options(cache, 1.0, 40);
    o.past_end = PastEnd::slide;
    o.samples = 3;
    std::vector<std::vector<std::int32_t>> heard(3);
    const auto samples = generate(
        run.trainer.model(), run.allocator, run.stream, prompt(6), o,
        [&](std::int64_t sample, std::int32_t token) { heard[static_cast<std::size_t>(sample)].push_back(token); });
    EXPECT_EQ(heard, samples);
    EXPECT_NE(samples[0], samples[1]);
    EXPECT_NE(samples[1], samples[2]);
    o.samples = 1;
    EXPECT_EQ(generated(run, prompt(6), o), samples[0]);
    o.samples = 2;
    EXPECT_EQ(generate(run.trainer.model(), run.allocator, run.stream, prompt(6), o)[1], samples[1]);
    o.samples = 0;
    expect_error<ConfigError>([&] { generated(run, prompt(6), o); }, "samples 0: want 1 or more");
  }
}

// ---- sample_token ----

class SampleToken : public ::testing::Test {
 protected:
  /// How often each token comes out of 4000 draws.
  std::vector<double> shares(const std::vector<double>& logits, const SamplingOptions& options) {
    std::vector<double> share(logits.size(), 0.0);
    for (std::uint64_t position = 0; position < 4000; ++position) {
      share[static_cast<std::size_t>(draw(logits, options, position))] += 1.0 / 4000;
    }
    return share;
  }
  std::int32_t draw(const std::vector<double>& logits, const SamplingOptions& options, std::uint64_t position = 0) {
    const Tensor t =
        Tensor::of<double>(allocator_, Shape{static_cast<std::int64_t>(logits.size())}, logits, Purpose::activations);
    return sample_token(t.view(), options, position);
  }
  static void expect_shares(const std::vector<double>& got, const std::vector<double>& want) {
    for (std::size_t i = 0; i < want.size(); ++i) EXPECT_NEAR(got[i], want[i], 0.03) << i;
    for (std::size_t i = 0; i < want.size(); ++i) EXPECT_EQ(got[i] == 0, want[i] == 0) << i;
  }
  /// Probabilities 0.1, 0.4, 0.2, 0.3 up to a constant.
  const std::vector<double> logits_ = {std::log(1.0), std::log(4.0), std::log(2.0), std::log(3.0)};
  Allocator allocator_;
};

TEST_F(SampleToken, GreedyTakesTheLowestOfEquals) {
  EXPECT_EQ(draw({1, 3, 2, 3}, {0.0, 0, 1.0, 1}), 1);
  EXPECT_EQ(draw({-1, -3}, {0.0, 0, 1.0, 1}), 0);
}

TEST_F(SampleToken, FollowsTheProbabilities) { expect_shares(shares(logits_, {}), {0.1, 0.4, 0.2, 0.3}); }

TEST_F(SampleToken, Temperature) {
  expect_shares(shares(logits_, {0.5, 0, 1.0, 0}), {1.0 / 30, 16.0 / 30, 4.0 / 30, 9.0 / 30});
  expect_shares(shares(logits_, {0.001, 0, 1.0, 0}), {0, 1, 0, 0});
}

TEST_F(SampleToken, TopK) {
  expect_shares(shares(logits_, {1.0, 2, 1.0, 0}), {0, 4.0 / 7, 0, 3.0 / 7});
  expect_shares(shares(logits_, {1.0, 1, 1.0, 0}), {0, 1, 0, 0});
  expect_shares(shares(logits_, {1.0, 9, 1.0, 0}), {0.1, 0.4, 0.2, 0.3});
}

TEST_F(SampleToken, TopP) {
  expect_shares(shares(logits_, {1.0, 0, 0.35, 0}), {0, 1, 0, 0});
  expect_shares(shares(logits_, {1.0, 0, 0.65, 0}), {0, 4.0 / 7, 0, 3.0 / 7});
  expect_shares(shares(logits_, {1.0, 0, 0.75, 0}), {0, 4.0 / 9, 2.0 / 9, 3.0 / 9});
  expect_shares(shares(logits_, {1.0, 0, 0.95, 0}), {0.1, 0.4, 0.2, 0.3});
  // Of the two that top-k leaves, the first holds 4/7.
  expect_shares(shares(logits_, {1.0, 2, 0.5, 0}), {0, 1, 0, 0});
}

TEST_F(SampleToken, ManyTokensAreTakenByFallingProbability) {
  // 1000 tokens, token i of weight r(i) + 1 for a permutation r: a draw at share u of the total is the token where the
  // sum over the heaviest reaches u.
  constexpr std::size_t kTokens = 1000;
  std::vector<double> logits(kTokens);
  std::vector<std::size_t> of_rank(kTokens);
  for (std::size_t i = 0; i < kTokens; ++i) {
    const std::size_t rank = i * 387 % kTokens;
    of_rank[rank] = i;
    logits[i] = std::log(static_cast<double>(kTokens - rank));
  }
  for (const std::int64_t top_k : {0, 700, 3}) {
    const std::size_t kept = top_k == 0 ? kTokens : static_cast<std::size_t>(top_k);
    double total = 0;
    for (std::size_t rank = 0; rank < kept; ++rank) total += static_cast<double>(kTokens - rank);
    for (std::uint64_t position = 0; position < 50; ++position) {
      double left = Rng(7, "generate").uniform(position) * total;
      std::size_t rank = 0;
      while ((left -= static_cast<double>(kTokens - rank)) >= 0) ++rank;
      EXPECT_EQ(draw(logits, {1.0, top_k, 1.0, 7}, position), static_cast<std::int32_t>(of_rank[rank]));
    }
  }
}

TEST_F(SampleToken, DependsOnSeedAndPosition) {
  const std::vector<double> even(50, 0.0);
  std::vector<std::int32_t> a, b, c;
  for (std::uint64_t p = 0; p < 20; ++p) {
    a.push_back(draw(even, {1.0, 0, 1.0, 1}, p));
    b.push_back(draw(even, {1.0, 0, 1.0, 1}, p));
    c.push_back(draw(even, {1.0, 0, 1.0, 2}, p));
  }
  EXPECT_EQ(a, b);
  EXPECT_NE(a, c);
  EXPECT_NE(std::count(a.begin(), a.end(), a[0]), 20);
}

TEST_F(SampleToken, Refusals) {
  expect_error<ConfigError>([&] { draw(logits_, {-1.0, 0, 1.0, 0}); }, "temperature -1");
  expect_error<ConfigError>([&] { draw(logits_, {1.0, -1, 1.0, 0}); }, "top-k -1");
  expect_error<ConfigError>([&] { draw(logits_, {1.0, 0, 0.0, 0}); }, "top-p 0");
  expect_error<ConfigError>([&] { draw(logits_, {1.0, 0, 1.5, 0}); }, "top-p 1.5");
}

}  // namespace
}  // namespace tforge::test
