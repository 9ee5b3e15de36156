#include "core/cuda/library.h"

#include <dlfcn.h>

namespace tforge::cuda {

void* load_library(const std::string& file, const std::string& product) {
  void* library = ::dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  const std::string why = library == nullptr ? ::dlerror() : "";
  for (const char* folder : {"/usr/local/cuda/lib64/", "/usr/local/cuda/lib/"}) {
    if (library == nullptr) library = ::dlopen((folder + file).c_str(), RTLD_NOW | RTLD_LOCAL);
  }
  if (library == nullptr) {
    throw DeviceError("{} of {} cannot be loaded ({}): install it, or put its folder into LD_LIBRARY_PATH", file,
                      product, why);
  }
  return library;
}

void* find_symbol(void* library, const char* name) { return ::dlsym(library, name); }

}  // namespace tforge::cuda
