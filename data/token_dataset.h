#pragma once
// The token dataset: one HDF5 file with the tokens of a corpus, its documents and its tokenizer.
//
//   /                     attributes format = "tokenforge-tokens", format_version = 1, vocab, fingerprint, created,
//   source /tokenizer            attributes kind, fingerprint /tokenizer/model      u8, the sentencepiece model (empty
//   for kind "bytes")
//   /<split>/tokens       u8, u16 or u32, the smallest that holds vocab - 1; the documents one after another
//   /<split>/offsets      u64 [documents + 1], first token of each document, then the number of tokens
//   /<split>/bytes        u64 [documents], UTF-8 bytes of the document's text
//   /<split>/words        u64 [documents], its words (as wc -w)
//
// for the splits train, validation and test. Documents keep the order of the corpus. No token marks where a document
// ends; the offsets do. The fingerprint is an XXH3-128 over the tokenizer's fingerprint and, split by split, the bytes
// of the four datasets in the order above: it names the data whatever the file is called.
#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "data/tokenizer.h"

namespace tforge {

enum class Split : std::uint8_t { train, validation, test };
inline constexpr std::array<Split, 3> kSplits = {Split::train, Split::validation, Split::test};
std::string_view name_of(Split split);

/// A document as a range of its split's tokens.
struct DocumentInfo {
  std::uint64_t first_token = 0;
  std::uint64_t tokens = 0;
  std::uint64_t bytes = 0;
  std::uint64_t words = 0;
};

/// The tokens of one split, mapped from the file. Cheap to copy; keeps the mapping alive. Threads may share it.
class TokenSplit {
 public:
  std::uint64_t tokens() const { return tokens_; }
  std::uint64_t documents() const { return documents_; }
  /// Throws InternalError for an index out of range.
  DocumentInfo document(std::uint64_t index) const;
  /// Copies tokens [first, first + count) to `out`.
  /// Throws InternalError for a range outside the split, DataError for a token outside the vocabulary (damaged file).
  void copy(std::uint64_t first, std::uint64_t count, std::int32_t* out) const;
  /// "corpus.h5: train", for messages.
  const std::string& name() const { return name_; }

 private:
  friend class TokenDataset;
  std::shared_ptr<const void> mapping_;
  std::string name_;
  const std::byte* token_bytes_ = nullptr;
  std::size_t token_size_ = 0;
  std::uint32_t vocab_ = 0;
  std::uint64_t tokens_ = 0;
  std::uint64_t documents_ = 0;
  const std::byte* offsets_ = nullptr;
  const std::byte* bytes_ = nullptr;
  const std::byte* words_ = nullptr;
};

/// The tokenizer inside a token dataset or a checkpoint: both keep it with its kind and fingerprint under /tokenizer.
/// Throws DataError.
Tokenizer stored_tokenizer(const std::string& path);

/// A token dataset opened for reading. Only what is touched comes into memory.
class TokenDataset {
 public:
  /// Checks the format, every size and type, the document offsets, and that the tokenizer is the one that the file
  /// names. Throws DataError: not a token dataset, made by a newer version, truncated or inconsistent.
  explicit TokenDataset(const std::string& path);

  const std::string& path() const { return path_; }
  const Tokenizer& tokenizer() const { return tokenizer_; }
  std::int32_t vocab() const { return tokenizer_.vocab_size(); }
  const std::string& fingerprint() const { return fingerprint_; }
  const TokenSplit& split(Split split) const { return splits_[static_cast<std::size_t>(split)]; }
  /// Reads all of it (about 1 s a GB from memory) and compares with the fingerprint. Throws DataError.
  void verify() const;

 private:
  std::string path_;
  Tokenizer tokenizer_;
  std::string fingerprint_;
  std::array<TokenSplit, kSplits.size()> splits_;
};

/// Writes a token dataset of any size in constant memory. What is added goes to nameless temporary files beside the
/// target, and commit() lays them out as HDF5 under a temporary name and renames it: about twice the dataset's size
/// is taken on the disk meanwhile, and a writer that is not committed leaves nothing.
/// Throws ResourceError when the disk is full, DataError for other failures to write.
class TokenDatasetWriter {
 public:
  /// `source` says where the text came from. An existing file is replaced at commit().
  TokenDatasetWriter(std::string path, const Tokenizer& tokenizer, std::string source);
  ~TokenDatasetWriter();
  TokenDatasetWriter(const TokenDatasetWriter&) = delete;
  TokenDatasetWriter& operator=(const TokenDatasetWriter&) = delete;

  /// Appends tokens to the document under way in this split.
  void add(Split split, std::span<const std::int32_t> tokens);
  /// Ends it; the next token of this split begins a new one.
  void end_document(Split split, std::uint64_t bytes, std::uint64_t words);
  /// The file is complete and durable when this returns its fingerprint.
  std::string commit();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace tforge
