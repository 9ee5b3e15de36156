#pragma once
// cuBLASLt, loaded when the first device asks for it: programs start where it is not, and runs on the CPU do not pay
// for its size.
#include <cublasLt.h>

namespace tforge::kernels::cuda {

/// The functions that we use, under their own names.
#define TFORGE_CUBLASLT_FUNCTIONS(F)      \
  F(cublasLtCreate)                       \
  F(cublasLtDestroy)                      \
  F(cublasLtGetVersion)                   \
  F(cublasLtGetStatusString)              \
  F(cublasLtMatmul)                       \
  F(cublasLtMatmulAlgoCheck)              \
  F(cublasLtMatmulAlgoGetHeuristic)       \
  F(cublasLtMatmulDescCreate)             \
  F(cublasLtMatmulDescDestroy)            \
  F(cublasLtMatmulDescSetAttribute)       \
  F(cublasLtMatmulPreferenceCreate)       \
  F(cublasLtMatmulPreferenceDestroy)      \
  F(cublasLtMatmulPreferenceSetAttribute) \
  F(cublasLtMatrixLayoutCreate)           \
  F(cublasLtMatrixLayoutDestroy)

struct CublasLt {
#define TFORGE_MEMBER(name) decltype(&::name) name;
  TFORGE_CUBLASLT_FUNCTIONS(TFORGE_MEMBER)
#undef TFORGE_MEMBER
};

/// Throws DeviceError, naming the file, when it cannot be loaded.
const CublasLt& cublas_lt();

}  // namespace tforge::kernels::cuda
