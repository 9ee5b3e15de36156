#pragma once
// The one way CPU kernels use threads: a loop over blocks whose number and size follow from the shapes alone.
#include <omp.h>

#include <cstdint>

namespace tforge::kernels::cpu {

/// Calls body(block) for each block in [0, blocks), in parallel when there is more than one. Blocks must write apart
/// from each other; then results do not depend on the number of threads.
template <class Body>
void parallel_blocks(std::int64_t blocks, const Body& body) {
#pragma omp parallel for schedule(dynamic, 1) if (blocks > 1)
  for (std::int64_t block = 0; block < blocks; ++block) body(block);
}

/// Number of blocks of `size` that cover `total`.
constexpr std::int64_t blocks_of(std::int64_t total, std::int64_t size) { return (total + size - 1) / size; }

}  // namespace tforge::kernels::cpu
