#pragma once
// Digests against accidental damage (not against forgery): XXH3 of 64 and 128 bits. Source: https://xxhash.com
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

namespace tforge {

/// XXH3-64 of bytes, with a seed.
std::uint64_t digest64(const void* bytes, std::size_t count, std::uint64_t seed = 0);
/// XXH3-128 of bytes as 32 hexadecimal digits, the high half first (as xxhsum -H2 prints it).
std::string digest128(std::string_view bytes);
/// 16 hexadecimal digits.
std::string hex(std::uint64_t value);

/// XXH3-128 of a stream of bytes.
class Digest {
 public:
  Digest();
  ~Digest();
  Digest(Digest&&) noexcept;
  Digest& operator=(Digest&&) noexcept;
  void add(const void* bytes, std::size_t count);
  void add(std::string_view bytes) { add(bytes.data(), bytes.size()); }
  /// Of all bytes so far; more may follow.
  std::string text() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace tforge
