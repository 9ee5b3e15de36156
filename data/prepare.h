#pragma once
// From a corpus to a token dataset, in two passes over the text and in constant memory.
#include <array>
#include <cstdint>
#include <string>

#include "data/documents.h"
#include "data/token_dataset.h"

namespace tforge {

enum class ExistingFile : std::uint8_t { refuse, replace };

struct PrepareOptions {
  Corpus corpus;
  std::string output;
  ExistingFile existing = ExistingFile::refuse;
  /// "bytes"; "bpe" (trained here); a sentencepiece .model file; a token dataset or checkpoint (.h5) whose tokenizer is
  /// taken.
  std::string tokenizer = "bpe";
  std::int64_t vocab = 8192;                  // of a trained tokenizer
  std::int64_t tokenizer_bytes = 16'000'000;  // most text that it is trained on
  double validation_fraction = 0.05;          // of the documents
  double test_fraction = 0.05;
  std::uint64_t seed = 0;
  int threads = 0;  // 0: as many as OpenMP has. The result does not depend on it.
};

struct SplitCount {
  std::uint64_t documents = 0;
  std::uint64_t tokens = 0;
  std::uint64_t bytes = 0;
  std::uint64_t words = 0;
};

struct PrepareSummary {
  std::array<SplitCount, kSplits.size()> splits;  // in the order of kSplits
  std::uint64_t empty_documents = 0;              // passed over
  TokenizerKind kind = TokenizerKind::bytes;
  std::int64_t vocab = 0;
  std::string fingerprint;
};

/// Pass 1 counts the documents and draws the lines that the tokenizer is trained on; pass 2 encodes, in parallel, and
/// writes. Document i of N goes where Permutation(seed, "split", N)(i) says: round(fraction * N) documents, but at
/// least one, to each of validation and test, the rest (at least one) to train. The tokenizer sees lines of the train
/// split alone: of each line, by (seed, line number), whether it is drawn, so that the drawn text is at most
/// `tokenizer_bytes` and, of a larger corpus, nearly that much from all over it.
///
/// Throws UsageError: an output that exists, fractions that leave nothing to train on. DataError: what read_documents
/// and Tokenizer throw, fewer than three documents, text that changes between the passes. ResourceError: full disk.
/// Unless it returns, there is no new file.
PrepareSummary prepare(const PrepareOptions& options);

}  // namespace tforge
