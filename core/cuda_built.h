#pragma once
// Whether this build has CUDA code. Only the .cpp files of core/, kernels/ and parallel/ may ask, with `if constexpr`,
// so that a build without it refers to nothing of it; what every other folder sees does not depend on it.
namespace tforge {

#ifdef TFORGE_WITH_CUDA
constexpr bool kCudaBuilt = true;
#else
constexpr bool kCudaBuilt = false;
#endif

}  // namespace tforge
