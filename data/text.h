#pragma once
// Text as bytes: UTF-8 checked as it streams, and words counted as it streams.
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace tforge {

/// Checks a stream of bytes for well-formed UTF-8 (Unicode 15, table 3-7: no overlong forms, no surrogates, nothing
/// above U+10FFFF). Feed the pieces in order; a character may lie across two pieces.
class Utf8Checker {
 public:
  /// Offset in the stream of the first byte of the first ill-formed character, if there is one in this piece.
  std::optional<std::uint64_t> feed(std::string_view piece);
  /// Offset of a character that the end of the stream cuts short, if there is one.
  std::optional<std::uint64_t> finish() const;

 private:
  std::uint64_t offset_ = 0;     // of the next byte
  std::uint64_t character_ = 0;  // offset of the character under way
  int missing_ = 0;              // continuation bytes still to come
  unsigned char low_ = 0x80;     // range of the next of them
  unsigned char high_ = 0xbf;
};

/// Counts words as `wc -w` does in the C locale: maximal runs of bytes other than space, \t, \n, \v, \f, \r.
class WordCounter {
 public:
  void feed(std::string_view piece);
  std::uint64_t words() const { return words_; }

 private:
  std::uint64_t words_ = 0;
  bool in_word_ = false;
};

/// Length of the longest prefix of `text` that does not end inside a UTF-8 character. Ill-formed bytes count as whole.
std::size_t whole_characters(std::string_view text);

}  // namespace tforge
