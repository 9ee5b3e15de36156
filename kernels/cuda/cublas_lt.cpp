#include "kernels/cuda/cublas_lt.cuh"

#include <string>

#include "core/cuda/library.h"

namespace tforge::kernels::cuda {

namespace {

#ifdef TFORGE_CUDA_EMULATOR

CublasLt load() {
#define TFORGE_MEMBER(name) &::name,
  return {TFORGE_CUBLASLT_FUNCTIONS(TFORGE_MEMBER)};
#undef TFORGE_MEMBER
}

#else

CublasLt load() {
  const std::string file = fmt::format("libcublasLt.so.{}", CUBLAS_VER_MAJOR);
  void* library = tforge::cuda::load_library(file, fmt::format("CUDA {}", CUBLAS_VER_MAJOR));
  CublasLt functions{};
#define TFORGE_MEMBER(name) tforge::cuda::find_function(library, file, #name, functions.name);
  TFORGE_CUBLASLT_FUNCTIONS(TFORGE_MEMBER)
#undef TFORGE_MEMBER
  return functions;
}

#endif

}  // namespace

const CublasLt& cublas_lt() {
  static const CublasLt functions = load();
  return functions;
}

}  // namespace tforge::kernels::cuda
