#pragma once
// bf16, and the type in which numbers of a stored type are computed with.
#include <bit>
#include <cstdint>
#include <type_traits>

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

/// f32 for bf16, else the type itself. Sums, statistics of rows and gradients of parameters are of it.
template <class T>
using Compute = std::conditional_t<std::is_same_v<std::remove_const_t<T>, bf16>, float, std::remove_const_t<T>>;

}  // namespace tforge
