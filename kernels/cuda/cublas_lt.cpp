#include "kernels/cuda/cublas_lt.cuh"

#include <dlfcn.h>

#include <string>

#include "core/errors.h"

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
  void* library = ::dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  const std::string why = library == nullptr ? ::dlerror() : "";
  for (const char* folder : {"/usr/local/cuda/lib64/", "/usr/local/cuda/lib/"}) {
    if (library == nullptr) library = ::dlopen((folder + file).c_str(), RTLD_NOW | RTLD_LOCAL);
  }
  if (library == nullptr) {
    throw DeviceError("{} of CUDA {} cannot be loaded ({}): install it, or put its folder into LD_LIBRARY_PATH", file,
                      CUBLAS_VER_MAJOR, why);
  }
  CublasLt functions{};
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(::dlsym(library, name));
    if (function == nullptr) throw DeviceError("{} has no {}: it is of another version of CUDA", file, name);
  };
#define TFORGE_MEMBER(name) find(functions.name, #name);
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
