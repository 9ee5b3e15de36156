#pragma once
// Element types of tensors.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "core/bf16.h"
#include "core/errors.h"

namespace tforge {

enum class DType : std::uint8_t { f32, f64, bf16, i32 };

constexpr std::size_t size_of(DType t) {
  switch (t) {
    case DType::f64: return 8;
    case DType::bf16: return 2;
    case DType::f32:
    case DType::i32: return 4;
  }
  return 0;
}

constexpr std::string_view name_of(DType t) {
  switch (t) {
    case DType::f32: return "f32";
    case DType::f64: return "f64";
    case DType::bf16: return "bf16";
    case DType::i32: return "i32";
  }
  return "?";
}

/// That of Compute<T>.
constexpr DType compute_dtype(DType t) { return t == DType::bf16 ? DType::f32 : t; }

/// Throws ConfigError when `name` is none of f32, f64, bf16, i32.
DType dtype_from_name(std::string_view name);

template <class T>
struct dtype_of;
template <>
struct dtype_of<float> {
  static constexpr DType value = DType::f32;
};
template <>
struct dtype_of<double> {
  static constexpr DType value = DType::f64;
};
template <>
struct dtype_of<bf16> {
  static constexpr DType value = DType::bf16;
};
template <>
struct dtype_of<std::int32_t> {
  static constexpr DType value = DType::i32;
};

/// Calls `f(T{})` with the C++ type of a floating-point compute dtype (f32 or f64).
/// Throws DTypeError naming `op` for any other.
template <class F>
decltype(auto) with_compute_type(const char* op, DType t, F&& f) {
  if (t == DType::f32) return f(float{});
  if (t == DType::f64) return f(double{});
  throw DTypeError("{}: computes in f32 or f64, not in {}", op, name_of(t));
}

}  // namespace tforge
