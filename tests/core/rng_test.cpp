// Counter-based random numbers: the published block function, the statistics built on it, permutations.
#include "core/rng.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <vector>

namespace tforge {
namespace {

using Block = std::array<std::uint32_t, 4>;

// Known answers of Random123 (kat_vectors, philox4x32-10).
TEST(Philox, KnownAnswers) {
  EXPECT_EQ(philox4x32({0, 0, 0, 0}, {0, 0}), (Block{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  constexpr std::uint32_t kOnes = 0xffffffff;
  EXPECT_EQ(philox4x32({kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes}),
            (Block{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Block{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

// The stream is part of the checkpoint format: a resumed run must draw what the first run would have drawn.
TEST(Rng, BlockIsKeyedBySeedNameAndIndex) {
  const std::uint64_t seed = 0x0123456789abcdefULL, index = 0xfedcba9876543210ULL;
  const std::uint64_t fnv_of_a = 0xaf63dc4c8601ec8cULL;  // FNV-1a of "a", as its authors publish it
  const Block want = philox4x32(
      {0x76543210, 0xfedcba98, static_cast<std::uint32_t>(fnv_of_a), static_cast<std::uint32_t>(fnv_of_a >> 32)},
      {0x89abcdef, 0x01234567});
  const Rng rng(seed, "a");
  EXPECT_EQ(rng.bits(index), want[0]);
  const std::uint64_t low = std::uint64_t{want[0]} << 32 | want[1], high = std::uint64_t{want[2]} << 32 | want[3];
  const double u = std::ldexp(static_cast<double>(low >> 11), -53),
               v = std::ldexp(static_cast<double>(high >> 11), -53);
  EXPECT_EQ(rng.uniform(index), u);
  EXPECT_NEAR(rng.normal(index), std::sqrt(-2 * std::log(u + 0x1p-53)) * std::cos(2 * std::acos(-1.0) * v), 1e-14);
  EXPECT_EQ(rng.below(index, std::uint64_t{1} << 32), want[0]);
}

TEST(Rng, OtherSeedNameOrIndexIsAnotherNumber) {
  std::set<std::uint32_t> seen;
  for (const std::uint64_t seed : {0ULL, 1ULL, 1ULL << 32}) {
    for (const char* name : {"", "a", "b", "ab"}) {
      for (const std::uint64_t index : {0ULL, 1ULL, 1ULL << 32}) seen.insert(Rng(seed, name).bits(index));
    }
  }
  EXPECT_EQ(seen.size(), 36U);
  EXPECT_EQ(Rng(5, "x").bits(9), Rng(5, "x").bits(9));
}

constexpr std::uint64_t kCount = 1'000'000;
const double kRoot = std::sqrt(static_cast<double>(kCount));

TEST(Rng, UniformMomentsAndBins) {
  const Rng rng(1, "uniform");
  double sum = 0, squares = 0, neighbours = 0, before = 0.5;
  std::array<double, 20> bins{};
  for (std::uint64_t i = 0; i < kCount; ++i) {
    const double u = rng.uniform(i);
    ASSERT_GE(u, 0);
    ASSERT_LT(u, 1);
    sum += u;
    squares += u * u;
    neighbours += (u - 0.5) * (before - 0.5);
    before = u;
    ++bins[static_cast<std::size_t>(u * 20)];
  }
  // Five standard deviations of each statistic.
  EXPECT_NEAR(sum / kCount, 0.5, 5 * std::sqrt(1.0 / 12) / kRoot);
  EXPECT_NEAR(squares / kCount, 1.0 / 3, 5 * std::sqrt(4.0 / 45) / kRoot);
  EXPECT_NEAR(neighbours / kCount, 0, 5 * (1.0 / 12) / kRoot);
  double chi = 0;
  for (const double b : bins) chi += (b - kCount / 20.0) * (b - kCount / 20.0) / (kCount / 20.0);
  EXPECT_LT(chi, 19 + 5 * std::sqrt(2.0 * 19));
}

TEST(Rng, NormalMomentsAndTails) {
  const Rng rng(1, "normal");
  std::array<double, 5> powers{};
  double neighbours = 0, before = 0, beyond_two = 0, beyond_four = 0;
  for (std::uint64_t i = 0; i < kCount; ++i) {
    const double z = rng.normal(i);
    ASSERT_TRUE(std::isfinite(z));
    double p = 1;
    for (double& sum : powers) {
      sum += p;
      p *= z;
    }
    neighbours += z * before;
    before = z;
    beyond_two += std::abs(z) > 2;
    beyond_four += std::abs(z) > 4;
  }
  EXPECT_NEAR(powers[1] / kCount, 0, 5 / kRoot);
  EXPECT_NEAR(powers[2] / kCount, 1, 5 * std::sqrt(2.0) / kRoot);
  EXPECT_NEAR(powers[3] / kCount, 0, 5 * std::sqrt(15.0) / kRoot);
  EXPECT_NEAR(powers[4] / kCount, 3, 5 * std::sqrt(96.0) / kRoot);
  EXPECT_NEAR(neighbours / kCount, 0, 5 / kRoot);
  EXPECT_NEAR(beyond_two / kCount, 0.0455, 5 * std::sqrt(0.0455) / kRoot);
  EXPECT_NEAR(beyond_four, 63.3, 5 * std::sqrt(63.3));
}

TEST(Rng, BelowIsInRangeAndEven) {
  const Rng rng(1, "below");
  std::array<double, 7> counts{};
  for (std::uint64_t i = 0; i < kCount; ++i) {
    const std::uint64_t v = rng.below(i, 7);
    ASSERT_LT(v, 7U);
    ++counts[v];
  }
  for (const double count : counts) EXPECT_NEAR(count, kCount / 7.0, 5 * std::sqrt(kCount / 7.0));
  EXPECT_EQ(rng.below(3, 1), 0U);
  for (std::uint64_t i = 0; i < 100; ++i) EXPECT_LT(rng.below(i, ~0ULL), ~0ULL);
}

TEST(Permutation, IsABijectionOfEverySize) {
  std::vector<std::uint64_t> sizes;
  for (std::uint64_t size = 1; size <= 70; ++size) sizes.push_back(size);
  for (const std::uint64_t size : {255, 256, 257, 1000, 1023, 1024, 1025, 4096, 65537}) sizes.push_back(size);
  for (const std::uint64_t size : sizes) {
    const Permutation permutation(3, "shuffle", size);
    std::vector<bool> hit(size, false);
    for (std::uint64_t i = 0; i < size; ++i) {
      const std::uint64_t to = permutation(i);
      ASSERT_LT(to, size);
      ASSERT_FALSE(hit[to]) << "size " << size << ": " << to << " twice";
      hit[to] = true;
    }
  }
}

TEST(Permutation, DependsOnSeedAndNameAndLooksRandom) {
  constexpr std::uint64_t kSize = 10000;
  const Permutation a(1, "epoch 0", kSize), same(1, "epoch 0", kSize), b(2, "epoch 0", kSize), c(1, "epoch 1", kSize);
  std::uint64_t equal_to_b = 0, equal_to_c = 0, in_place = 0;
  double distance = 0;
  for (std::uint64_t i = 0; i < kSize; ++i) {
    ASSERT_EQ(a(i), same(i));
    equal_to_b += a(i) == b(i);
    equal_to_c += a(i) == c(i);
    in_place += a(i) == i;
    distance += std::abs(static_cast<double>(a(i)) - static_cast<double>(i));
  }
  // Each count is Poisson with mean 1 for independent permutations.
  EXPECT_LT(equal_to_b, 12U);
  EXPECT_LT(equal_to_c, 12U);
  EXPECT_LT(in_place, 12U);
  EXPECT_NEAR(distance / kSize, kSize / 3.0, 0.05 * kSize);
}

TEST(Permutation, OfAHugeSizeIsComputedNotStored) {
  constexpr std::uint64_t kSize = std::uint64_t{1} << 45;
  const Permutation permutation(1, "huge", kSize + 3);
  std::set<std::uint64_t> seen;
  for (std::uint64_t i = 0; i < 1000; ++i) {
    const std::uint64_t to = permutation(kSize - i);
    ASSERT_LT(to, kSize + 3);
    seen.insert(to);
  }
  EXPECT_EQ(seen.size(), 1000U);
}

}  // namespace
}  // namespace tforge
