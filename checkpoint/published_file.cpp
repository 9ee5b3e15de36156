#include "checkpoint/published_file.h"

#include <charconv>

#include "core/errors.h"

namespace tforge {

PublishedFile::PublishedFile(const std::string& path) : file_(Hdf5File::open(path)) {
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
  qkv_tokens = extent("qkv_slots");
  proj_tokens = extent("proj_slots");
  ffn_tokens = extent("ffn_slots");
  norm = pattention_norm_from_name(file_.attribute<std::string>("/", "norm_activation"));
  rotary_fraction = file_.attribute<double>("/", "rotary_pct");
  rotary_base = file_.attribute<double>("/", "rotary_base");
  layernorm_eps = file_.attribute<double>("/", "layernorm_eps");
}

std::string PublishedFile::name_of(const std::string& parameter) const {
  return config.empty() ? published_name(parameter, layers) : parameter;
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

std::string published_name(const std::string& path, std::int64_t layers) {
  if (path == "embedding") return "sequential.0.word_embeddings.weight";
  if (path == "final_norm.weight") return fmt::format("sequential.{}.norm.weight", layers + 3);
  if (path == "final_norm.bias") return fmt::format("sequential.{}.norm.bias", layers + 3);
  constexpr std::string_view prefix = "layers.";
  std::int64_t layer = 0;
  const char* const end = path.data() + path.size();
  if (path.starts_with(prefix)) {
    const auto [after, error] = std::from_chars(path.data() + prefix.size(), end, layer);
    std::string rest(after, end);
    const auto dot = rest.rfind('.');
    if (error == std::errc() && rest.starts_with('.') && dot > 0) {
      std::string module = rest.substr(1, dot - 1);
      const std::string role = rest.substr(dot + 1);
      if (module == "ffn") module = "mlp";
      if (role == "keys") return fmt::format("sequential.{}.{}.key_param_tokens", layer + 2, module);
      if (role == "values") return fmt::format("sequential.{}.{}.value_param_tokens", layer + 2, module);
    }
  }
  throw InternalError("the parameter '{}' has no published name", path);
}

}  // namespace tforge
