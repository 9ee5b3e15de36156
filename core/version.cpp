#include "core/version.h"

#include <fmt/format.h>

#include "version_info.h"  // written by the build, see core/version.cmake

namespace tforge {

std::string version() { return TFORGE_VERSION; }
std::string commit() { return TFORGE_COMMIT; }
std::string version_text() {
  return fmt::format("tokenforge {}, commit {}, {}, {}, {}, HDF5 {}, CUDA {}", TFORGE_VERSION, TFORGE_COMMIT,
                     TFORGE_COMPILER, TFORGE_BLAS, TFORGE_MPI, TFORGE_HDF5, TFORGE_CUDA);
}

}  // namespace tforge
