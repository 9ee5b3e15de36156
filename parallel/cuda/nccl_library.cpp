#include "parallel/cuda/nccl_library.h"

#include <string>

#include "core/cuda/library.h"

namespace tforge::cuda {

namespace {

Nccl load() {
  const std::string file = "libnccl.so.2";
  void* library = load_library(file, "NCCL");
  Nccl functions{};
#define TFORGE_MEMBER(name) find_function(library, file, #name, functions.name);
  TFORGE_NCCL_FUNCTIONS(TFORGE_MEMBER)
#undef TFORGE_MEMBER
  return functions;
}

}  // namespace

const Nccl& nccl() {
  static const Nccl functions = load();
  return functions;
}

}  // namespace tforge::cuda
