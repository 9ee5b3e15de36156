#include "data/text.h"

#include <cstring>

namespace tforge {
namespace {
constexpr bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

/// Continuation bytes that a lead byte announces; -1 for a byte that starts no character.
constexpr int continuation_bytes(unsigned char lead) {
  if (lead < 0x80) return 0;
  if (lead < 0xc2) return -1;
  if (lead < 0xe0) return 1;
  if (lead < 0xf0) return 2;
  return lead < 0xf5 ? 3 : -1;
}
}  // namespace

std::optional<std::uint64_t> Utf8Checker::feed(std::string_view piece) {
  const std::uint64_t begin = offset_;
  std::size_t i = 0;
  while (i < piece.size()) {
    if (missing_ == 0) {
      // Most text is ASCII: eight bytes at a time.
      std::uint64_t eight = 0;
      while (i + 8 <= piece.size()) {
        std::memcpy(&eight, piece.data() + i, 8);
        if ((eight & 0x8080808080808080ULL) != 0) break;
        i += 8;
      }
      if (i == piece.size()) break;
      const auto lead = static_cast<unsigned char>(piece[i]);
      character_ = begin + i;
      missing_ = continuation_bytes(lead);
      if (missing_ < 0) return character_;
      low_ = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
      high_ = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    } else {
      const auto byte = static_cast<unsigned char>(piece[i]);
      if (byte < low_ || byte > high_) return character_;
      low_ = 0x80;
      high_ = 0xbf;
      --missing_;
    }
    ++i;
  }
  offset_ = begin + piece.size();
  return std::nullopt;
}

std::optional<std::uint64_t> Utf8Checker::finish() const {
  return missing_ > 0 ? std::optional(character_) : std::nullopt;
}

void WordCounter::feed(std::string_view piece) {
  bool in_word = in_word_;
  std::uint64_t words = 0;
  for (const char c : piece) {
    const bool space = is_space(c);
    words += static_cast<std::uint64_t>(!space && !in_word);
    in_word = !space;
  }
  in_word_ = in_word;
  words_ += words;
}

std::size_t whole_characters(std::string_view text) {
  for (std::size_t back = 1; back <= 3 && back <= text.size(); ++back) {
    const auto byte = static_cast<unsigned char>(text[text.size() - back]);
    if ((byte & 0xc0) == 0x80) continue;
    return continuation_bytes(byte) >= static_cast<int>(back) ? text.size() - back : text.size();
  }
  return text.size();
}

}  // namespace tforge
