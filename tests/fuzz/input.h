#pragma once
// What the targets share: errors that are allowed, files for readers that want a path, and HDF5 files made of a sound
// one and a few changes.
#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/errors.h"
#include "fuzz/targets.h"
#include "support/scratch.h"

// NOLINTNEXTLINE(readability-identifier-naming): of libhdf5
extern "C" std::uint32_t H5_checksum_metadata(const void* bytes, std::size_t count, std::uint32_t seed);

namespace tforge::fuzz {

inline std::string text_of(Input input) { return {input.begin(), input.end()}; }

/// Runs `read`. An error of ours with an exit code for bad input is allowed; others are findings.
template <class Read>
void refuse_or(Read&& read) {
  try {
    read();
  } catch (const Error& error) {
    if (error.code() != ExitCode::bad_input && error.code() != ExitCode::no_resources &&
        error.code() != ExitCode::damaged) {
      throw Finding(std::string("an error of another kind: ") + error.what());
    }
  }
}

/// A folder of this process, and a file in it that is written anew for each input.
inline std::string input_path() {
  static const test::Scratch scratch;
  return scratch.path("input.h5");
}
inline void write_bytes(const std::string& path, std::string_view bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!file) throw std::runtime_error("cannot write " + path);
}
inline std::string bytes_of_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// One change of an input that is read as a list of them: offset (u16), a u8 whose lower three bits are the count of
/// bytes less one and whose next bit is `marked`, and the bytes. What is left of `input` is cut off its front.
struct Change {
  static constexpr std::size_t kHead = 3;
  static constexpr unsigned kMark = 8;

  std::uint16_t offset = 0;
  bool marked = false;
  std::string bytes;

  static std::optional<Change> next(std::string_view& input) {
    if (input.size() <= kHead) return std::nullopt;
    Change change;
    std::memcpy(&change.offset, input.data(), sizeof change.offset);
    const auto flags = static_cast<unsigned char>(input[2]);
    change.marked = (flags & kMark) != 0;
    change.bytes = input.substr(kHead, (flags & (kMark - 1)) + 1);
    input.remove_prefix(kHead + change.bytes.size());
    return change;
  }
  std::string text() const {
    std::string text(reinterpret_cast<const char*>(&offset), sizeof offset);
    text += static_cast<char>((bytes.size() - 1) | (marked ? kMark : 0U));
    return text + bytes;
  }
};

/// An HDF5 file whose metadata carry checksums, to be changed in a few places and given the right checksums again:
/// whoever makes a file by hand does the same. Blind changes would end at the first checksum.
class SoundFile {
 public:
  explicit SoundFile(std::string bytes) : bytes_(std::move(bytes)) {
    constexpr std::size_t kMostBlock = 1 << 14;
    for (const char* signature : {"\x89HDF", "OHDR", "OCHK", "FRHP", "FHDB", "FHIB", "BTHD", "BTIN", "BTLF"}) {
      for (std::size_t at = bytes_.find(signature); at != std::string::npos; at = bytes_.find(signature, at + 1)) {
        for (std::size_t size = 8; size < kMostBlock && at + size + 4 <= bytes_.size(); ++size) {
          std::uint32_t stored = 0;
          std::memcpy(&stored, bytes_.data() + at + size, sizeof stored);
          if (H5_checksum_metadata(bytes_.data() + at, size, 0) != stored) continue;
          blocks_.push_back({at, size});
          break;
        }
      }
    }
    std::vector<bool> checked(bytes_.size());
    for (const auto& [at, size] : blocks_)
      std::fill_n(checked.begin() + static_cast<std::ptrdiff_t>(at), size + 4, true);
    for (std::size_t i = 0; i < bytes_.size(); ++i) {
      if (!checked[i]) unchecked_.push_back(i);
    }
  }

  const std::string& bytes() const { return bytes_; }

  /// The change that puts `bytes` over the first `pattern` of the file, from its byte `skip` on.
  Change over(std::string_view pattern, std::size_t skip, const std::string& bytes) const {
    const std::size_t found = bytes_.find(pattern);
    if (found == std::string::npos) throw std::logic_error("the file does not hold what is to be changed");
    const std::size_t at = found + skip;
    const auto place = std::ranges::lower_bound(unchecked_, at);
    const bool marked = place != unchecked_.end() && *place == at;
    return {static_cast<std::uint16_t>(marked ? place - unchecked_.begin() : static_cast<std::ptrdiff_t>(at)), marked,
            bytes};
  }

  /// Applies changes, the marked ones to the bytes that no checksum covers, the numbers of the datasets among them. An
  /// input that is a file itself replaces all.
  std::string changed(Input input) const {
    const std::string text = text_of(input);
    if (text.starts_with("\x89HDF")) return text;
    std::string result = bytes_;
    std::string_view rest = text;
    while (const std::optional<Change> change = Change::next(rest)) {
      std::size_t at = change->offset % (change->marked ? unchecked_.size() : bytes_.size());
      for (const char c : change->bytes) {
        if (at == (change->marked ? unchecked_.size() : bytes_.size())) break;
        result[change->marked ? unchecked_[at] : at] = c;
        ++at;
      }
    }
    for (const auto& [at, size] : blocks_) {
      const std::uint32_t sum = H5_checksum_metadata(result.data() + at, size, 0);
      std::memcpy(result.data() + at + size, &sum, sizeof sum);
    }
    return result;
  }

 private:
  struct Block {
    std::size_t at, size;
  };
  std::string bytes_;
  std::vector<Block> blocks_;
  std::vector<std::size_t> unchecked_;  // offsets of the bytes outside the blocks
};

}  // namespace tforge::fuzz
