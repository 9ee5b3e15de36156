#pragma once
// Log lines on standard error, prefixed with the time and, in a job of several ranks, the rank.
#include <fmt/format.h>

#include <string_view>
#include <utility>

namespace tforge::log {

enum class Level { debug, info, warning, error };

/// Called once by a job after its communicator exists. Ranks other than 0 print warnings and errors only.
void set_rank(int rank, int ranks);
void set_level(Level least);
void write(Level level, std::string_view text);

template <class... Args>
void debug(fmt::format_string<Args...> format, Args&&... args) {
  write(Level::debug, fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
void info(fmt::format_string<Args...> format, Args&&... args) {
  write(Level::info, fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
void warning(fmt::format_string<Args...> format, Args&&... args) {
  write(Level::warning, fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
void error(fmt::format_string<Args...> format, Args&&... args) {
  write(Level::error, fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace tforge::log
