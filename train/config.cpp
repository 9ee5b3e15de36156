#include "train/config.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>

#include "core/nearest.h"
#include "train/config_schema.h"
#include "train/toml_table.h"

namespace tforge {

namespace {

/// The value and the place it came from, for messages: "<where>: <key> ...".
struct Entry {
  std::string key;
  const toml::node* node;
  toml::source_position key_position;
};

std::string_view kind_of(const toml::node& node) {
  switch (node.type()) {
    case toml::node_type::table: return "a table";
    case toml::node_type::array: return "an array";
    case toml::node_type::string: return "a string";
    case toml::node_type::integer: return "an integer";
    case toml::node_type::floating_point: return "a floating-point number";
    case toml::node_type::boolean: return "a boolean";
    default: return "a date or time";
  }
}

std::string_view wanted_kind(FieldType type) {
  switch (type) {
    case FieldType::integer: return "an integer";
    case FieldType::real: return "a number";
    case FieldType::duration: return "seconds or a string like \"1h30m\"";
    case FieldType::text:
    case FieldType::choice: return "a string";
    case FieldType::flag: return "true or false";
  }
  return "?";
}

/// The value as TOML. Numbers are the shortest text that reads back as the same bits.
std::string value_text(const FieldValue& value) {
  if (const auto* i = std::get_if<std::int64_t>(&value)) return std::to_string(*i);
  if (const auto* s = std::get_if<std::string>(&value)) return quoted(*s);
  if (const auto* b = std::get_if<bool>(&value)) return *b ? "true" : "false";
  std::string out = fmt::format("{}", std::get<double>(value));
  if (out.find_first_not_of("-0123456789") == std::string::npos) out += ".0";
  return out;
}

/// Empty when the node has another type than the field.
std::optional<FieldValue> convert(const Field& field, const toml::node& node) {
  switch (field.type) {
    case FieldType::integer:
      if (const auto* v = node.as_integer()) return v->get();
      return {};
    case FieldType::flag:
      if (const auto* v = node.as_boolean()) return v->get();
      return {};
    case FieldType::text:
    case FieldType::choice:
      if (const auto* v = node.as_string()) return v->get();
      return {};
    case FieldType::duration:
      if (const auto* v = node.as_string()) {
        try {
          return parse_duration(v->get());
        } catch (const ConfigError& error) {
          throw ConfigError("{} = {}", field.key, error.what());
        }
      }
      [[fallthrough]];
    case FieldType::real:
      if (const auto* v = node.as_floating_point()) return v->get();
      if (const auto* v = node.as_integer()) return static_cast<double>(v->get());
      return {};
  }
  return {};
}

/// Checks and stores one value. Messages begin with the key; the caller puts the place before them.
void assign(RunConfig& config, const Field& field, const toml::node& node) {
  const std::optional<FieldValue> value = convert(field, node);
  if (!value) throw ConfigError("{} is {}, want {}", field.key, kind_of(node), wanted_kind(field.type));
  if (field.type == FieldType::choice) {
    const auto& given = std::get<std::string>(*value);
    if (std::find(field.choices.begin(), field.choices.end(), given) == field.choices.end()) {
      std::string names;
      for (const std::string& name : field.choices)
        names += fmt::format("{}{}", names.empty() ? "" : ", ", quoted(name));
      throw ConfigError("{} = {}: want {}{}{}", field.key, quoted(given), field.choices.size() > 1 ? "one of " : "",
                        names, did_you_mean(given, field.choices));
    }
  }
  if (field.in_range && !field.in_range(*value)) {
    throw ConfigError("{} = {}: want {}", field.key, value_text(*value), field.want);
  }
  field.set(config, *value);
}

/// Every leaf of the document; a table is a leaf where the schema has a value of its name.
void collect(const toml::table& table, const std::string& prefix, std::vector<Entry>& out) {
  for (auto&& [key, node] : table) {
    const std::string path = prefix + std::string(key.str());
    if (node.is_table() && find_field(path) == nullptr) {
      collect(*node.as_table(), path + ".", out);
      // An empty table of an unknown name is a mistake too.
      if (!node.as_table()->empty()) continue;
      const auto known = [&](const Field& f) { return f.key.starts_with(path + "."); };
      if (std::any_of(config_fields().begin(), config_fields().end(), known)) continue;
    }
    out.push_back({path, &node, key.source().begin});
  }
}

[[noreturn]] void throw_unknown(const std::string& where, const std::string& key) {
  std::vector<std::string> keys;
  std::string same_name;  // the right name in the wrong section
  const auto leaf = [](const std::string& k) { return k.substr(k.rfind('.') + 1); };
  for (const Field& field : config_fields()) {
    keys.push_back(field.key);
    if (leaf(field.key) == leaf(key) && same_name.empty()) same_name = field.key;
    if (field.key.starts_with(key + ".")) {
      throw ConfigError("{}: {} is a section; its keys are given below [{}]", where, key, key);
    }
  }
  const std::string hint = same_name.empty() ? did_you_mean(key, keys) : fmt::format("; did you mean `{}`?", same_name);
  throw ConfigError("{}: unknown key {}{}", where, key, hint);
}

void apply_override(const std::string& text, LoadedConfig& loaded) {
  const std::size_t equals = text.find('=');
  if (equals == std::string::npos || equals == 0) {
    throw ConfigError("--set {}: want KEY=VALUE, for example --set train.lr=3e-4", text);
  }
  if (text.find('\n') != std::string::npos) throw ConfigError("--set {}: want one line", quoted(text));
  const auto trimmed = [](std::string s) {
    s.erase(0, std::min(s.find_first_not_of(" \t"), s.size()));
    s.erase(s.find_last_not_of(" \t") + 1);
    return s;
  };
  const std::string key = trimmed(text.substr(0, equals));
  const std::string value = trimmed(text.substr(equals + 1));
  const std::string where = "--set " + key;
  const Field* field = find_field(key);
  if (field == nullptr) throw_unknown(where, key);

  // Text may stand without quotes; everything else is a TOML value.
  const bool number = field->type == FieldType::integer || field->type == FieldType::real ||
                      field->type == FieldType::flag ||
                      (field->type == FieldType::duration && value.find_first_not_of("0123456789.") == value.npos);
  const bool in_quotes = !value.empty() && (value.front() == '"' || value.front() == '\'');
  toml::table table;
  try {
    table = toml::parse(fmt::format("v = {}", number || in_quotes ? value : quoted(value)));
  } catch (const toml::parse_error&) {
    // Not TOML: shown as the text that it is.
  }
  const toml::node* node = table.get("v");
  const toml::value<std::string> as_text(value);
  try {
    assign(loaded.config, *field, node != nullptr && table.size() == 1 ? *node : as_text);
  } catch (const ConfigError& error) {
    throw ConfigError("--set {}: {}", text, error.what());
  }
  loaded.given[key] = where;
}

/// Whoever asked for layout independence has not asked for a default that it cannot have.
void choose_reduction(RunConfig& config, const std::map<std::string, std::string>& given) {
  if (config.run.deterministic == Determinism::layout_independent && !given.contains("parallel.reduction")) {
    config.parallel.reduction = Reduction::blocking;
  }
}

/// A key of another kind of model or attention would be read and then mean nothing.
void refuse_keys_of_other_kinds(const LoadedConfig& loaded) {
  for (const Field& field : config_fields()) {
    const auto given = loaded.given.find(field.key);
    if (given == loaded.given.end() || field.belongs_to(loaded.config)) continue;
    throw ConfigError("{}: {} is a key of {} = \"{}\", and {} is \"{}\"; remove the one or change the other",
                      given->second, field.key, field.owner, fmt::join(field.owners, "\" or \""), field.owner,
                      std::get<std::string>(find_field(field.owner)->get(loaded.config)));
  }
}

/// Runs `check` and puts the place of the key that its complaint begins with before the complaint.
void with_place(const LoadedConfig& loaded, const std::string& source, const std::function<void()>& check) {
  try {
    check();
  } catch (const ConfigError& error) {
    const std::string what = error.what();
    const std::string key = what.substr(0, what.find_first_of(" :"));
    const auto given = loaded.given.find(key);
    throw ConfigError("{}: {}", given != loaded.given.end() ? given->second : source, what);
  }
}

}  // namespace

LoadedConfig parse_config(std::string_view text, const std::string& source, const std::vector<std::string>& overrides) {
  const toml::table document = parse_toml(text, source);
  std::vector<Entry> entries;
  collect(document, "", entries);
  // The first mistake of the file is the one reported.
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::pair(a.key_position.line, a.key_position.column) <
           std::pair(b.key_position.line, b.key_position.column);
  });
  LoadedConfig loaded;
  for (const Entry& entry : entries) {
    const Field* field = find_field(entry.key);
    if (field == nullptr) throw_unknown(place(source, entry.key_position), entry.key);
    const std::string where = place(source, entry.node->source().begin);
    try {
      assign(loaded.config, *field, *entry.node);
    } catch (const ConfigError& error) {
      throw ConfigError("{}: {}", where, error.what());
    }
    loaded.given[entry.key] = where;
  }
  for (const std::string& override_text : overrides) apply_override(override_text, loaded);

  for (const Field& field : config_fields()) {
    if (field.in_range && !field.in_range(field.get(loaded.config))) {
      throw ConfigError("{}: {} is missing: {}", source, field.key, field.doc);
    }
  }
  choose_reduction(loaded.config, loaded.given);
  with_place(loaded, source, [&] { validate(loaded.config); });
  refuse_keys_of_other_kinds(loaded);
  return loaded;
}

LoadedConfig load_config(const std::string& path, const std::vector<std::string>& overrides) {
  return parse_config(small_file(path), path, overrides);
}

std::string to_toml(const RunConfig& config) {
  std::string out;
  std::string section;
  for (const Field& field : config_fields()) {
    if (!field.belongs_to(config)) continue;
    const std::size_t dot = field.key.rfind('.');
    if (field.key.substr(0, dot) != section) {
      section = field.key.substr(0, dot);
      out += fmt::format("{}[{}]\n", out.empty() ? "" : "\n", section);
    }
    out += fmt::format("{} = {}\n", field.key.substr(dot + 1), value_text(field.get(config)));
  }
  return out;
}

std::vector<std::string> diff(const RunConfig& before, const RunConfig& after) {
  std::vector<std::string> out;
  for (const Field& field : config_fields()) {
    if (!field.belongs_to(before) && !field.belongs_to(after)) continue;
    const std::string a = value_text(field.get(before));
    const std::string b = value_text(field.get(after));
    if (a != b) out.push_back(fmt::format("{}: {} -> {}", field.key, a, b));
  }
  return out;
}

RunConfig resumed(const RunConfig& stored, const LoadedConfig& asked) {
  RunConfig result = asked.config;
  result.model = stored.model;
  if (!asked.given.contains("run.deterministic")) result.run.deterministic = stored.run.deterministic;
  const bool same_shards = stored.run.deterministic == Determinism::layout_independent &&
                           result.run.deterministic == Determinism::layout_independent;
  for (const Field& field : config_fields()) {
    const auto given = asked.given.find(field.key);
    const bool fixed = field.key.starts_with("model.") || (same_shards && field.key.starts_with("parallel.virtual_"));
    if (!fixed || given == asked.given.end()) continue;
    const std::string truth = value_text(field.get(stored));
    const std::string wish = value_text(field.get(asked.config));
    if (wish == truth || (field.key == "model.vocab" && asked.config.model.vocab == 0)) continue;
    if (!field.key.starts_with("model.")) {
      throw ConfigError(
          "{}: {} = {} contradicts the checkpoint, which has {} virtual shards; remove the key, or give up the same "
          "bits with run.deterministic = \"same_layout\"",
          given->second, field.key, wish, truth);
    }
    throw ConfigError(
        "{}: {} = {} contradicts the checkpoint, which has {}; remove the key, or start a new run in "
        "another run.dir (tf_expand makes a model larger)",
        given->second, field.key, wish, truth);
  }
  if (same_shards) {
    result.parallel.virtual_dp = stored.parallel.virtual_dp;
    result.parallel.virtual_tp = stored.parallel.virtual_tp;
  }
  choose_reduction(result, asked.given);
  with_place(asked, "resume", [&] { validate(result); });
  return result;
}

void adopt_vocab(RunConfig& config, std::int64_t dataset_vocab, const std::string& dataset_path) {
  if (config.model.vocab != 0 && config.model.vocab != dataset_vocab) {
    throw ConfigError(
        "model.vocab = {}, but the dataset {} has a vocabulary of {}; remove the key, or use the "
        "dataset that the model was made for",
        config.model.vocab, dataset_path, dataset_vocab);
  }
  config.model.vocab = dataset_vocab;
}

double parse_duration(std::string_view text) {
  const auto fail = [&]() -> double {
    throw ConfigError("\"{}\" is no duration: want seconds, or hours, minutes and seconds like \"1h30m\"", text);
  };
  double total = 0;
  double last_unit = std::numeric_limits<double>::infinity();
  std::string_view rest = text;
  if (rest.empty()) return fail();
  while (!rest.empty()) {
    double amount = 0;
    const auto [stop, error] =
        std::from_chars(rest.data(), rest.data() + rest.size(), amount, std::chars_format::fixed);
    if (error != std::errc{} || !(amount >= 0) || !std::isfinite(amount)) return fail();
    rest.remove_prefix(static_cast<std::size_t>(stop - rest.data()));
    double unit = 1;
    if (!rest.empty()) {
      switch (rest.front()) {
        case 'd': unit = 86400; break;
        case 'h': unit = 3600; break;
        case 'm': unit = 60; break;
        case 's': unit = 1; break;
        default: return fail();
      }
      rest.remove_prefix(1);
    }
    if (unit >= last_unit) return fail();  // "30m1h" and "1h1h" are slips of the pen
    last_unit = unit;
    total += amount * unit;
  }
  return total;
}

std::string config_reference() {
  std::string out = "| key | type | default | meaning |\n|---|---|---|---|\n";
  const RunConfig defaults;
  for (const Field& field : config_fields()) {
    std::string type;
    for (const std::string& name : field.choices) type += fmt::format("{}{}", type.empty() ? "" : ", ", quoted(name));
    if (type.empty()) type = wanted_kind(field.type);
    const FieldValue value = field.get(defaults);
    const bool required = field.in_range && !field.in_range(value);
    out += fmt::format("| `{}` | {}{}{} | {} | {} |\n", field.key, type, field.want.empty() ? "" : ", ", field.want,
                       required ? "required" : fmt::format("`{}`", value_text(value)), field.doc);
  }
  return out;
}

}  // namespace tforge
