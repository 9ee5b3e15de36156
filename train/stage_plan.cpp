#include "train/stage_plan.h"

#include <filesystem>

#include "data/token_dataset.h"
#include "model/models.h"
#include "train/toml_table.h"

namespace tforge {

namespace {

/// ranks, or nodes * ranks_per_node.
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

/// { ffn = 768, attention.tables = 80 } by tf_expand's names; TOML reads the second as a table in a table.
void add_counts(const toml::table& table, const std::string& prefix, const std::string& where,
                std::map<std::string, std::int64_t>& counts) {
  for (auto&& [key, node] : table) {
    const std::string name = prefix + std::string(key.str());
    if (const toml::table* inner = node.as_table()) {
      add_counts(*inner, name + ".", where, counts);
      continue;
    }
    const std::optional<std::int64_t> count = node.value_exact<std::int64_t>();
    if (!count) throw ConfigError("{}: grow: {}: want an integer", where, name);
    counts[name] = *count;
  }
}

/// `model` as the growth at the beginning of a stage makes it; as it is without one.
ModelConfig grown(const ModelConfig& model, const TomlTable& stage, const std::string& where) {
  const toml::table* grow = stage.table("grow");
  if (grow == nullptr) return model;
  GrowthRequest request;
  request.model = "the model";
  add_counts(*grow, "", where, request.counts);
  if (const auto rule = stage.text("rule")) request.rule = *rule;
  if (const auto noise = stage.number("noise")) request.noise = *noise;
  try {
    return kind_of(model).growth(model, request)->grown();
  } catch (const Error& error) {
    throw ConfigError("{}: {}", where, error.what());
  }
}

}  // namespace

void take_vocab(RunConfig& config) {
  std::error_code ignored;
  if (std::filesystem::exists(config.data.path, ignored)) {
    const TokenDataset dataset(config.data.path);
    return adopt_vocab(config, dataset.vocab(), dataset.path());
  }
  if (config.model.vocab == 0) {
    throw ConfigError("data.path = \"{}\" is not there, so model.vocab has to be given: --set model.vocab=N",
                      config.data.path);
  }
}

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

  const toml::node* node_of_stages = document.get("stage");
  const toml::array* tables = node_of_stages == nullptr ? nullptr : node_of_stages->as_array();
  if (tables == nullptr || tables->empty()) throw ConfigError("{}: there is no [[stage]]", path);
  std::vector<PlannedStage> stages;
  std::vector<std::string> settings = chain.texts("set");
  for (const toml::node& node : *tables) {
    const bool first = stages.empty();
    const std::string where = fmt::format("{}: stage {}", path, stages.size() + 1);
    if (!node.is_table()) throw ConfigError("{}: want a table", where);
    const TomlTable stage(*node.as_table(), where,
                          {"tokens", "grow", "set", "rule", "seed", "noise", "max_change", "probe", "ranks", "nodes",
                           "ranks_per_node", "cpus_per_rank", "gpus_per_rank", "time", "options"});
    PlannedStage planned;
    planned.tokens = stage.need(stage.integer("tokens"), "tokens");
    if (planned.tokens < 1) throw ConfigError("{}: tokens = {}: want 1 or more", where, planned.tokens);
    planned.ranks = ranks_of(stage, where);
    if (first && stage.table("grow") != nullptr) {
      throw ConfigError("{}: grow: there is no model yet; [chain] config and set say what the first stage trains",
                        where);
    }
    std::vector<std::string> all = settings;
    for (const std::string& own : stage.texts("set")) {
      all.push_back(own);
      // What the first stage's model is, all are grown from.
      if (first && own.starts_with("model.")) settings.push_back(own);
    }
    all.insert(all.end(), fixed.begin(), fixed.end());
    try {
      planned.config = load_config(config, all).config;
      take_vocab(planned.config);
    } catch (const ConfigError& error) {
      throw ConfigError("{}: {}", where, error.what());
    }
    if (!first) planned.config.model = grown(stages.back().config.model, stage, where);
    stages.push_back(std::move(planned));
  }
  return stages;
}

}  // namespace tforge
