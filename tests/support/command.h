#pragma once
// Commands that a test starts, and what they said.
#include <sys/wait.h>

#include <array>
#include <cstdio>
#include <regex>
#include <sstream>
#include <string>

namespace tforge::test {

struct Ended {
  int code = -1;
  std::string text;  // standard output and error
};

inline Ended run(const std::string& command) {
  Ended ended;
  FILE* pipe = popen((command + " 2>&1").c_str(), "r");
  if (pipe == nullptr) return ended;
  std::array<char, 4096> buffer{};
  for (std::size_t n = 0; (n = fread(buffer.data(), 1, buffer.size(), pipe)) > 0;) ended.text.append(buffer.data(), n);
  const int status = pclose(pipe);
  ended.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return ended;
}

/// A line that is `pattern` as a whole.
inline bool has_line(const Ended& ended, const std::string& pattern) {
  std::istringstream lines(ended.text);
  const std::regex expression(pattern);
  for (std::string line; std::getline(lines, line);) {
    if (std::regex_match(line, expression)) return true;
  }
  return false;
}

inline bool has(const Ended& ended, const std::string& words) { return ended.text.find(words) != std::string::npos; }

}  // namespace tforge::test
