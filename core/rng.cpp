#include "core/rng.h"

#include <cmath>
#include <numbers>

namespace tforge {

std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> c, std::array<std::uint32_t, 2> k) {
  constexpr std::uint64_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
  constexpr std::uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = kMultiplier0 * c[0];
    const std::uint64_t p1 = kMultiplier1 * c[2];
    c = {static_cast<std::uint32_t>(p1 >> 32) ^ c[1] ^ k[0], static_cast<std::uint32_t>(p1),
         static_cast<std::uint32_t>(p0 >> 32) ^ c[3] ^ k[1], static_cast<std::uint32_t>(p0)};
    k[0] += kWeyl0;
    k[1] += kWeyl1;
  }
  return c;
}

namespace {
std::uint64_t hash_name(std::string_view name) {  // FNV-1a, 64 bits
  std::uint64_t h = 0xcbf29ce484222325ULL;
  for (const char ch : name) {
    h ^= static_cast<unsigned char>(ch);
    h *= 0x100000001b3ULL;
  }
  return h;
}
}  // namespace

Rng::Rng(std::uint64_t seed, std::string_view name)
    : key_{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)}, name_hash_(hash_name(name)) {}

std::array<std::uint32_t, 4> Rng::block(std::uint64_t index) const {
  return philox4x32({static_cast<std::uint32_t>(index), static_cast<std::uint32_t>(index >> 32),
                     static_cast<std::uint32_t>(name_hash_), static_cast<std::uint32_t>(name_hash_ >> 32)},
                    key_);
}

std::uint32_t Rng::bits(std::uint64_t index) const { return block(index)[0]; }

double Rng::uniform(std::uint64_t index) const {
  const auto b = block(index);
  const std::uint64_t u = (static_cast<std::uint64_t>(b[0]) << 32 | b[1]) >> 11;
  return static_cast<double>(u) * 0x1p-53;
}

double Rng::normal(std::uint64_t index) const {
  const auto b = block(index);
  // u in (0, 1], so that the logarithm is finite.
  const double u = (static_cast<double>((static_cast<std::uint64_t>(b[0]) << 32 | b[1]) >> 11) + 1) * 0x1p-53;
  const double v = static_cast<double>((static_cast<std::uint64_t>(b[2]) << 32 | b[3]) >> 11) * 0x1p-53;
  return std::sqrt(-2 * std::log(u)) * std::cos(2 * std::numbers::pi * v);
}

std::uint64_t Rng::below(std::uint64_t index, std::uint64_t bound) const {
  const auto b = block(index);
  __extension__ using Wide = unsigned __int128;
  return static_cast<std::uint64_t>(static_cast<Wide>(static_cast<std::uint64_t>(b[0]) << 32 | b[1]) * bound >> 64);
}

Permutation::Permutation(std::uint64_t seed, std::string_view name, std::uint64_t size)
    : rng_(seed, name), size_(size), half_bits_(1) {
  while (size > (std::uint64_t{1} << (2 * half_bits_)) && half_bits_ < 31) ++half_bits_;
}

std::uint64_t Permutation::operator()(std::uint64_t index) const {
  const std::uint64_t mask = (std::uint64_t{1} << half_bits_) - 1;
  std::uint64_t x = index;
  do {  // the domain is at most four times the size, so few walks are needed
    std::uint64_t left = x >> half_bits_, right = x & mask;
    for (std::uint64_t round = 0; round < 6; ++round) {
      const std::uint64_t next = left ^ (rng_.bits(round << 32 | right) & mask);
      left = right;
      right = next;
    }
    x = left << half_bits_ | right;
  } while (x >= size_);
  return x;
}

}  // namespace tforge
