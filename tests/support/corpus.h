#pragma once
// Text for tests of data/ and tf_prepare, and expected errors.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "core/errors.h"

namespace tforge::test {

/// Names of what lies in a folder, sorted.
inline std::vector<std::string> names_in(const std::string& folder) {
  std::vector<std::string> found;
  for (const auto& entry : std::filesystem::directory_iterator(folder))
    found.push_back(entry.path().filename().string());
  std::sort(found.begin(), found.end());
  return found;
}

inline void write_whole(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

inline std::string read_whole(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file) << path;
  return {std::istreambuf_iterator<char>(file), {}};
}

inline void append_utf8(std::string& text, char32_t c) {
  const auto put = [&](char32_t byte) { text += static_cast<char>(byte); };
  const auto rest = [&](int shift) { put(0x80 | ((c >> shift) & 0x3f)); };
  if (c < 0x80) return put(c);
  if (c < 0x800) return put(0xc0 | (c >> 6)), rest(0);
  if (c < 0x10000) return put(0xe0 | (c >> 12)), rest(6), rest(0);
  put(0xf0 | (c >> 18)), rest(12), rest(6), rest(0);
}

/// Lines of words from a small made-up vocabulary, the same for the same seed.
inline std::vector<std::string> generated_lines(int lines, unsigned seed) {
  static const char* const kWords[] = {"the",         "token",  "model", "grows",    "without", "forgetting",
                                       "and",         "learns", "again", "from",     "text",    "of",
                                       "several",     "rivers", "that",  "remember", "Monday",  "1,024",
                                       "caf\xc3\xa9", "it's",   "house", "(small)",  "sea",     "light"};
  std::mt19937 random(seed);
  std::vector<std::string> out;
  for (int i = 0; i < lines; ++i) {
    std::string line;
    for (unsigned words = 3 + random() % 12; words > 0; --words) {
      if (!line.empty()) line += ' ';
      line += kWords[random() % std::size(kWords)];
    }
    out.push_back(line + ".");
  }
  return out;
}

/// `f` throws an E of one line that contains `part`, with exit code 2 unless told.
template <class E, class F>
void expect_error(F&& f, const std::string& part, ExitCode code = ExitCode::bad_input) {
  try {
    f();
    ADD_FAILURE() << "nothing was thrown, want: " << part;
  } catch (const E& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find(part), std::string::npos) << "was: " << text << "\nwant: " << part;
    EXPECT_EQ(text.find('\n'), std::string::npos) << text;
    EXPECT_EQ(error.code(), code) << text;
  } catch (const std::exception& other) {
    ADD_FAILURE() << "another error: " << other.what() << "\nwant: " << part;
  }
}

}  // namespace tforge::test
