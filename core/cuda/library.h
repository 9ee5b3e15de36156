#pragma once
// Libraries of CUDA that are loaded when they are first wanted: programs start where they are not.
#include <string>

#include "core/errors.h"

namespace tforge::cuda {

/// From the loader's path, or from where CUDA is installed. Throws DeviceError naming `file` and `product`.
void* load_library(const std::string& file, const std::string& product);
/// The address of `name`; null when there is none.
void* find_symbol(void* library, const char* name);

/// Sets `function` to that of its name. Throws DeviceError when the library has none.
template <class Function>
void find_function(void* library, const std::string& file, const char* name, Function& function) {
  function = reinterpret_cast<Function>(find_symbol(library, name));
  if (function == nullptr) throw DeviceError("{} has no {}: it is of another version", file, name);
}

}  // namespace tforge::cuda
