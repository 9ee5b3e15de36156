#include "core/log.h"

#include <fmt/chrono.h>

#include <chrono>
#include <cstdio>

#include "core/printable.h"

namespace tforge::log {

namespace {
// The process's place in its job: text decoration, not a resource.
int g_rank = 0;
int g_ranks = 1;
Level g_least = Level::info;

std::string_view label(Level level) {
  switch (level) {
    case Level::debug: return "debug: ";
    case Level::info: return "";
    case Level::warning: return "warning: ";
    case Level::error: return "error: ";
  }
  return "";
}
}  // namespace

void set_rank(int rank, int ranks) {
  g_rank = rank;
  g_ranks = ranks;
}

void set_level(Level least) { g_least = least; }

void write(Level level, std::string_view text) {
  if (level < g_least || (g_rank != 0 && level < Level::warning)) return;
  const auto now = std::chrono::floor<std::chrono::seconds>(std::chrono::system_clock::now());
  std::string line = fmt::format("{:%H:%M:%S} ", fmt::localtime(std::chrono::system_clock::to_time_t(now)));
  if (g_ranks > 1) line += fmt::format("[{}/{}] ", g_rank, g_ranks);
  line += label(level);
  line += printable(text);
  line += '\n';
  std::fwrite(line.data(), 1, line.size(), stderr);  // one call, so that lines of several ranks do not mix
}

}  // namespace tforge::log
