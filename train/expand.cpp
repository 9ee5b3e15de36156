#include "train/expand.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/errors.h"
#include "core/rng.h"
#include "core/version.h"
#include "model/tokenformer.h"
#include "train/run_state.h"

namespace tforge {

namespace {

struct Outputs {
  Tensor logits;
  std::vector<Tensor> blocks;
};

Tensor probe_tokens(Allocator& allocator, const ModelConfig& config, std::int64_t sequences, std::int64_t seq) {
  Tensor tokens = Tensor::empty(allocator, Shape{sequences * seq}, DType::i32, Purpose::activations);
  const Rng rng(0, "probe");
  std::uint64_t i = 0;
  for (std::int32_t& token : tokens.span<std::int32_t>()) {
    token = static_cast<std::int32_t>(rng.below(i++, static_cast<std::uint64_t>(config.vocab)));
  }
  return tokens;
}

/// max |a - b| / max |a|; infinite when anything is not a number.
double relative_change(const Tensor& a, const Tensor& b) {
  double difference = 0, largest = 0;
  with_compute_type("relative_change", a.dtype(), [&](auto zero) {
    const auto x = a.span<decltype(zero)>(), y = b.span<decltype(zero)>();
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double d = std::abs(static_cast<double>(x[i]) - static_cast<double>(y[i]));
      difference = d <= difference ? difference : d;
      largest = std::max(largest, std::abs(static_cast<double>(x[i])));
    }
  });
  return std::isnan(difference) ? std::numeric_limits<double>::infinity() : difference / std::max(largest, 1e-300);
}

Outputs run_probe(LanguageModel& model, Allocator& allocator, Stream& stream, const Tensor& tokens,
                  std::int64_t sequences) {
  Tape tape(allocator, stream, TapeMode::inference);
  Outputs outputs;
  outputs.logits = model.logits(tape, tokens, sequences, &outputs.blocks);
  return outputs;
}

Tensor copied(const Tensor& tensor, Allocator& allocator) {
  Tensor copy = Tensor::empty(allocator, tensor.shape(), tensor.dtype(), Purpose::activations);
  with_compute_type("copied", tensor.dtype(), [&](auto zero) {
    using T = decltype(zero);
    std::ranges::copy(tensor.span<T>(), copy.span<T>().begin());
  });
  return copy;
}

/// The whole old tensor: a growth rule may read any row of it.
Tensor whole_tensor(const CheckpointReader& reader, const std::string& path, Allocator& allocator, DType dtype,
                    Purpose purpose) {
  const CheckpointReader::Tensor& stored_tensor = reader.tensor(path);
  Tensor tensor = Tensor::empty(allocator, stored_tensor.shape, dtype, purpose);
  reader.read_rows(path, 0, stored_tensor.shape.rows(), dtype, tensor.view().data);
  return tensor;
}

/// "model/layers.0.ffn.keys" and so on of one parameter: where it belongs.
struct Role {
  std::int64_t layer;
  TokenGroup group;
  bool is_keys;
};

/// The role of every parameter that holds tokens, in the order of the model's parameters (nothing for the others).
std::vector<std::optional<Role>> roles_of(const TokenFormer& model) {
  std::vector<std::optional<Role>> roles;
  for (const Parameter& p : model.parameters().all()) {
    std::optional<Role> role;
    for (std::int64_t layer = 0; layer < model.config().layers && !role; ++layer) {
      for (const TokenGroup group : kTokenGroups) {
        const std::string path = TokenFormer::layer_path(layer, group);
        if (p.path() == path + ".keys") role = Role{layer, group, true};
        if (p.path() == path + ".values") role = Role{layer, group, false};
      }
    }
    roles.push_back(role);
  }
  return roles;
}

ModelConfig grown_config(const ModelConfig& old, const ExpandRequest& request) {
  ModelConfig grown = old;
  bool grows = false;
  for (const TokenGroup group : kTokenGroups) {
    const auto g = static_cast<std::size_t>(group);
    const std::int64_t wanted = request.tokens[g];
    if (wanted == 0) continue;
    if (wanted < old.tokens[g]) {
      throw UsageError("{} has {} {} tokens a layer and cannot shrink to {}; ask for more than {}", request.checkpoint,
                       old.tokens[g], name_of(group), wanted, old.tokens[g]);
    }
    grows = grows || wanted > old.tokens[g];
    grown.tokens[g] = wanted;
  }
  if (!grows)
    throw UsageError("nothing grows: ask for more tokens than {} has in at least one group", request.checkpoint);
  return grown;
}

}  // namespace

ExpandResult expand_checkpoint(Communicator& world, const ExpandRequest& request) {
  set_phase("expansion");
  const CheckpointReader reader = CheckpointReader::open(world, request.checkpoint);
  RunConfig config = parse_config(reader.config(), request.checkpoint).config;
  const ModelConfig old_config = config.model;
  if (old_config.kind != "tokenformer") {
    throw UsageError("{} holds a model of kind {}; only a tokenformer has parameter tokens to add to",
                     request.checkpoint, old_config.kind);
  }
  config.model = grown_config(old_config, request);
  const DType dtype = config.train.dtype;

  GrowthPlan plan;
  plan.rule = request.rule;
  plan.seed = request.seed;
  plan.noise = request.noise;
  plan.norm = config.model.norm;
  plan.key_deviation = TokenFormer::key_deviation();
  plan.value_deviation = TokenFormer::value_deviation(config.model);
  check_growth(plan);

  Allocator allocator;
  Stream stream;
  Mesh mesh = Mesh::create(world, 1, world.size());
  const std::int64_t seq = std::min<std::int64_t>(config.model.max_seq, 128);
  const Tensor tokens = probe_tokens(allocator, config.model, request.probe_sequences, seq);

  ExpandResult result;
  result.tokens_before = old_config.tokens;
  result.tokens_after = config.model.tokens;
  result.parameters_before = old_config.parameters();
  result.parameters_after = config.model.parameters();

  Outputs before;
  std::vector<std::array<double, 5>> old_scales(static_cast<std::size_t>(old_config.layers));
  {
    Allocator memory_of_old;  // given back before the grown model takes any
    const ShardPlan old_shards = ShardPlan::even(old_config, mesh.tp);
    TokenFormer old({memory_of_old, stream, old_config, dtype, *mesh.tp_comm, old_shards});
    load_parameters(reader, old);
    const Outputs outputs = run_probe(old, memory_of_old, stream, tokens, request.probe_sequences);
    before.logits = copied(outputs.logits, allocator);
    for (const Tensor& block : outputs.blocks) before.blocks.push_back(copied(block, allocator));
    for (std::int64_t layer = 0; layer < old_config.layers; ++layer) {
      for (const TokenGroup group : kTokenGroups) {
        old_scales[static_cast<std::size_t>(layer)][static_cast<std::size_t>(group)] = old.scale(layer, group);
      }
    }
  }
  const ShardPlan shards = ShardPlan::even(config.model, mesh.tp);
  TokenFormer grown({allocator, stream, config.model, dtype, *mesh.tp_comm, shards});
  AdamW optimizer(allocator, grown.parameters());
  std::array<double, 5> scale_before{}, scale_after{};
  for (std::int64_t layer = 0; layer < old_config.layers; ++layer) {
    for (const TokenGroup group : kTokenGroups) {
      const auto g = static_cast<std::size_t>(group);
      const double scale = scale_before[g] = old_scales[static_cast<std::size_t>(layer)][g];
      const bool grows = result.tokens_after[g] > result.tokens_before[g];
      scale_after[g] = grows ? grown_scale(plan, scale, result.tokens_before[g], result.tokens_after[g]) : scale;
      grown.set_scale(layer, group, scale_after[g]);
    }
  }

  const std::vector<GrowthRecord>& history = reader.growth_history();
  const std::int64_t stage = stage_of(history) + 1;
  const std::vector<std::optional<Role>> roles = roles_of(grown);
  std::size_t i = 0;
  for (Parameter& p : grown.parameters().all()) {
    AdamW::State& state = optimizer.state(i);
    const std::optional<Role>& role = roles[i++];
    const std::string model_path = "model/" + p.path();
    const Tensor old = whole_tensor(reader, model_path, allocator, dtype, Purpose::weights);
    const std::int64_t old_rows = old.shape().rank() == 1 ? old.shape()[0] : old.shape().rows();
    const bool grows = role && p.spec.shape[0] > old_rows;
    Tensor value = p.value();
    if (grows) {
      const std::string path = TokenFormer::layer_path(role->layer, role->group);
      (role->is_keys ? grown_keys : grown_values)(stream, plan, path, old.view(), p.first_row, value.view());
    } else {
      const Tensor mine = old.rows(p.first_row, p.rows);
      with_compute_type("expand", dtype, [&](auto zero) {
        using T = decltype(zero);
        std::ranges::copy(mine.span<T>(), value.span<T>().begin());
      });
    }
    const std::int64_t kept = std::clamp<std::int64_t>(old_rows - p.first_row, 0, p.rows);
    for (const auto& [name, moment] : {std::pair{"/m", &state.m}, std::pair{"/v", &state.v}}) {
      const bool vector = p.spec.shape.rank() == 1;
      if (kept == 0) continue;
      reader.read_rows("optim/" + p.path() + name, vector ? 0 : p.first_row, vector ? 1 : kept, dtype,
                       moment->view().data);
    }
    const CheckpointReader::Tensor& stored_m = reader.tensor("optim/" + p.path() + "/m");
    const auto found = stored_m.attributes.find("age_segments");
    const auto* numbers =
        found == stored_m.attributes.end() ? nullptr : std::get_if<std::vector<std::int64_t>>(&found->second);
    if (numbers == nullptr) throw CheckpointError("{}: {} lacks 'age_segments'", request.checkpoint, stored_m.path);
    state.segments = segments_from(*numbers, old_rows, stored_m.path);
    if (grows) state.segments.push_back({old_rows, 0, stage});
  }

  const Outputs after = run_probe(grown, allocator, stream, tokens, request.probe_sequences);
  result.probe_change = relative_change(before.logits, after.logits);
  result.max_change = std::numeric_limits<double>::infinity();
  if (request.rule == GrowthRule::zero_key && request.noise == 0) {
    result.max_change = request.max_change > 0 ? request.max_change : dtype == DType::f64 ? 1e-12 : 1e-5;
    if (!(result.probe_change <= result.max_change)) {
      std::size_t worst = 0;
      std::vector<double> changes;
      for (std::size_t b = 0; b < before.blocks.size(); ++b) {
        changes.push_back(relative_change(before.blocks[b], after.blocks[b]));
        if (changes[b] > changes[worst]) worst = b;
      }
      throw UsageError(
          "zero-key growth changed the probe's logits by {:.3g} of their largest, more than the bound {:.3g}; "
          "layer {} changed most ({:.3g}); nothing was written",
          result.probe_change, result.max_change, worst, changes[worst]);
    }
  }

  RunState state = load_state(reader);
  SaveInfo info{config, reader.tokenizer(), history, reader.info().uuid, Retention::stage_end};
  for (const TokenGroup group : kTokenGroups) {
    const auto g = static_cast<std::size_t>(group);
    if (result.tokens_after[g] == result.tokens_before[g]) continue;
    GrowthRecord record;
    record.stage = stage;
    record.step = state.step;
    record.tokens = state.tokens;
    record.layer_group = name_of(group);
    record.tokens_before = result.tokens_before[g];
    record.tokens_after = result.tokens_after[g];
    record.rule = name_of(request.rule);
    record.seed = request.seed;
    record.scale_before = scale_before[g];
    record.scale_after = scale_after[g];
    record.parent_uuid = reader.info().uuid;
    record.parent_digest = reader.info().digest;
    record.probe_error = result.probe_change;
    record.layout = fmt::format("1x{}", world.size());
    record.code_version = version_text();
    record.created = timestamp();
    if (request.noise > 0) record.extra["noise"] = request.noise;
    info.history.push_back(std::move(record));
  }
  CheckpointContents contents = contents_of(grown, optimizer, state, info, mesh);
  // The parent's shards: with parallel.token_shards = "append" its ranks keep their rows when training goes on.
  const std::vector<ShardBorders> old_borders = stored_borders(reader);
  std::size_t parameter = 0;
  for (const Parameter& p : grown.parameters().all()) {
    const std::optional<Role>& role = roles[parameter++];
    if (!role) continue;
    for (CheckpointTensor& tensor : contents.tensors) {
      if (tensor.path == "model/" + p.path()) {
        tensor.attributes["shard_borders"] = old_borders[static_cast<std::size_t>(role->group)].borders;
      }
    }
  }
  save_checkpoint(world, request.output, contents);
  return result;
}

}  // namespace tforge
