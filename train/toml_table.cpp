#include "train/toml_table.h"

#include <cerrno>
#include <fstream>
#include <sstream>
#include <system_error>

namespace tforge {

namespace {

constexpr std::size_t kMaxBytes = 256 << 10;
constexpr std::ptrdiff_t kMaxDots = 2000;

}  // namespace

std::string place(const std::string& source, const toml::source_position& position) {
  return fmt::format("{}:{}:{}", source, position.line, position.column);
}

std::string quoted(const std::string& text) {
  constexpr auto kFlags = toml::toml_formatter::default_flags &
                          ~(toml::format_flags::allow_literal_strings | toml::format_flags::allow_multi_line_strings);
  std::ostringstream out;
  out << toml::toml_formatter(toml::value<std::string>(text), kFlags);
  return out.str();
}

toml::table parse_toml(std::string_view text, const std::string& source) {
  if (text.size() > kMaxBytes) throw ConfigError("{}: {} bytes, want at most {}", source, text.size(), kMaxBytes);
  // Each dot of a key may open a table in a table, and tables are walked and destroyed by recursion.
  if (const auto dots = std::ranges::count(text, '.'); dots > kMaxDots) {
    throw ConfigError("{}: {} dots, want at most {}", source, dots, kMaxDots);
  }
  try {
    return toml::parse(text, source);
  } catch (const toml::parse_error& error) {
    throw ConfigError("{}: {}", place(source, error.source().begin), error.description());
  }
}

std::string small_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text(kMaxBytes + 1, '\0');  // the file may be a pipe
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (!file.is_open() || file.bad()) {
    throw ConfigError("{}: cannot be read: {}", path, std::generic_category().message(errno));
  }
  text.resize(static_cast<std::size_t>(file.gcount()));
  return text;
}

}  // namespace tforge
