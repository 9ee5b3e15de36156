// Element types, and bf16's rounding.
#include "core/dtype.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "core/device.h"
#include "support/scratch.h"

namespace tforge {
namespace {

float f32(std::uint32_t bits) { return std::bit_cast<float>(bits); }
std::uint16_t rounded(std::uint32_t bits) { return bf16(f32(bits)).bits; }

TEST(Bf16, RoundsToNearest) {
  EXPECT_EQ(rounded(0x3f800000), 0x3f80);  // 1 is exact
  EXPECT_EQ(rounded(0x3f807fff), 0x3f80);  // just under half way
  EXPECT_EQ(rounded(0x3f808001), 0x3f81);  // just over
  EXPECT_EQ(rounded(0xbf807fff), 0xbf80);
  EXPECT_EQ(rounded(0xbf808001), 0xbf81);
}

TEST(Bf16, TiesGoToEven) {
  EXPECT_EQ(rounded(0x3f808000), 0x3f80);
  EXPECT_EQ(rounded(0x3f818000), 0x3f82);
  EXPECT_EQ(rounded(0xbf808000), 0xbf80);
  EXPECT_EQ(rounded(0xbf818000), 0xbf82);
  EXPECT_EQ(rounded(0x3fff8000), 0x4000);  // the carry reaches the exponent
}

TEST(Bf16, InfinityAndNaN) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  EXPECT_EQ(bf16(kInf).bits, 0x7f80);
  EXPECT_EQ(bf16(-kInf).bits, 0xff80);
  EXPECT_EQ(rounded(0x7f7fffff), 0x7f80);  // the largest float is nearer to infinity
  EXPECT_EQ(rounded(0x7f7f7fff), 0x7f7f);
  for (const std::uint32_t nan : {0x7f800001U, 0x7fc00000U, 0x7fffffffU, 0xff800001U, 0xffffffffU}) {
    EXPECT_TRUE(std::isnan(static_cast<float>(bf16(f32(nan))))) << std::hex << nan;
    EXPECT_EQ(rounded(nan) >> 15, nan >> 31) << "sign";
  }
}

TEST(Bf16, ZeroesAndDenormals) {
  EXPECT_EQ(bf16(0.0F).bits, 0);
  EXPECT_EQ(bf16(-0.0F).bits, 0x8000);
  EXPECT_EQ(rounded(0x00000001), 0);
  EXPECT_EQ(rounded(0x00018000), 2);
}

TEST(Bf16, EveryValueSurvivesF32) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    bf16 value;
    value.bits = static_cast<std::uint16_t>(bits);
    const float wide = static_cast<float>(value);
    if (std::isnan(wide)) continue;
    ASSERT_EQ(bf16(wide).bits, bits);
  }
}

TEST(DType, SizesAndNames) {
  EXPECT_EQ(size_of(DType::f32), sizeof(float));
  EXPECT_EQ(size_of(DType::f64), sizeof(double));
  EXPECT_EQ(size_of(DType::bf16), sizeof(bf16));
  EXPECT_EQ(size_of(DType::i32), sizeof(std::int32_t));
  for (const DType t : {DType::f32, DType::f64, DType::bf16, DType::i32}) EXPECT_EQ(dtype_from_name(name_of(t)), t);
  EXPECT_EQ(test::error_of<ConfigError>([] { dtype_from_name("float"); }),
            "'float' is no element type; there are f32, f64, bf16 and i32");
}

TEST(DType, ComputesInF32OrF64) {
  EXPECT_EQ(with_compute_type("op", DType::f32, [](auto t) { return sizeof(t); }), 4U);
  EXPECT_EQ(with_compute_type("op", DType::f64, [](auto t) { return sizeof(t); }), 8U);
  EXPECT_EQ(test::error_of<DTypeError>([] { with_compute_type("op", DType::i32, [](auto) {}); }),
            "op: computes in f32 or f64, not in i32");
}

}  // namespace
}  // namespace tforge
