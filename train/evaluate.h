#pragma once
// Perplexity of a model on a split of a token dataset.
#include <cstdint>
#include <functional>

#include "core/allocator.h"
#include "data/token_dataset.h"
#include "model/language_model.h"
#include "parallel/mesh.h"

namespace tforge {

/// The context rule. Every token of a document but its first is scored exactly once; a document never sees another.
/// The first window of a document scores its tokens 1 .. context. Each later window ends `stride` scored tokens
/// further on and begins `context` inputs before its end, so that a scored token sees at least context - stride
/// tokens before it (or all there are).
struct EvalOptions {
  std::int64_t context = 0;     // inputs of a window; 0: the model's max_seq
  std::int64_t stride = 0;      // 0: half of the context
  std::int64_t batch = 8;       // windows at a time on each rank; changes speed, not the result
  std::int64_t max_tokens = 0;  // stop after about this many scored tokens; 0: all
  // Called between batches, equally often on every rank; what it throws on every rank alike ends the evaluation.
  std::function<void()> poll = {};
};

struct EvalResult {
  double nll_sum = 0;                                            // in nats, in f64
  std::int64_t tokens = 0, documents = 0, bytes = 0, words = 0;  // tokens: scored; bytes, words: of whole documents

  double nll() const { return nll_sum / static_cast<double>(tokens); }
  double token_perplexity() const;
  double word_perplexity() const;  // exp(nll_sum / words)
  double bits_per_byte() const;    // nll_sum / ln 2 / bytes
};

/// Windows are dealt to the dp ranks; every rank returns the same result. Collective over the mesh. Of a model of
/// virtual shards the result is the same on any ranks, bit by bit: whole batches of windows are dealt, and their sums
/// are added in the order of the batches. Throws ConfigError for a context past max_seq or a stride outside 1 ..
/// context, DataError when nothing is scored.
EvalResult evaluate(LanguageModel& model, const TokenSplit& split, const EvalOptions& options, Mesh& mesh,
                    Allocator& allocator, Stream& stream);

/// What a unigram model with the add-one counts of `train` gives on the tokens that evaluate() scores in `split`.
EvalResult evaluate_unigram(const TokenSplit& train, const TokenSplit& split, std::int32_t vocab);

}  // namespace tforge
