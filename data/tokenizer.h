#pragma once
// Text to token ids and back, without loss: decode(encode(text)) == text, byte for byte.
//
// Kinds:
//   bytes  256 ids, one a byte.
//   bpe    byte-pair encoding by sentencepiece (Kudo and Richardson, arXiv 1808.06226), with byte fallback and no
//          normalisation.
//
// Three things about bpe are decided here and not by sentencepiece:
//   - sentencepiece writes a space as U+2581, so that a U+2581 in the text would come back as a space. The text is cut
//     around each U+2581, and the character itself becomes its three byte pieces.
//   - A newline is a token of its own, and the text is cut around it.
//   - The text is also cut before each run of spaces, when no piece of the model reaches from a word into the next
//     one (always so for models trained here); then the cut changes no token. What is left uncut for more than
//     64 KiB is cut every 64 KiB, at a character.
// Tokens therefore depend on short segments alone: a long text can be encoded in parts (`safe_cut`), in parallel, with
// the same result.
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace tforge {

enum class TokenizerKind : std::uint8_t { bytes, bpe };
std::string_view name_of(TokenizerKind kind);
/// Throws DataError for another name.
TokenizerKind tokenizer_kind_from_name(std::string_view name);

/// An immutable tokenizer; copies share one model. All members may be called from several threads at once.
class Tokenizer {
 public:
  static Tokenizer bytes();
  /// Trains a model of exactly `vocab` pieces on well-formed UTF-8. Deterministic.
  /// Throws DataError when the text is too small (or vocab is too small) for that many pieces.
  static Tokenizer train_bpe(std::span<const std::string> samples, std::int64_t vocab);
  /// From what serialized() gave; `origin` names it in errors. Throws DataError when the bytes are no sentencepiece
  /// BPE model, or one that loses text: without byte fallback, with normalisation or with a dummy prefix.
  static Tokenizer from_serialized(TokenizerKind kind, std::string serialized, const std::string& origin);
  /// A sentencepiece .model file. Throws DataError as from_serialized, and when the file cannot be read.
  static Tokenizer from_model_file(const std::string& path);

  TokenizerKind kind() const;
  std::int32_t vocab_size() const;
  /// The sentencepiece model; nothing for bytes.
  const std::string& serialized() const;
  /// XXH3-128, in hexadecimal, of the kind's name, a zero byte and serialized().
  const std::string& fingerprint() const;

  /// Appends the tokens of `text` to `out`. `text` must be well-formed UTF-8 for bpe.
  /// Throws DataError when the model does not give the text back (never for a model trained here).
  void encode(std::string_view text, std::vector<std::int32_t>& out) const;
  /// The bytes of the tokens, one after another. Throws DataError for an id outside the vocabulary.
  std::string decode(std::span<const std::int32_t> tokens) const;
  /// The bytes of one token. Throws DataError for an id outside the vocabulary.
  std::string_view piece(std::int32_t token) const;

  /// The largest known p such that encode(text + more) == encode(text[0, p)) + encode(text[p, ...) + more) for every
  /// `more`; 0 only for a text of less than 64 KiB + 4 bytes.
  std::size_t safe_cut(std::string_view text) const;

 private:
  friend class Encoder;
  class Model;
  explicit Tokenizer(std::shared_ptr<const Model> model);
  std::shared_ptr<const Model> model_;
};

/// encode() for much text: remembers the tokens of common words in a fixed 4 MiB. One a thread.
class Encoder {
 public:
  explicit Encoder(const Tokenizer& tokenizer);
  ~Encoder();
  Encoder(Encoder&&) noexcept;
  /// Appends the same tokens as Tokenizer::encode, and throws what it throws.
  void encode(std::string_view text, std::vector<std::int32_t>& out);

 private:
  struct Slot;
  Tokenizer tokenizer_;
  std::vector<Slot> slots_;
};

/// decode() for tokens that come one at a time: gives whole characters only.
/// All it returned, and then finish(), are together decode() of all tokens.
class StreamDecoder {
 public:
  explicit StreamDecoder(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}
  /// The text that this token completes; bytes that can never become a character are passed on as they are.
  std::string push(std::int32_t token);
  /// What is left of a character that was never completed.
  std::string finish();

 private:
  Tokenizer tokenizer_;
  std::string pending_;
};

}  // namespace tforge
