#pragma once
// Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11).
//
// A number depends on (seed, stream name, counter) alone, never on how many were drawn before or on which rank:
// element i of a parameter is the same on every mesh, and sample i of an epoch is the same for every rank.
#include <array>
#include <cstdint>
#include <string_view>

namespace tforge {

/// The 10-round Philox4x32 block function: four 32-bit words from a 128-bit counter and a 64-bit key.
std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key);

/// A named stream of random numbers addressed by index.
class Rng {
 public:
  /// The stream of `name` (for example a parameter's path) under `seed`.
  Rng(std::uint64_t seed, std::string_view name);

  /// 32 random bits of element `index`.
  std::uint32_t bits(std::uint64_t index) const;
  /// Uniform in [0, 1) with 53 bits, of element `index`.
  double uniform(std::uint64_t index) const;
  /// Standard normal (Box-Muller in f64), of element `index`.
  double normal(std::uint64_t index) const;
  /// Uniform in {0, ..., bound - 1} without modulo bias worth speaking of (64-bit multiply). bound >= 1.
  std::uint64_t below(std::uint64_t index, std::uint64_t bound) const;

 private:
  std::array<std::uint32_t, 4> block(std::uint64_t index) const;
  std::array<std::uint32_t, 2> key_;
  std::uint64_t name_hash_;
};

/// A pseudo-random permutation of {0, ..., size - 1} that is computed, not stored: a Feistel network over the next
/// power of four with cycle walking, keyed by Philox.
class Permutation {
 public:
  Permutation(std::uint64_t seed, std::string_view name, std::uint64_t size);
  std::uint64_t operator()(std::uint64_t index) const;
  std::uint64_t size() const { return size_; }

 private:
  Rng rng_;
  std::uint64_t size_;
  int half_bits_;
};

}  // namespace tforge
