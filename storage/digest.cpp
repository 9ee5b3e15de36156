#include "storage/digest.h"

#include <fmt/format.h>
#include <xxhash.h>

#include <new>

namespace tforge {
namespace {

std::string text_of(XXH128_hash_t hash) { return fmt::format("{:016x}{:016x}", hash.high64, hash.low64); }

}  // namespace

std::uint64_t digest64(const void* bytes, std::size_t count, std::uint64_t seed) {
  return XXH3_64bits_withSeed(bytes, count, seed);
}

std::string digest128(std::string_view bytes) { return text_of(XXH3_128bits(bytes.data(), bytes.size())); }

std::string hex(std::uint64_t value) { return fmt::format("{:016x}", value); }

struct Digest::State {
  XXH3_state_t* state = XXH3_createState();
  State() {
    if (state == nullptr) throw std::bad_alloc();
    XXH3_128bits_reset(state);
  }
  ~State() { XXH3_freeState(state); }
  State(const State&) = delete;
  State& operator=(const State&) = delete;
};

Digest::Digest() : state_(std::make_unique<State>()) {}
Digest::~Digest() = default;
Digest::Digest(Digest&&) noexcept = default;
Digest& Digest::operator=(Digest&&) noexcept = default;

void Digest::add(const void* bytes, std::size_t count) { XXH3_128bits_update(state_->state, bytes, count); }

std::string Digest::text() const { return text_of(XXH3_128bits_digest(state_->state)); }

}  // namespace tforge
