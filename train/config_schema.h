#pragma once
// The table of configuration keys, and the type of its rows.
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "train/config.h"

namespace tforge {

enum class FieldType { integer, real, text, choice, duration, flag };

/// integer: int64; real and duration (seconds): double; text and choice: string; flag: bool.
using FieldValue = std::variant<std::int64_t, double, std::string, bool>;

struct Field {
  std::string key;  // "train.lr"; sections are contiguous in the table
  FieldType type;
  std::string doc;
  std::vector<std::string> choices;                 // of a choice
  std::string want;                                 // "more than 0"; "" when every value will do
  std::function<bool(const FieldValue&)> in_range;  // may be empty
  std::function<FieldValue(const RunConfig&)> get;
  std::function<void(RunConfig&, const FieldValue&)> set;
  std::string owner = {};                // a key, a text or a choice, of which
  std::vector<std::string> owners = {};  // these values alone have this key; empty: all

  bool belongs_to(const RunConfig& config) const;
};

std::span<const Field> config_fields();

/// nullptr for an unknown key.
const Field* find_field(std::string_view key);

/// What does not fit between keys: a complaint that begins with the key to blame. Throws ConfigError.
void validate(const RunConfig& config);

}  // namespace tforge
