#pragma once
// The two weights of a Memory Layer, known to kernels, models, configurations and checkpoints alike.
#include <cstdint>
#include <string_view>

namespace tforge {

/// Let z be the coordinates that a table looks at, and t > 0 the temperature.
///   p           p(z) = prod_i 1 / (1 + exp(-2 |z_i| / t))   the softmax over the table's rows at the row that is read
///   l1_times_p  (sum_i |z_i|) p(z)                          which is 0 at z = 0
/// Source: MemoryFormer (arXiv 2411.12992), equation 10, and its public code, which computes the second one at t = 1.
enum class HashWeight : std::uint8_t { p, l1_times_p };

std::string_view name_of(HashWeight weight);
/// Throws ConfigError for another name.
HashWeight hash_weight_from_name(std::string_view name);

}  // namespace tforge
