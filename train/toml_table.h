#pragma once
// Reading of small TOML files: every key is known and has the right type, or the message says where not. Private to
// train/, which alone sees toml++.
#include <toml++/toml.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/errors.h"
#include "core/nearest.h"

namespace tforge {

/// "file:line:column".
std::string place(const std::string& source, const toml::source_position& position);
/// A TOML string on one line, whatever is in it.
std::string quoted(const std::string& text);
/// Parses `text`; `source` stands for the file. Throws ConfigError with line and column, or when it is more than a
/// configuration can be.
toml::table parse_toml(std::string_view text, const std::string& source);
/// As much of a file as parse_toml may be given, and a byte more. Throws ConfigError when it cannot be read.
std::string small_file(const std::string& path);

/// One table of a file. All members throw ConfigError that begins with `where`.
class TomlTable {
 public:
  /// Every key of `table`, which outlives this, is one of `known`.
  TomlTable(const toml::table& table, std::string where, std::initializer_list<std::string_view> known)
      : table_(table), where_(std::move(where)) {
    const std::vector<std::string> names(known.begin(), known.end());
    for (auto&& [key, node] : table_) {
      if (std::ranges::find(names, std::string(key.str())) != names.end()) continue;
      throw ConfigError("{}: unknown key {}{}", where_, std::string(key.str()),
                        did_you_mean(std::string(key.str()), names));
    }
  }

  std::optional<std::string> text(std::string_view key) const { return value<std::string>(key, "a text"); }
  std::optional<std::int64_t> integer(std::string_view key) const { return value<std::int64_t>(key, "an integer"); }
  /// An integer will do.
  std::optional<double> number(std::string_view key) const { return value<double>(key, "a number"); }
  /// More than 0 and finite.
  std::optional<double> positive(std::string_view key) const {
    const std::optional<double> found = number(key);
    if (found && !(*found > 0 && std::isfinite(*found))) {
      throw ConfigError("{}: {} = {}: want more than 0", where_, key, *found);
    }
    return found;
  }
  std::vector<std::string> texts(std::string_view key) const {
    std::vector<std::string> all;
    const toml::node* node = table_.get(key);
    if (node == nullptr) return all;
    const toml::array* array = node->as_array();
    if (array == nullptr) throw wrong(key, "a list of texts");
    for (const toml::node& item : *array) {
      const std::optional<std::string> text = item.value_exact<std::string>();
      if (!text) throw wrong(key, "a list of texts");
      all.push_back(*text);
    }
    return all;
  }
  /// Null when there is none.
  const toml::table* table(std::string_view key) const {
    const toml::node* node = table_.get(key);
    if (node != nullptr && !node->is_table()) throw wrong(key, "a table");
    return node == nullptr ? nullptr : node->as_table();
  }

  /// What must be there.
  template <class T>
  T need(const std::optional<T>& value, std::string_view key) const {
    if (!value) throw ConfigError("{}: {} is missing", where_, key);
    return *value;
  }

 private:
  template <class T>
  std::optional<T> value(std::string_view key, const char* want) const {
    const toml::node* node = table_.get(key);
    if (node == nullptr) return {};
    std::optional<T> found = std::is_same_v<T, double> ? node->value<T>() : node->value_exact<T>();
    if (!found || node->is_boolean() || (std::is_same_v<T, double> && !node->is_number())) throw wrong(key, want);
    return found;
  }
  ConfigError wrong(std::string_view key, const char* want) const {
    return ConfigError("{}: {}: want {}", where_, key, want);
  }

  const toml::table& table_;
  std::string where_;
};

}  // namespace tforge
