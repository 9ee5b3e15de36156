#include "train/stage_plan.h"

#include <filesystem>
#include <map>

#include "train/toml_table.h"

namespace tforge {

namespace {

/// ranks, or nodes * ranks_per_node, or nodes.
std::int64_t ranks_of(const TomlTable& stage, const std::string& where) {
  const auto ranks = stage.integer("ranks"), nodes = stage.integer("nodes"), each = stage.integer("ranks_per_node");
  for (const auto& count : {ranks, nodes, each}) {
    if (count && (*count < 1 || *count > 1'000'000)) {
      throw ConfigError("{}: {} ranks or nodes: want 1 to 1000000", where, *count);
    }
  }
  if (ranks) return *ranks;
  if (nodes && each) return *nodes * *each;
  throw ConfigError("{}: ranks is missing; give ranks, or nodes and ranks_per_node", where);
}

}  // namespace

std::vector<PlannedStage> load_stages(const std::string& path) {
  const toml::table document = parse_toml(small_file(path), path);
  const TomlTable file(document, path, {"chain", "slurm", "stage", "expand", "eval"});
  const toml::table* section = file.table("chain");
  if (section == nullptr) throw ConfigError("{}: there is no [chain]", path);
  const TomlTable chain(*section, path + ": [chain]", {"name", "dir", "config", "data", "set"});
  const auto beside = [&](const char* key) {
    return (std::filesystem::path(path).parent_path() / chain.need(chain.text(key), key)).lexically_normal().string();
  };
  const std::string config = beside("config");
  const std::vector<std::string> fixed = {"data.path=" + beside("data"), "run.dir=" + beside("dir")};

  const toml::array* tables = document.get("stage") == nullptr ? nullptr : document.get("stage")->as_array();
  if (tables == nullptr || tables->empty()) throw ConfigError("{}: there is no [[stage]]", path);
  std::vector<PlannedStage> stages;
  std::map<std::string, std::int64_t> counts;  // parameter tokens that a stage has said, for it and those after it
  for (const toml::node& node : *tables) {
    const std::string where = fmt::format("{}: stage {}", path, stages.size() + 1);
    if (!node.is_table()) throw ConfigError("{}: want a table", where);
    const TomlTable stage(*node.as_table(), where,
                          {"tokens", "parameter_tokens", "set", "rule", "seed", "noise", "max_change", "ranks", "nodes",
                           "ranks_per_node", "cpus_per_rank", "gpus_per_rank", "time", "options"});
    PlannedStage planned;
    planned.tokens = stage.need(stage.integer("tokens"), "tokens");
    if (planned.tokens < 1) throw ConfigError("{}: tokens = {}: want 1 or more", where, planned.tokens);
    planned.ranks = ranks_of(stage, where);
    if (const toml::table* grown = stage.table("parameter_tokens")) {
      const TomlTable groups(*grown, where + ": parameter_tokens", {"query", "key", "value", "proj", "ffn"});
      for (auto&& [key, count] : *grown) {
        std::int64_t& held = counts[std::string(key.str())];
        const std::int64_t more = *groups.integer(key.str());
        if (more < held)
          throw ConfigError("{}: {} shrinks from {} to {}; models only grow", where, key.str(), held, more);
        held = more;
      }
    }
    std::vector<std::string> settings = chain.texts("set");
    const std::vector<std::string> own = stage.texts("set");
    settings.insert(settings.end(), own.begin(), own.end());
    for (const auto& [group, count] : counts) settings.push_back(fmt::format("model.tokens.{}={}", group, count));
    settings.insert(settings.end(), fixed.begin(), fixed.end());
    try {
      planned.config = load_config(config, settings).config;
    } catch (const ConfigError& error) {
      throw ConfigError("{}: {}", where, error.what());
    }
    stages.push_back(std::move(planned));
  }
  return stages;
}

}  // namespace tforge
