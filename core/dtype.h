#pragma once
// Element types of tensors, and bf16 as a storage type.
#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "core/errors.h"

namespace tforge {

/// bfloat16 as storage: the upper half of a float. Arithmetic happens in f32.
struct bf16 {
  std::uint16_t bits = 0;
  bf16() = default;
  /// Rounds to nearest, ties to even; NaN stays NaN.
  explicit bf16(float value) {
    std::uint32_t u = std::bit_cast<std::uint32_t>(value);
    if ((u & 0x7fffffffU) > 0x7f800000U) {
      bits = static_cast<std::uint16_t>((u >> 16) | 0x40U);
    } else {
      u += 0x7fffU + ((u >> 16) & 1U);
      bits = static_cast<std::uint16_t>(u >> 16);
    }
  }
  explicit operator float() const { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }
};

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
