#include "core/dtype.h"

namespace tforge {

DType dtype_from_name(std::string_view name) {
  for (const DType t : {DType::f32, DType::f64, DType::bf16, DType::i32}) {
    if (name == name_of(t)) return t;
  }
  throw ConfigError("'{}' is no element type; there are f32, f64, bf16 and i32", name);
}

}  // namespace tforge
