#include "data/tokenizer.h"

#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>

#include <algorithm>
#include <array>
#include <limits>
#include <unordered_map>
#include <utility>

#include "core/errors.h"
#include "data/text.h"
#include "storage/atomic_file.h"
#include "storage/digest.h"

namespace tforge {
namespace {
constexpr std::string_view kSpaceMark = "\xe2\x96\x81";  // U+2581, what sentencepiece writes for a space
constexpr std::size_t kMaxSegment = 64 * 1024;
constexpr std::uint64_t kMaxModel = 256ULL << 20;

std::string fingerprint_of(TokenizerKind kind, const std::string& serialized) {
  std::string bytes{name_of(kind)};
  bytes += '\0';
  bytes += serialized;
  return digest128(bytes);
}

/// The words of a sentencepiece status, without the source position in front of them when there are others.
std::string reason(const sentencepiece::util::Status& status) {
  std::string text = status.error_message();
  const std::size_t bracket = text.rfind("] ");
  if (bracket != std::string::npos && bracket + 3 < text.size()) text.erase(0, bracket + 2);
  while (!text.empty() && (text.back() == ' ' || text.back() == '.')) text.pop_back();
  return text;
}

/// Calls `use(number, bytes)` for each field with a length of a protocol-buffer message; false for what is no message.
template <class Use>
bool each_field(std::string_view message, Use&& use) {
  const auto varint = [&message](std::uint64_t& value) {
    value = 0;
    for (int shift = 0; shift < 64 && !message.empty(); shift += 7) {
      const auto byte = static_cast<unsigned char>(message.front());
      message.remove_prefix(1);
      value |= static_cast<std::uint64_t>(byte & 0x7fU) << shift;
      if ((byte & 0x80U) == 0) return true;
    }
    return false;
  };
  while (!message.empty()) {
    std::uint64_t key = 0, size = 0, ignored = 0;
    if (!varint(key)) return false;
    const bool bytes = (key & 7U) == 2;
    switch (key & 7U) {
      case 0:
        if (!varint(ignored)) return false;
        break;
      case 1: size = 8; break;
      case 2:
        if (!varint(size)) return false;
        break;
      case 5: size = 4; break;
      default: return false;
    }
    if (size > message.size()) return false;
    if (bytes) use(static_cast<std::uint32_t>(key) >> 3U, message.substr(0, size));
    message.remove_prefix(size);
  }
  return true;
}

/// Whether a sentencepiece model brings a table of normalisations, which the library walks without a look at its
/// bounds.
bool has_normalization_table(std::string_view model) {
  constexpr std::uint32_t kNormalizer = 3, kDenormalizer = 5, kTable = 2;  // sentencepiece_model.proto
  bool found = false;
  each_field(model, [&](std::uint32_t number, std::string_view spec) {
    if (number != kNormalizer && number != kDenormalizer) return;
    each_field(spec,
               [&](std::uint32_t n, std::string_view table) { found = found || (n == kTable && !table.empty()); });
  });
  return found;
}

/// The training samples cut into lines, and around each U+2581; then a line of one space, without which sentencepiece
/// ends the process when a required character is not in the text.
class Lines final : public sentencepiece::SentenceIterator {
 public:
  explicit Lines(std::span<const std::string> samples) : samples_(samples) { Lines::Next(); }
  bool done() const override { return done_; }
  const std::string& value() const override { return line_; }
  sentencepiece::util::Status status() const override { return {}; }
  void Next() override {
    while (sample_ < samples_.size()) {
      const std::string_view rest = std::string_view(samples_[sample_]).substr(position_);
      if (rest.empty()) {
        ++sample_;
        position_ = 0;
        continue;
      }
      const std::size_t newline = rest.find('\n');
      const std::size_t mark = rest.substr(0, newline).find(kSpaceMark);
      const std::size_t end = std::min({newline, mark, rest.size()});
      position_ += end + (mark < newline ? kSpaceMark.size() : newline < rest.size() ? 1U : 0U);
      if (end == 0) continue;
      line_ = rest.substr(0, end);
      return;
    }
    done_ = last_;
    last_ = true;
    line_.assign(1, ' ');
  }

 private:
  std::span<const std::string> samples_;
  std::size_t sample_ = 0;
  std::size_t position_ = 0;
  std::string line_;
  bool last_ = false;  // the line of one space was reached
  bool done_ = false;
};
}  // namespace

std::string_view name_of(TokenizerKind kind) { return kind == TokenizerKind::bytes ? "bytes" : "bpe"; }

TokenizerKind tokenizer_kind_from_name(std::string_view name) {
  for (const TokenizerKind kind : {TokenizerKind::bytes, TokenizerKind::bpe}) {
    if (name == name_of(kind)) return kind;
  }
  throw DataError("unknown tokenizer kind '{}', want bytes or bpe", name);
}

class Tokenizer::Model {
 public:
  Model() : fingerprint_(fingerprint_of(TokenizerKind::bytes, "")) {
    for (int byte = 0; byte < 256; ++byte) pieces_.emplace_back(1, static_cast<char>(byte));
  }

  Model(std::string serialized, const std::string& origin)
      : kind_(TokenizerKind::bpe),
        serialized_(std::move(serialized)),
        fingerprint_(fingerprint_of(TokenizerKind::bpe, serialized_)) {
    const auto changes_text = [&] {
      return DataError(
          "{} does not give text back unchanged; train it with --normalization_rule_name=identity "
          "--remove_extra_whitespaces=false --add_dummy_prefix=false",
          origin);
    };
    if (has_normalization_table(serialized_)) throw changes_text();
    if (serialized_.empty() || !each_field(serialized_, [](std::uint32_t, std::string_view) {}) || !load()) {
      throw DataError("{} is not a sentencepiece model", origin);
    }
    words_are_independent_ = true;
    for (int id = 0; id < processor_.GetPieceSize(); ++id) add_piece(id);
    for (std::size_t byte = 0; byte < 256; ++byte) {
      const int id = processor_.PieceToId(fmt::format("<0x{:02X}>", byte));
      if (!processor_.IsByte(id)) {
        throw DataError("{} has no piece for byte {:#04x} and would lose text; train it with --byte_fallback=true",
                        origin, byte);
      }
      byte_ids_[byte] = id;
      pieces_[static_cast<std::size_t>(id)].assign(1, static_cast<char>(byte));
    }
    const int newline = processor_.PieceToId("\n");
    newline_id_ = processor_.IsUnknown(newline) ? byte_ids_['\n'] : newline;
    // Text that normalisation, the dummy prefix or the removal of spaces would change.
    for (const std::string_view probe :
         {"a", " a", "a  b ", "\xef\xac\x81\xe2\x91\xa0\xef\xbc\xa1", "e\xcc\x81", "\t"}) {
      std::vector<int> ids;
      if (!spell(probe, ids)) throw changes_text();
    }
  }

  TokenizerKind kind_ = TokenizerKind::bytes;
  std::string serialized_;
  std::string fingerprint_;
  std::vector<std::string> pieces_;

  /// Tokens of one segment, and whether they spell it.
  bool spell(std::string_view segment, std::vector<int>& ids) const {
    ids.clear();
    if (!processor_.Encode({segment.data(), segment.size()}, &ids).ok()) return false;
    std::size_t position = 0;
    for (const int id : ids) {
      const std::string& piece = pieces_[static_cast<std::size_t>(id)];
      if (segment.substr(position, piece.size()) != piece) return false;
      position += piece.size();
    }
    return position == segment.size();
  }

  /// End of the segment that starts at `begin` when nothing follows `text`.
  std::size_t segment_end(std::string_view text, std::size_t begin) const {
    if (text[begin] == '\n') return begin + 1;
    if (text.substr(begin, 3) == kSpaceMark) return begin + 3;
    const std::size_t limit = std::min(text.size(), begin + kMaxSegment);
    for (std::size_t i = begin + 1; i < limit; ++i) {
      const char c = text[i];
      if (c == '\n') return i;
      if (c == ' ' && words_are_independent_ && text[i - 1] != ' ') return i;
      if (c == kSpaceMark[0] && text.substr(i, 3) == kSpaceMark) return i;
    }
    std::size_t end = limit;
    while (end < text.size() && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) --end;
    return end > begin ? end : limit;  // only ill-formed text has no character here
  }

  /// Appends the tokens of `text`, with `encode_segment(segment)` called for what is left to sentencepiece.
  template <class EncodeSegment>
  void encode(std::string_view text, std::vector<std::int32_t>& out, EncodeSegment&& encode_segment) const {
    if (kind_ == TokenizerKind::bytes) {
      out.reserve(out.size() + text.size());
      for (const char c : text) out.push_back(static_cast<unsigned char>(c));
      return;
    }
    for (std::size_t begin = 0; begin < text.size();) {
      const std::size_t end = segment_end(text, begin);
      const std::string_view segment = text.substr(begin, end - begin);
      if (segment == "\n") {
        out.push_back(newline_id_);
      } else if (segment == kSpaceMark) {
        for (const char c : kSpaceMark) out.push_back(byte_ids_[static_cast<unsigned char>(c)]);
      } else {
        encode_segment(segment);
      }
      begin = end;
    }
  }

  void spell_or_throw(std::string_view segment, std::vector<int>& ids) const {
    if (!spell(segment, ids)) {
      throw DataError("the tokenizer does not give '{}' back unchanged; choose another tokenizer",
                      segment.substr(0, whole_characters(segment.substr(0, 40))));
    }
  }

 private:
  /// Whether the library takes the model, which it may also say with an exception (an empty piece).
  bool load() {
    try {
      return processor_.LoadFromSerializedProto(serialized_).ok() && processor_.GetPieceSize() > 0;
    } catch (const std::exception&) {
      return false;
    }
  }

  void add_piece(int id) {
    const std::string& piece = processor_.IdToPiece(id);
    std::string bytes;
    if (!processor_.IsByte(id) && !processor_.IsControl(id) && !processor_.IsUnknown(id)) {
      for (std::size_t i = 0; i < piece.size();) {
        if (std::string_view(piece).substr(i, 3) == kSpaceMark) {
          if (!bytes.empty() && bytes.back() != ' ') words_are_independent_ = false;
          bytes += ' ';
          i += 3;
        } else {
          bytes += piece[i++];
        }
      }
    }
    pieces_.push_back(std::move(bytes));
  }

  sentencepiece::SentencePieceProcessor processor_;
  std::array<std::int32_t, 256> byte_ids_{};
  std::int32_t newline_id_ = 0;
  bool words_are_independent_ = false;
};

Tokenizer::Tokenizer(std::shared_ptr<const Model> model) : model_(std::move(model)) {}

Tokenizer Tokenizer::bytes() { return Tokenizer(std::make_shared<const Model>()); }

Tokenizer Tokenizer::from_serialized(TokenizerKind kind, std::string serialized, const std::string& origin) {
  if (kind == TokenizerKind::bpe) return Tokenizer(std::make_shared<const Model>(std::move(serialized), origin));
  if (!serialized.empty())
    throw DataError("{}: a tokenizer of bytes has no model, found {} bytes", origin, serialized.size());
  return bytes();
}

Tokenizer Tokenizer::from_model_file(const std::string& path) {
  return from_serialized(TokenizerKind::bpe, read_file(path, kMaxModel), path);
}

Tokenizer Tokenizer::train_bpe(std::span<const std::string> samples, std::int64_t vocab) {
  if (vocab < 1 || vocab > std::numeric_limits<std::int32_t>::max()) {
    throw DataError("a vocabulary of {} pieces cannot be trained", vocab);
  }
  std::size_t bytes = 0;
  for (const std::string& sample : samples) bytes += sample.size();
  // Without U+2581 among the pieces (a text without spaces) a space would become bytes that spell U+2581.
  const std::unordered_map<std::string, std::string> options = {
      {"model_type", "bpe"},
      {"vocab_size", std::to_string(vocab)},
      {"byte_fallback", "true"},
      {"normalization_rule_name", "identity"},
      {"remove_extra_whitespaces", "false"},
      {"add_dummy_prefix", "false"},
      {"max_sentence_length", "1073741824"},  // the most that the library takes
      {"required_chars", std::string(kSpaceMark)},
      {"user_defined_symbols", "\n"},
      {"unk_id", "0"},
      {"bos_id", "-1"},
      {"eos_id", "-1"},
      {"pad_id", "-1"},
      {"num_threads", "1"},
      {"minloglevel", "3"},
  };
  if (bytes == 0) throw DataError("a BPE vocabulary cannot be trained on an empty text");
  Lines lines(samples);
  std::string serialized;
  const auto status = sentencepiece::SentencePieceTrainer::Train(options, &lines, &serialized);
  if (!status.ok()) {
    throw DataError("a BPE vocabulary of {} pieces cannot be trained on {} bytes of text: {}", vocab, bytes,
                    reason(status));
  }
  return from_serialized(TokenizerKind::bpe, std::move(serialized), "the trained tokenizer");
}

TokenizerKind Tokenizer::kind() const { return model_->kind_; }
std::int32_t Tokenizer::vocab_size() const { return static_cast<std::int32_t>(model_->pieces_.size()); }
const std::string& Tokenizer::serialized() const { return model_->serialized_; }
const std::string& Tokenizer::fingerprint() const { return model_->fingerprint_; }

void Tokenizer::encode(std::string_view text, std::vector<std::int32_t>& out) const {
  std::vector<int> ids;
  model_->encode(text, out, [&](std::string_view segment) {
    model_->spell_or_throw(segment, ids);
    out.insert(out.end(), ids.begin(), ids.end());
  });
}

std::string_view Tokenizer::piece(std::int32_t token) const {
  if (token < 0 || token >= vocab_size()) {
    throw DataError("token {} is outside the vocabulary of {}", token, vocab_size());
  }
  return model_->pieces_[static_cast<std::size_t>(token)];
}

std::string Tokenizer::decode(std::span<const std::int32_t> tokens) const {
  std::string text;
  for (const std::int32_t token : tokens) text += piece(token);
  return text;
}

std::size_t Tokenizer::safe_cut(std::string_view text) const {
  if (kind() == TokenizerKind::bytes) return text.size();
  // A segment that ends where the text ends may go on, unless it is a newline.
  std::size_t begin = 0;
  while (begin < text.size()) {
    const std::size_t end = model_->segment_end(text, begin);
    if (end == text.size()) return text.back() == '\n' ? end : begin;
    begin = end;
  }
  return begin;
}

/// A word and its tokens in one cache line. A word goes to the slot that its hash names and drives out what was there.
struct Encoder::Slot {
  std::uint8_t length = 0;  // 0: empty
  std::uint8_t tokens = 0;
  std::array<char, 30> word{};
  std::array<std::int32_t, 8> ids{};
};

Encoder::Encoder(const Tokenizer& tokenizer)
    : tokenizer_(tokenizer), slots_(tokenizer.kind() == TokenizerKind::bpe ? 65536 : 0) {}
Encoder::~Encoder() = default;
Encoder::Encoder(Encoder&&) noexcept = default;

void Encoder::encode(std::string_view text, std::vector<std::int32_t>& out) {
  static_assert(sizeof(Slot) == 64);
  const Tokenizer::Model& model = *tokenizer_.model_;
  std::vector<int> ids;
  model.encode(text, out, [&](std::string_view segment) {
    Slot* slot = nullptr;
    if (segment.size() <= std::tuple_size_v<decltype(Slot::word)>) {
      slot = &slots_[digest64(segment.data(), segment.size()) % slots_.size()];
      if (segment == std::string_view(slot->word.data(), slot->length)) {
        out.insert(out.end(), slot->ids.begin(), slot->ids.begin() + slot->tokens);
        return;
      }
    }
    model.spell_or_throw(segment, ids);
    out.insert(out.end(), ids.begin(), ids.end());
    if (slot != nullptr && ids.size() <= slot->ids.size()) {
      slot->length = static_cast<std::uint8_t>(segment.size());
      slot->tokens = static_cast<std::uint8_t>(ids.size());
      std::copy(segment.begin(), segment.end(), slot->word.begin());
      std::copy(ids.begin(), ids.end(), slot->ids.begin());
    }
  });
}

std::string StreamDecoder::push(std::int32_t token) {
  pending_ += tokenizer_.piece(token);
  const std::size_t whole = whole_characters(pending_);
  std::string text = pending_.substr(0, whole);
  pending_.erase(0, whole);
  return text;
}

std::string StreamDecoder::finish() { return std::exchange(pending_, {}); }

}  // namespace tforge
