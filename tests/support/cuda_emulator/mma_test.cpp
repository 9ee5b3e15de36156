// The fragments and copies of kernels/cuda/mma.cuh on the emulated tensor core, beside plain products in f64.
#include "kernels/cuda/mma.cuh"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "memory.h"

namespace {

using namespace tforge;  // NOLINT(google-build-using-namespace)
using namespace kernels::cuda;

constexpr int kSize = 16, kPitch = tile_pitch(kSize);

std::vector<bf16> random_tile(unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<bf16> tile(kSize * kSize);
  for (bf16& x : tile) x = bf16(normal(random));
  return tile;
}

/// Two products of 16 x 16 in one warp, b read as it lies and as its transpose. Then, of the first as it is rounded,
/// one more: (a b) b.
__global__ void multiply(const bf16* a, const bf16* b, float* products) {
  auto* const left = dynamic_shared<bf16>();
  bf16* const right = left + kSize * kPitch;
  const int lane = static_cast<int>(threadIdx.x), r = lane / 2, c = lane % 2 * 8;
  start_copy(left + r * kPitch + c, a + r * kSize + c, Copied::data);
  end_group();
  start_copy(right + r * kPitch + c, b + r * kSize + c, Copied::data);
  end_group();
  wait_for_groups<0>();
  __syncthreads();
  const FragmentA a_of = a_of_rows(left, kPitch);
  const TwoB b_of[2] = {b_of_rows(right, kPitch), b_of_columns(right, kPitch)};
  const auto multiply_and_store = [&](const FragmentA& x, const TwoB& y, float* product) {
    FragmentC sum[2] = {};
    add_product(sum[0], x, y.left);
    add_product(sum[1], x, y.right);
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) {
        product[(lane / 4 + i / 2 * 8) * kSize + half * 8 + lane % 4 * 2 + i % 2] = sum[half].at[i];
      }
    }
    return a_of_sums(sum[0], sum[1]);
  };
  const FragmentA first = multiply_and_store(a_of, b_of[0], products);
  multiply_and_store(a_of, b_of[1], products + kSize * kSize);
  multiply_and_store(first, b_of[0], products + 2 * kSize * kSize);
}

constexpr std::size_t kShared = 2 * kSize * kPitch * sizeof(bf16);

template <class... Parameters, class... Arguments>
void run(void (*kernel)(Parameters...), std::size_t shared_bytes, Arguments... arguments) {
  cudaLaunchConfig_t config;
  config.blockDim = dim3(32);
  config.dynamicSmemBytes = shared_bytes;
  cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

TEST(Mma, ProductsFollowTheFormula) {
  const std::vector<bf16> a = random_tile(1), b = random_tile(2);
  Memory<bf16> a_there(a.size()), b_there(b.size());
  Memory<float> products(3 * a.size());
  a_there.set(a);
  b_there.set(b);
  run(multiply, kShared, a_there.data, b_there.data, products.data);
  const std::vector<float> got = products.get();
  const auto at = [](const auto& m, int i, int j) {
    const int place = i * kSize + j;
    return static_cast<double>(static_cast<float>(m[static_cast<std::size_t>(place)]));
  };
  for (int which = 0; which < 3; ++which) {
    for (int i = 0; i < kSize; ++i) {
      for (int j = 0; j < kSize; ++j) {
        double want = 0;
        for (int k = 0; k < kSize; ++k) {
          if (which == 2)
            want += static_cast<double>(static_cast<float>(bf16(static_cast<float>(at(got, i, k))))) * at(b, k, j);
          else want += at(a, i, k) * (which == 0 ? at(b, k, j) : at(b, j, k));
        }
        EXPECT_NEAR(at(got, which * kSize + i, j), want, 1e-4) << which << ": " << i << ", " << j;
      }
    }
  }
}

__global__ void round_pairs(const float* x, unsigned* pairs) {
  pairs[threadIdx.x] = pair_of(x[2 * threadIdx.x], x[2 * threadIdx.x + 1]);
}
TEST(Mma, PairsRoundToNearestEven) {
  std::vector<float> x(64, 0.0F);
  x[0] = 1 + 1.0F / 256;    // a tie, to the even one below
  x[1] = 1 + 3.0F / 256;    // a tie, to the even one above
  x[2] = 1 + 1.01F / 256;   // above a tie
  x[3] = -1 - 0.99F / 256;  // below a tie
  x[4] = -std::numeric_limits<float>::infinity();
  x[5] = std::numeric_limits<float>::max();
  x[6] = -std::numeric_limits<float>::quiet_NaN();  // on a device every NaN becomes one
  x[7] = 3 * 0x1p-134F;                             // a tie below the least normal number, to the even one above
  Memory<float> there(64);
  Memory<unsigned> pairs(32);
  there.set(x);
  run(round_pairs, 0, there.data, pairs.data);
  EXPECT_EQ(pairs.get()[0], 0x3f82'3f80U);
  EXPECT_EQ(pairs.get()[1], 0xbf80'3f81U);
  EXPECT_EQ(pairs.get()[2], 0x7f80'ff80U);
  EXPECT_EQ(pairs.get()[3], 0x0002'7fffU);
}

__global__ void raise_two(const float* x, float* powers) { powers[threadIdx.x] = power_of_two(x[threadIdx.x]); }
TEST(Mma, PowersOfTwo) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  std::vector<float> x(32);
  for (std::size_t i = 0; i < 26; ++i) x[i] = 9.7F * static_cast<float>(i) - 126;
  x[26] = -kInfinity;
  x[27] = kInfinity;
  x[28] = std::nanf("");
  x[29] = -126.5F;  // below the normal numbers, as is the next
  x[30] = -149;
  x[31] = 1e-40F;
  Memory<float> there(32), powers(32);
  there.set(x);
  run(raise_two, 0, there.data, powers.data);
  const std::vector<float> got = powers.get();
  for (std::size_t i = 0; i < 26; ++i) {
    const double want = std::exp2(static_cast<double>(x[i]));
    EXPECT_LE(std::abs(static_cast<double>(got[i]) - want), 0x1p-22 * want) << x[i];
  }
  EXPECT_EQ(got[26], 0);
  EXPECT_EQ(got[27], kInfinity);
  EXPECT_TRUE(std::isnan(got[28]));
  EXPECT_EQ(got[29], 0);
  EXPECT_EQ(got[30], 0);
  EXPECT_EQ(got[31], 1);
}

/// What is in shared memory before the wait for the first of two copies, behind it, and behind the wait for both.
__global__ void watch_copies(const bf16* from, bf16* seen) {
  auto* const to = dynamic_shared<bf16>() + threadIdx.x * 16;
  const bf16* const mine = from + threadIdx.x * 16;
  bf16* const out = seen + threadIdx.x * 48;
  const auto note = [&](int when) {
    for (int i = 0; i < 16; ++i) out[when * 16 + i] = to[i];
  };
  start_copy(to, mine, Copied::data);
  end_group();
  start_copy(to + 8, mine + 8, threadIdx.x % 2 == 0 ? Copied::data : Copied::zeros);
  end_group();
  note(0);
  wait_for_groups<1>();
  note(1);
  wait_for_groups<0>();
  note(2);
}
TEST(Mma, CopiesAreThereBehindTheWait) {
  Memory<bf16> from(32 * 16), seen(32 * 48);
  std::vector<bf16> numbers(32 * 16);
  for (std::size_t i = 0; i < numbers.size(); ++i) numbers[i].bits = static_cast<std::uint16_t>(i + 1);
  from.set(numbers);
  run(watch_copies, 32 * 16 * sizeof(bf16), from.data, seen.data);
  const std::vector<bf16> got = seen.get();
  for (std::size_t thread = 0; thread < 32; ++thread) {
    for (std::size_t i = 0; i < 16; ++i) {
      const auto bits = static_cast<unsigned>(numbers[thread * 16 + i].bits);
      const unsigned last = i < 8 || thread % 2 == 0 ? bits : 0;
      EXPECT_EQ(got[thread * 48 + i].bits, 0xffffU);
      EXPECT_EQ(got[thread * 48 + 16 + i].bits, i < 8 ? bits : 0xffffU);
      EXPECT_EQ(got[thread * 48 + 32 + i].bits, last);
    }
  }
}

__global__ void lane_leaves_product() {
  FragmentC c{};
  if (threadIdx.x != 7) add_product(c, FragmentA{}, FragmentB{});
}
__global__ void load_at(int offset) { a_of_rows(dynamic_shared<bf16>() + offset, kPitch); }
__global__ void load_from(const bf16* memory) { a_of_rows(memory, kPitch); }
__global__ void copy_from(const bf16* memory, int offset) {
  start_copy(dynamic_shared<bf16>(), memory + offset, Copied::data);
  wait_for_groups<0>();
}
__global__ void forgets_to_wait(const bf16* memory) { start_copy(dynamic_shared<bf16>(), memory, Copied::data); }
__global__ void writes_behind() { dynamic_shared<bf16>()[kSize] = bf16(1); }

TEST(Mma, StopsAtWhatADeviceWouldNotTake) {
  Memory<bf16> memory(1024);
  EXPECT_DEATH(run(lane_leaves_product, 0), "a lane is missing from an exchange");
  EXPECT_DEATH(run(load_at, kShared, 4), "not at 16 bytes");
  EXPECT_DEATH(run(load_at, kShared, 2 * kSize * kPitch), "an address behind shared memory");
  EXPECT_DEATH(run(load_from, kShared, memory.data), "not in shared memory");
  EXPECT_DEATH(run(copy_from, kShared, memory.data, 4), "not at 16 bytes");
  EXPECT_DEATH(run(forgets_to_wait, kShared, memory.data), "ended without waiting for its copies");
  EXPECT_DEATH(run(writes_behind, kSize * sizeof(bf16)), "a write behind shared memory");
}

}  // namespace
