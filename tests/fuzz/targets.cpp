#include "fuzz/targets.h"

#include "fuzz/all_targets.h"

namespace tforge::fuzz {

std::span<const Target> targets() {
  static constexpr Target kAll[] = {
      {"config", config, config_seeds},
      {"documents", documents, documents_seeds},
      {"tokenizer", tokenizer, tokenizer_seeds},
      {"token_dataset", token_dataset, token_dataset_seeds},
      {"published_file", published_file, published_file_seeds},
      {"manifest", manifest, manifest_seeds},
      {"checkpoint", checkpoint, checkpoint_seeds},
  };
  return kAll;
}

const Target& target(const std::string& name) {
  for (const Target& t : targets()) {
    if (name == t.name) return t;
  }
  throw std::invalid_argument("no target " + name);
}

}  // namespace tforge::fuzz
