#include "train/expand.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "checkpoint/manifest.h"
#include "core/errors.h"
#include "core/rng.h"
#include "core/version.h"
#include "model/models.h"
#include "storage/atomic_file.h"
#include "train/config_schema.h"
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

/// max |a - b| / max |a|; infinite when anything is not a number. Where b has become wider, of a's columns.
double relative_change(const Tensor& a, const Tensor& b) {
  double difference = 0, largest = 0;
  with_compute_type("relative_change", a.dtype(), [&](auto zero) {
    const auto x = a.span<decltype(zero)>(), y = b.span<decltype(zero)>();
    const auto columns = static_cast<std::size_t>(a.shape().columns()), step = y.size() / (x.size() / columns);
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double was = static_cast<double>(x[i]);
      const double d = std::abs(was - static_cast<double>(y[i / columns * step + i % columns]));
      difference = d <= difference ? difference : d;
      largest = std::max(largest, std::abs(was));
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

/// The whole old tensor, as a matrix; of no rows when there was none. A growth rule may read any row of it.
Tensor old_values(const CheckpointReader& reader, const ParameterSpec& spec, Allocator& allocator, DType dtype) {
  const CheckpointReader::Tensor* old = reader.find("model/" + spec.path);
  if (old == nullptr) return Tensor::empty(allocator, Shape{0, spec.shape.columns()}, dtype, Purpose::weights);
  Tensor tensor = Tensor::empty(allocator, old->shape, dtype, Purpose::weights);
  reader.read_rows(old->path, 0, old->shape.rows(), dtype, tensor.view().data);
  return tensor;
}

/// Moments and ages of what this rank holds of a parameter that had `old_rows` rows.
void grow_moments(const CheckpointReader& reader, const Growth& growth, const Parameter& p, std::int64_t old_rows,
                  std::int64_t stage, Allocator& allocator, AdamW::State& state) {
  if (old_rows == 0) {
    state.segments = {{0, 0, stage}};
    return;
  }
  const std::int64_t copies = growth.rows_of_one(p.spec), now_rows = old_rows * copies;
  const std::int64_t kept = std::clamp<std::int64_t>(now_rows - p.first_row, 0, p.rows);
  for (const Moment moment : {Moment::first, Moment::second}) {
    const std::string path = "optim/" + p.path() + (moment == Moment::first ? "/m" : "/v");
    const Shape& stored_shape = reader.tensor(path).shape;
    const bool vector = stored_shape.rank() == 1;
    if (kept == 0) continue;
    Tensor old = Tensor::empty(allocator, vector ? stored_shape : Shape{kept / copies, stored_shape.columns()},
                               state.m.dtype(), Purpose::moments);
    reader.read_rows(path, vector ? 0 : p.first_row / copies, vector ? 1 : kept / copies, old.dtype(), old.view().data);
    Tensor& now = moment == Moment::first ? state.m : state.v;
    growth.fill_moment(moment, p.spec, as_matrix(static_cast<const Tensor&>(old).view()), p.first_row,
                       as_matrix(now.view()).row_range(0, kept));
  }
  state.segments = stored_ages(reader, p.path(), old_rows);
  for (AgeSegment& segment : state.segments) segment.first_row *= copies;
  if (p.spec.shape[0] > now_rows) state.segments.push_back({now_rows, 0, stage});
}

/// Throws UsageError, naming the block that changed most, when an exact growth was none.
void check_change(const ExpandResult& result, const std::string& rule, const Outputs& before, const Outputs& after) {
  if (result.probe_change <= result.max_change) return;
  std::size_t worst = 0;
  std::vector<double> changes;
  for (std::size_t b = 0; b < before.blocks.size(); ++b) {
    changes.push_back(relative_change(before.blocks[b], after.blocks[b]));
    if (changes[b] > changes[worst]) worst = b;
  }
  throw UsageError(
      "{} growth changed the probe's logits by {:.3g} of their largest, more than the bound {:.3g}; layer {} changed "
      "most ({:.3g}); nothing was written",
      rule, result.probe_change, result.max_change, worst, changes[worst]);
}

/// The value of a number of the state, 0 when there is none.
double value_in(const std::vector<StateNumber>& numbers, const std::string& parameter) {
  for (const StateNumber& number : numbers) {
    if (number.parameter == parameter) return number.value;
  }
  return 0;
}

}  // namespace

ExpandResult expand_checkpoint(Communicator& world, const ExpandRequest& request) {
  set_phase("expansion");
  const CheckpointReader reader = CheckpointReader::open(world, request.checkpoint);
  RunConfig config = stored_config(reader);
  const ModelConfig old_config = config.model;
  GrowthRequest wanted = request.growth;
  wanted.model = request.checkpoint;
  const std::unique_ptr<Growth> growth = kind_of(old_config).growth(old_config, wanted);
  config.model = growth->grown();
  const DType dtype = compute_dtype(config.train.dtype);  // of what is stored

  Allocator allocator;
  Stream stream;
  Mesh mesh = Mesh::create(world, 1, world.size());
  const std::int64_t seq = std::min<std::int64_t>(config.model.max_seq, 128);
  const Tensor tokens = probe_tokens(allocator, config.model, request.probe_sequences, seq);

  ExpandResult result;
  result.groups = growth->groups();
  result.parameters_before = old_config.parameters();
  result.parameters_after = config.model.parameters();

  Outputs before;
  std::vector<StateNumber> old_numbers;
  std::vector<StatePermutations> old_permutations;
  {
    Allocator memory_of_old;  // given back before the grown model takes any
    const std::unique_ptr<LanguageModel> old =
        make_model(memory_of_old, stream, old_config, dtype, *mesh.tp_comm, ShardPlan::even(old_config, mesh.tp));
    load_parameters(reader, *old);
    const Outputs outputs = run_probe(*old, memory_of_old, stream, tokens, request.probe_sequences);
    before.logits = copied(outputs.logits, allocator);
    for (const Tensor& block : outputs.blocks) before.blocks.push_back(copied(block, allocator));
    old_numbers = old->state_numbers();
    old_permutations.assign(old->state_permutations().begin(), old->state_permutations().end());
  }
  const std::unique_ptr<LanguageModel> grown =
      make_model(allocator, stream, config.model, dtype, *mesh.tp_comm, ShardPlan::even(config.model, mesh.tp));
  AdamW optimizer(allocator, grown->parameters());
  for (StateNumber number : old_numbers) {
    number.value = growth->state_number(number);
    grown->set_state_number(number);
  }
  for (const StatePermutations& old : old_permutations) grown->set_state_permutations(old);

  const std::vector<GrowthRecord>& history = reader.growth_history();
  const std::int64_t stage = stage_of(history) + 1;
  std::size_t i = 0;
  for (Parameter& p : grown->parameters().all()) {
    const Tensor old = old_values(reader, p.spec, allocator, dtype);
    const std::int64_t old_rows = old.shape()[0];
    growth->fill(stream, p.spec, as_matrix(old.view()), p.first_row, as_matrix(p.value().view()));
    grow_moments(reader, *growth, p, old_rows, stage, allocator, optimizer.state(i++));
  }

  const Outputs after = run_probe(*grown, allocator, stream, tokens, request.probe_sequences);
  result.probe_change = relative_change(before.logits, after.logits);
  result.max_change = std::numeric_limits<double>::infinity();
  if (growth->exact()) {
    result.max_change = request.max_change > 0 ? request.max_change : dtype == DType::f64 ? 1e-12 : 1e-5;
    check_change(result, result.groups[0].rule, before, after);
  }

  RunState state = load_state(reader);
  SaveInfo info{config, reader.tokenizer(), history, reader.info().uuid, Retention::stage_end};
  for (const GrowthGroup& group : result.groups) {
    if (group.after == group.before) continue;
    GrowthRecord record;
    record.stage = stage;
    record.step = state.step;
    record.tokens = state.tokens;
    record.layer_group = group.name;
    record.tokens_before = group.before;
    record.tokens_after = group.after;
    record.rule = group.rule;
    record.seed = wanted.seed;
    record.scale_before = value_in(old_numbers, group.parameter);
    record.scale_after = value_in(grown->state_numbers(), group.parameter);
    record.parent_uuid = reader.info().uuid;
    record.parent_digest = reader.info().digest;
    record.probe_error = result.probe_change;
    record.layout = fmt::format("1x{}", world.size());
    record.code_version = version_text();
    record.created = timestamp();
    if (wanted.noise > 0) record.extra["noise"] = wanted.noise;
    info.history.push_back(std::move(record));
  }
  CheckpointContents contents = contents_of(*grown, optimizer, state, info, mesh);
  // The parent's shards: with parallel.token_shards = "append" its ranks keep their rows when training goes on.
  const std::vector<ShardBorders> old_borders = stored_borders(reader);
  const std::vector<ShardAxis> axes = kind_of(config.model).axes(config.model);
  for (const Parameter& p : grown->parameters().all()) {
    if (!p.spec.axis) continue;
    std::vector<std::int64_t> rows = old_borders[*p.spec.axis].borders;
    for (std::int64_t& row : rows) row *= axes[*p.spec.axis].rows;
    for (CheckpointTensor& tensor : contents.tensors) {
      if (tensor.path == "model/" + p.path()) tensor.attributes["shard_borders"] = rows;
    }
  }
  if (world.rank() == 0) {
    for (const std::string& file : {request.output, manifest_path(request.output)}) remove_temporaries_of(file);
  }
  save_checkpoint(world, request.output, contents);
  return result;
}

std::string growth_text(const std::vector<GrowthGroup>& groups, std::int64_t parameters_before,
                        std::int64_t parameters_after) {
  std::string text;
  for (const GrowthGroup& group : groups) {
    text += fmt::format("{:<6} {:>6} -> {:>6} {}\n", group.name, group.before, group.after, group.unit);
  }
  return text + fmt::format("parameters {} -> {}\n", parameters_before, parameters_after);
}

std::string planned_growth_text(const RunConfig& config, const GrowthRequest& request) {
  const std::unique_ptr<Growth> growth = kind_of(config.model).growth(config.model, request);
  RunConfig grown = config;
  grown.model = growth->grown();
  validate(grown);
  std::string text = growth_text(growth->groups(), config.model.parameters(), grown.model.parameters());
  for (const std::string& change : diff(config, grown)) text += change + "\n";
  return text;
}

}  // namespace tforge
