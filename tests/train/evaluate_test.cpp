// Perplexity: what is scored, with which context, and the same number on every layout.
#include <gtest/gtest.h>

#include <cmath>

#include "support/tiny_run.h"

namespace tforge::test {
namespace {

/// The rule of train/evaluate.h, one token at a time.
double scored_one_by_one(TinyRun& run, const TokenSplit& split, std::int64_t context, std::int64_t stride) {
  Tape tape(run.allocator, run.stream, TapeMode::inference);
  double sum = 0;
  for (std::uint64_t d = 0; d < split.documents(); ++d) {
    const DocumentInfo document = split.document(d);
    const auto last = static_cast<std::int64_t>(document.tokens) - 1;
    for (std::int64_t t = 1; t <= last; ++t) {
      const std::int64_t windows = t <= context ? 0 : (t - context + stride - 1) / stride;
      const std::int64_t end = std::min(last, context + windows * stride),
                         begin = std::max<std::int64_t>(0, end - context);
      EXPECT_TRUE(t - begin >= context - stride || begin == 0);
      const std::int64_t n = t - begin;  // what follows the token does not matter to it
      Tensor tokens = Tensor::empty(run.allocator, Shape{n}, DType::i32, Purpose::activations);
      Tensor targets = Tensor::empty(run.allocator, Shape{n}, DType::i32, Purpose::activations);
      split.copy(document.first_token + static_cast<std::uint64_t>(begin), static_cast<std::uint64_t>(n),
                 tokens.span<std::int32_t>().data());
      std::ranges::fill(targets.span<std::int32_t>(), -1);
      split.copy(document.first_token + static_cast<std::uint64_t>(t), 1, targets.span<std::int32_t>().data() + n - 1);
      const Tensor nll = run.trainer.model().nll(tape, tokens, targets, 1);
      sum += nll.span<double>().back();
    }
  }
  return sum;
}

std::int64_t targets_of(const TokenSplit& split) {
  std::int64_t targets = 0;
  for (std::uint64_t d = 0; d < split.documents(); ++d)
    targets += static_cast<std::int64_t>(split.document(d).tokens) - 1;
  return targets;
}

TEST(Evaluate, ScoresEveryTokenOnceWithItsContext) {
  const Lab lab;
  TinyRun run(lab.config(DType::f64), lab, alone());
  train(run.trainer, 10);
  const TokenSplit& split = lab.dataset().split(Split::validation);
  for (const auto& [context, stride] : {std::pair<std::int64_t, std::int64_t>{32, 16}, {9, 9}, {7, 3}}) {
    const EvalResult result = run.trainer.evaluate(Split::validation, {context, stride, 5, 0});
    EXPECT_EQ(result.tokens, targets_of(split));
    EXPECT_EQ(result.documents, 10);
    EXPECT_LE(relative(result.nll_sum, scored_one_by_one(run, split, context, stride)), 1e-12)
        << "context " << context << ", stride " << stride;
  }
  // Defaults: the whole context, half of it as stride.
  EXPECT_EQ(run.trainer.evaluate(Split::validation, {}).nll_sum,
            run.trainer.evaluate(Split::validation, {32, 16, 8, 0}).nll_sum);
}

TEST(Evaluate, SameNumberOnEveryLayoutAndBatch) {
  const Lab lab;
  for (const DType dtype : {DType::f32, DType::f64}) {
    const RunConfig config = lab.config(dtype);
    train_and_save(lab, config, 10, lab.path(std::string(name_of(dtype))));
    TinyRun reference(config, lab, alone(), lab.path(std::string(name_of(dtype))));
    const EvalResult want = reference.trainer.evaluate(Split::validation, {});
    const double tolerance = dtype == DType::f64 ? 1e-12 : 1e-6;
    for (const std::int64_t batch : {1, 3, 8}) {
      const EvalResult same = reference.trainer.evaluate(Split::validation, {0, 0, batch, 0});
      EXPECT_LE(relative(same.nll_sum, want.nll_sum), tolerance) << "batch " << batch;
      for (const auto& layout : layouts()) {
        TinyRun run(config, lab, mesh_of(layout), lab.path(std::string(name_of(dtype))));
        const EvalResult got = run.trainer.evaluate(Split::validation, {0, 0, batch, 0});
        EXPECT_LE(relative(got.nll_sum, want.nll_sum), tolerance) << text_of(layout) << ", batch " << batch;
        EXPECT_EQ(got.tokens, want.tokens);
        EXPECT_EQ(got.bytes, want.bytes);
      }
    }
  }
}

TEST(Evaluate, UniformModel) {
  const Lab lab;
  RunConfig config = lab.config(DType::f64);
  TinyRun run(config, lab, mesh_of(layouts().back()));
  run.trainer.model().parameters().values().fill_zero();
  const EvalResult result = run.trainer.evaluate(Split::test, {});
  const TokenSplit& split = lab.dataset().split(Split::test);
  EXPECT_NEAR(result.nll(), std::log(256.0), 1e-11);
  EXPECT_NEAR(result.token_perplexity(), 256.0, 1e-9);
  // bytes is the sum of the documents' lengths, of which the first byte of each costs nothing.
  std::int64_t bytes = 0, words = 0;
  for (std::uint64_t d = 0; d < split.documents(); ++d) {
    bytes += static_cast<std::int64_t>(split.document(d).bytes);
    words += static_cast<std::int64_t>(split.document(d).words);
  }
  EXPECT_EQ(result.bytes, bytes);
  EXPECT_EQ(result.words, words);
  EXPECT_NEAR(result.bits_per_byte(), 8.0 * static_cast<double>(result.tokens) / static_cast<double>(bytes), 1e-12);
  EXPECT_NEAR(std::log(result.word_perplexity()),
              std::log(256.0) * static_cast<double>(result.tokens) / static_cast<double>(words), 1e-9);
}

TEST(Evaluate, StopsAfterAboutSoManyTokens) {
  const Lab lab;
  TinyRun run(lab.config(DType::f32), lab, alone());
  const EvalResult all = run.trainer.evaluate(Split::validation, {});
  const EvalResult some = run.trainer.evaluate(Split::validation, {0, 0, 8, 200});
  EXPECT_GE(some.tokens, 200);
  EXPECT_LT(some.tokens, all.tokens);
  EXPECT_LT(some.bytes, all.bytes);
}

TEST(Evaluate, Refusals) {
  const Lab lab;
  TinyRun run(lab.config(DType::f32), lab, alone());
  const auto with = [&](const EvalOptions& options) {
    return [&, options] { run.trainer.evaluate(Split::test, options); };
  };
  expect_error<ConfigError>(with({33, 0, 8, 0}), "a context of 33 tokens for a model trained on 32");
  expect_error<ConfigError>(with({16, 17, 8, 0}), "a stride of 17 tokens skips some in a context of 16");
  expect_error<ConfigError>(with({16, 8, 0, 0}), "a batch of 0 windows");
}

TEST(Evaluate, Unigram) {
  const Lab lab;
  const TokenSplit& train_split = lab.dataset().split(Split::train);
  const TokenSplit& split = lab.dataset().split(Split::validation);
  std::vector<std::int32_t> tokens(train_split.tokens());
  train_split.copy(0, tokens.size(), tokens.data());
  std::vector<double> counts(256, 1.0);
  for (const std::int32_t t : tokens) counts[static_cast<std::size_t>(t)] += 1;
  double sum = 0;
  for (std::uint64_t d = 0; d < split.documents(); ++d) {
    const DocumentInfo document = split.document(d);
    tokens.resize(document.tokens);
    split.copy(document.first_token, document.tokens, tokens.data());
    for (std::size_t i = 1; i < tokens.size(); ++i) {
      sum -= std::log(counts[static_cast<std::size_t>(tokens[i])] / static_cast<double>(train_split.tokens() + 256));
    }
  }
  const EvalResult result = evaluate_unigram(train_split, split, 256);
  EXPECT_LE(relative(result.nll_sum, sum), 1e-12);
  EXPECT_EQ(result.tokens, targets_of(split));
}

}  // namespace
}  // namespace tforge::test
