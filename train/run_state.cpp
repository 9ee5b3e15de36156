#include "train/run_state.h"

#include <algorithm>

#include "core/errors.h"
#include "core/version.h"
#include "model/models.h"

namespace tforge {

namespace {

constexpr std::int64_t kMaxCounter = std::int64_t{1} << 62;  // so that a run may go on counting from it

/// Rows of a parameter among those held here, as rows of the checkpoint's tensor.
RowRange stored_range(const Parameter& p, const RowRange& held) {
  if (p.spec.shape.rank() == 1) return {0, held.rows > 0 ? 1 : 0};
  return {p.first_row + held.first, held.rows};
}

/// `tensor` holds the rows `held` of those of the parameter that are here. What every rank of tp holds in full is
/// written by the first of them.
std::vector<RowBlock> blocks_of(const Parameter& p, const RowRange& held, const Tensor& tensor, const Mesh& mesh) {
  if (p.spec.placement == Placement::replicated && mesh.tp_index != 0) return {};
  const RowRange rows = stored_range(p, held);
  return {{rows.first, rows.rows, tensor.view().data, tensor.device()}};
}

void read_into(const CheckpointReader& reader, const std::string& path, const Parameter& p, const RowRange& held,
               Tensor to) {
  const CheckpointReader::Tensor& stored_tensor = reader.tensor(path);
  if (!(stored_tensor.shape == p.spec.shape)) {
    throw CheckpointError("{}: {} has shape {}, the model's configuration says {}", reader.path(), path,
                          stored_tensor.shape.text(), p.spec.shape.text());
  }
  const RowRange rows = stored_range(p, held);
  if (rows.rows == 0) return;
  if (to.device() == Device::cpu) {
    reader.read_rows(path, rows.first, rows.rows, to.dtype(), to.view().data);
    return;
  }
  Allocator host;
  Tensor on_host = Tensor::empty(host, to.shape(), to.dtype(), Purpose::staging);
  reader.read_rows(path, rows.first, rows.rows, to.dtype(), on_host.view().data);
  to.assign(on_host);
}

template <class T>
T attribute_of(const CheckpointReader& reader, const CheckpointReader::Tensor& tensor, const std::string& name) {
  const auto found = tensor.attributes.find(name);
  const T* value = found == tensor.attributes.end() ? nullptr : std::get_if<T>(&found->second);
  if (value == nullptr) {
    throw CheckpointError("{}: {} lacks the attribute '{}'", reader.path(), tensor.path, name);
  }
  return *value;
}

/// Ages as numbers, three a segment: first row, age, stage.
std::vector<std::int64_t> flattened(const std::vector<AgeSegment>& segments) {
  std::vector<std::int64_t> numbers;
  for (const AgeSegment& s : segments) numbers.insert(numbers.end(), {s.first_row, s.age, s.stage});
  return numbers;
}

/// Throws DataError for a row that is no permutation.
void check(const CheckpointReader& reader, const StatePermutations& permutations) {
  for (std::int64_t row = 0; row < permutations.rows(); ++row) {
    std::vector<bool> seen(static_cast<std::size_t>(permutations.columns));
    for (std::int64_t i = 0; i < permutations.columns; ++i) {
      const std::int32_t to = permutations.values[static_cast<std::size_t>(row * permutations.columns + i)];
      const bool inside = to >= 0 && to < permutations.columns;
      if (inside && !seen[static_cast<std::size_t>(to)]) {
        seen[static_cast<std::size_t>(to)] = true;
        continue;
      }
      throw DataError(
          "{}: row {} of {} is no permutation of 0 to {}: {} {}; take another checkpoint, or make this one anew with "
          "tf_expand",
          reader.path(), row, permutations.path, permutations.columns - 1, to,
          inside ? "is there twice" : "is none of them");
    }
  }
}

void load_permutations(const CheckpointReader& reader, LanguageModel& model) {
  for (StatePermutations permutations : model.state_permutations()) {
    // One that was written before they were stored has none: they are those that the model is born with.
    if (reader.find(permutations.path) == nullptr) continue;
    const CheckpointReader::Tensor& stored_tensor = reader.tensor(permutations.path);
    if (stored_tensor.dtype != DType::i32 ||
        !(stored_tensor.shape == Shape{permutations.rows(), permutations.columns})) {
      throw CheckpointError("{}: {} is {} {}, the model's configuration says i32 {}", reader.path(), permutations.path,
                            name_of(stored_tensor.dtype), stored_tensor.shape.text(),
                            Shape{permutations.rows(), permutations.columns}.text());
    }
    reader.read_rows(permutations.path, 0, permutations.rows(), DType::i32, permutations.values.data());
    check(reader, permutations);
    model.set_state_permutations(permutations);
  }
}

}  // namespace

std::int64_t stage_of(const std::vector<GrowthRecord>& history) { return history.empty() ? 0 : history.back().stage; }

StoredTokenizer stored(const Tokenizer& tokenizer) {
  return {std::string(name_of(tokenizer.kind())), tokenizer.fingerprint(), tokenizer.serialized()};
}

Tokenizer restored(const StoredTokenizer& tokenizer, const std::string& checkpoint_path) {
  Tokenizer result =
      Tokenizer::from_serialized(tokenizer_kind_from_name(tokenizer.kind), tokenizer.bytes, checkpoint_path);
  if (result.fingerprint() != tokenizer.fingerprint) {
    throw CheckpointError("{}: the tokenizer is not the one whose fingerprint {} is stored", checkpoint_path,
                          tokenizer.fingerprint);
  }
  return result;
}

std::vector<AgeSegment> stored_ages(const CheckpointReader& reader, const std::string& parameter, std::int64_t rows) {
  const std::string path = "optim/" + parameter;
  const auto numbers = attribute_of<std::vector<std::int64_t>>(reader, reader.tensor(path + "/m"), "age_segments");
  std::vector<AgeSegment> segments;
  for (std::size_t i = 0; i + 2 < numbers.size(); i += 3) {
    segments.push_back({numbers[i], numbers[i + 1], numbers[i + 2]});
  }
  bool valid = !segments.empty() && numbers.size() % 3 == 0 && segments[0].first_row == 0;
  for (std::size_t i = 0; i < segments.size(); ++i) {
    const AgeSegment& s = segments[i];
    valid = valid && s.age >= 0 && s.age <= kMaxCounter && s.stage >= 0 && s.stage <= kMaxCounter && s.first_row >= 0 &&
            s.first_row < rows && (i == 0 || s.first_row > segments[i - 1].first_row);
  }
  if (!valid) throw CheckpointError("the age segments of {} are not those of a parameter of {} rows", path, rows);
  return segments;
}

CheckpointContents contents_of(const LanguageModel& model, const AdamW& optimizer, const RunState& state,
                               const SaveInfo& info, const Mesh& mesh) {
  CheckpointContents contents;
  contents.model_kind = model.config().kind;
  contents.code_version = version_text();
  contents.parent_uuid = info.parent_uuid;
  contents.step = state.step;
  contents.retention = info.retention;
  contents.config = to_toml(info.config);
  contents.tokenizer = info.tokenizer;
  contents.growth_history = info.history;
  contents.state = {{"tokens", state.tokens},
                    {"samples", state.samples},
                    {"schedule_start", state.schedule_start},
                    {"skipped_steps", state.skipped_steps},
                    {"growths_applied", state.growths_applied},
                    {"dataset_fingerprint", state.dataset_fingerprint},
                    {"layout", fmt::format("{}x{}", mesh.dp, mesh.tp)}};
  if (!state.salvaged.empty()) contents.state["salvaged"] = state.salvaged;
  // What every rank of dp has is written by the first of them.
  const bool owns_values = mesh.dp_index == 0;
  const bool owns_moments = owns_values || optimizer.ownership() == Ownership::by_dp_rank;
  std::size_t i = 0;
  for (const Parameter& p : model.parameters().all()) {
    const AdamW::State& moments = optimizer.state(i++);
    CheckpointTensor tensor{"model/" + p.path(), model.dtype(), p.spec.shape, {}, {}};
    if (owns_values) tensor.blocks = blocks_of(p, {0, p.rows}, p.value(), mesh);
    if (p.spec.placement == Placement::sharded) tensor.attributes["shard_borders"] = p.spec.borders.borders;
    contents.tensors.push_back(std::move(tensor));
    for (const auto& [name, values] : {std::pair{"/m", moments.m}, std::pair{"/v", moments.v}}) {
      contents.tensors.push_back({"optim/" + p.path() + name,
                                  model.dtype(),
                                  p.spec.shape,
                                  {},
                                  {{"age_segments", flattened(moments.segments)}}});
      if (owns_moments) contents.tensors.back().blocks = blocks_of(p, moments.owned, values, mesh);
    }
  }
  for (const StateNumber& number : model.state_numbers()) {
    for (CheckpointTensor& tensor : contents.tensors) {
      if (tensor.path == "model/" + number.parameter) tensor.attributes[number.name] = number.value;
    }
  }
  for (const StatePermutations& p : model.state_permutations()) {
    if (p.values.empty()) continue;
    CheckpointTensor tensor{p.path, DType::i32, Shape{p.rows(), p.columns}, {}, {}};
    if (owns_values && mesh.tp_index == 0) tensor.blocks = {{0, p.rows(), p.values.data(), Device::cpu}};
    contents.tensors.push_back(std::move(tensor));
  }
  return contents;
}

RunConfig stored_config(const CheckpointReader& reader) {
  const RunConfig config = parse_config(reader.config(), reader.path()).config;
  std::int64_t numbers = 0;
  for (const CheckpointReader::Tensor& tensor : reader.tensors()) {
    if (tensor.path.starts_with("model/")) numbers += tensor.shape.elements();
  }
  if (numbers != config.model.parameters()) {
    throw CheckpointError("{}: its model has {} numbers, its configuration asks for {}", reader.path(), numbers,
                          config.model.parameters());
  }
  return config;
}

RunState load_state(const CheckpointReader& reader) {
  const Attributes& s = reader.state();
  const auto counter = [&](const char* name) {
    const auto value = state_value<std::int64_t>(s, name);
    if (value < 0 || value > kMaxCounter) throw CheckpointError("{}: {} is {}", reader.path(), name, value);
    return value;
  };
  RunState state;
  state.step = counter("step");
  state.tokens = counter("tokens");
  state.samples = counter("samples");
  state.schedule_start = counter("schedule_start");
  state.skipped_steps = counter("skipped_steps");
  state.growths_applied = counter("growths_applied");
  state.dataset_fingerprint = state_value<std::string>(s, "dataset_fingerprint");
  if (s.contains("salvaged")) state.salvaged = state_value<std::string>(s, "salvaged");
  return state;
}

void load_parameters(const CheckpointReader& reader, LanguageModel& model) {
  for (Parameter& p : model.parameters().all()) {
    read_into(reader, "model/" + p.path(), p, {0, p.rows}, p.value());
  }
  model.values_changed();
  for (StateNumber number : model.state_numbers()) {
    const CheckpointReader::Tensor& tensor = reader.tensor("model/" + number.parameter);
    number.value = attribute_of<double>(reader, tensor, number.name);
    if (!(number.value > 0)) {
      throw CheckpointError("{}: {} has {} {}", reader.path(), tensor.path, number.name, number.value);
    }
    model.set_state_number(number);
  }
  load_permutations(reader, model);
}

void load_optimizer(const CheckpointReader& reader, const LanguageModel& model, AdamW& optimizer) {
  std::size_t i = 0;
  for (const Parameter& p : model.parameters().all()) {
    AdamW::State& state = optimizer.state(i++);
    const std::string path = "optim/" + p.path();
    state.segments = stored_ages(reader, p.path(), p.spec.shape[0]);
    if (std::ranges::binary_search(reader.damaged(), path + "/m") ||
        std::ranges::binary_search(reader.damaged(), path + "/v")) {
      for (AgeSegment& segment : state.segments) segment.age = 0;
      continue;  // a new optimizer's moments are zero
    }
    read_into(reader, path + "/m", p, state.owned, state.m);
    read_into(reader, path + "/v", p, state.owned, state.v);
  }
}

std::vector<ShardBorders> stored_borders(const CheckpointReader& reader) {
  const ModelConfig config = parse_config(reader.config(), reader.path()).config.model;
  std::vector<ShardBorders> borders;
  for (const ShardAxis& axis : kind_of(config).axes(config)) {
    const CheckpointReader::Tensor& tensor = reader.tensor("model/" + axis.parameter);
    ShardBorders& b = borders.emplace_back();
    b.borders = attribute_of<std::vector<std::int64_t>>(reader, tensor, "shard_borders");
    const bool whole = std::ranges::all_of(b.borders, [&](std::int64_t border) { return border % axis.rows == 0; });
    const bool valid = whole && b.borders.size() >= 2 && b.borders.front() == 0 && std::ranges::is_sorted(b.borders) &&
                       b.borders.back() <= tensor.shape[0];
    if (!valid) throw CheckpointError("{}: {} has shard borders that do not fit it", reader.path(), tensor.path);
    for (std::int64_t& border : b.borders) border /= axis.rows;
  }
  return borders;
}

}  // namespace tforge
