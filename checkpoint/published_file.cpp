#include "checkpoint/published_file.h"

#include <charconv>
#include <tuple>
#include <utility>

#include "core/errors.h"

namespace tforge {

PublishedFile::PublishedFile(const std::string& path)
    : file_(Hdf5File::open(path, Hdf5File::Access::read, Hdf5File::Maker::anybody)) {
  const auto extent = [&](const char* name) {
    const auto value = file_.attribute<std::int64_t>("/", name);
    if (value < 1 || value > (std::int64_t{1} << 31)) throw DataError("{}: attribute {} is {}", path, name, value);
    return value;
  };
  batch = extent("batch");
  seq = extent("seq");
  loss = file_.attribute<double>("/", "loss");
  for (const char* name : {"tokens", "labels"}) {
    const DatasetInfo info = file_.info(name);
    if (info.type != StoredType::i32 || static_cast<std::int64_t>(info.elements()) != batch * seq) {
      throw DataError("{}: {} is {}, want i32 [{}, {}]", path, name, info.text(), batch, seq);
    }
  }
  if (file_.has_attribute("/", "config")) {
    config = file_.attribute<std::string>("/", "config");
    return;
  }
  layers = extent("layers");
  dim = extent("hidden");
  heads = extent("heads");
  vocab = extent("vocab");
  rotary_fraction = file_.attribute<double>("/", "rotary_pct");
  rotary_base = file_.attribute<double>("/", "rotary_base");
  if (file_.has_attribute("/", "tau")) {
    kind = PublishedKind::memoryformer;
    hash_bits = extent("tau");
    extra_bits = extent("extra_bits");
    const auto text = [&](const char* name) { return file_.attribute<std::string>("/", name); };
    const std::string weight = text("weight"), norms = text("norm"), order = text("bit_order");
    hash_weight = hash_weight_from_name(weight.substr(0, weight.find(' ')));
    if (norms != "layernorm" && norms != "rmsnorm") throw DataError("{}: attribute norm is '{}'", path, norms);
    stream_norm = norms == "rmsnorm" ? PublishedNorm::rmsnorm : PublishedNorm::layernorm;
    if (order != "msb_first") throw DataError("{}: attribute bit_order is '{}', want msb_first", path, order);
    if (extent("tables") * hash_bits != dim) {
      throw DataError("{}: {} tables of {} bits for {} coordinates", path, extent("tables"), hash_bits, dim);
    }
    return;
  }
  qkv_tokens = extent("qkv_slots");
  proj_tokens = extent("proj_slots");
  ffn_tokens = extent("ffn_slots");
  norm = pattention_norm_from_name(file_.attribute<std::string>("/", "norm_activation"));
  layernorm_eps = file_.attribute<double>("/", "layernorm_eps");
}

std::string PublishedFile::name_of(const std::string& parameter) const {
  if (!config.empty()) return parameter;
  return kind == PublishedKind::memoryformer ? published_memory_name(parameter, stream_norm)
                                             : published_name(parameter, layers);
}

std::vector<double> PublishedFile::tensor(const std::string& path, std::int64_t elements) const {
  if (!file_.is_dataset(path)) throw DataError("{}: there is no dataset {}", file_.file_path(), path);
  const DatasetInfo info = file_.info(path);
  if (static_cast<std::int64_t>(info.elements()) != elements) {
    throw DataError("{}: {} is {}, want {} elements", file_.file_path(), path, info.text(), elements);
  }
  if (info.type == StoredType::f64) return file_.read<double>(path);
  if (info.type == StoredType::f32) {
    const std::vector<float> values = file_.read<float>(path);
    return {values.begin(), values.end()};
  }
  throw DataError("{}: {} is {}, want f32 or f64", file_.file_path(), path, info.text());
}

namespace {

/// "layers.3.ffn.keys" -> 3, "ffn.keys"; -1 for a path outside of the layers.
std::pair<std::int64_t, std::string> in_layer(const std::string& path) {
  constexpr std::string_view prefix = "layers.";
  std::int64_t layer = 0;
  if (!path.starts_with(prefix)) return {-1, path};
  const char* const end = path.data() + path.size();
  const auto [after, error] = std::from_chars(path.data() + prefix.size(), end, layer);
  if (error != std::errc() || after == end || *after != '.') return {-1, path};
  return {layer, std::string(after + 1, end)};
}

}  // namespace

std::string published_name(const std::string& path, std::int64_t layers) {
  if (path == "embedding") return "sequential.0.word_embeddings.weight";
  if (path == "final_norm.weight") return fmt::format("sequential.{}.norm.weight", layers + 3);
  if (path == "final_norm.bias") return fmt::format("sequential.{}.norm.bias", layers + 3);
  if (const auto [layer, rest] = in_layer(path); layer >= 0) {
    const auto dot = rest.rfind('.');
    if (dot != std::string::npos) {
      std::string module = rest.substr(0, dot);
      const std::string role = rest.substr(dot + 1);
      if (module == "ffn") module = "mlp";
      if (role == "keys") return fmt::format("sequential.{}.{}.key_param_tokens", layer + 2, module);
      if (role == "values") return fmt::format("sequential.{}.{}.value_param_tokens", layer + 2, module);
    }
  }
  throw InternalError("the parameter '{}' has no published name", path);
}

std::string published_memory_name(const std::string& path, PublishedNorm norm) {
  const std::string weight = norm == PublishedNorm::rmsnorm ? "scale" : "weight";
  if (path == "embedding" || path == "head" || path == "final_norm.bias") return path;
  if (path == "final_norm.weight") return "final_norm." + weight;
  const auto [layer, rest] = in_layer(path);
  const auto dot = rest.rfind('.');
  if (layer >= 0 && dot != std::string::npos) {
    const std::string role = rest.substr(dot + 1);
    for (const auto& [ours, theirs, norm_role] :
         {std::tuple{"attention.norm", "norm1", weight}, std::tuple{"ffn.norm", "norm2", weight},
          std::tuple{"ffn.inner_norm", "inner", std::string("weight")},
          std::tuple{"attention.query", "q", std::string()}, std::tuple{"attention.key", "k", std::string()},
          std::tuple{"attention.value", "v", std::string()}, std::tuple{"ffn.in", "ml1", std::string()},
          std::tuple{"ffn.out", "ml2", std::string()}}) {
      if (rest.substr(0, dot) != ours) continue;
      return fmt::format("block.{}.{}.{}", layer, theirs, role == "weight" ? norm_role : role);
    }
  }
  throw InternalError("the parameter '{}' has no published name", path);
}

}  // namespace tforge
