#include <cblas.h>
#include <cublasLt.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "core/bf16.h"

struct cublasEmulatedHandle {};
struct cublasEmulatedDescription {
  cublasComputeType_t compute;
  cudaDataType_t scale;
  cublasOperation_t a_op = CUBLAS_OP_N, b_op = CUBLAS_OP_N;
};
struct cublasEmulatedLayout {
  cudaDataType_t type;
  std::uint64_t rows, columns;
  std::int64_t pitch;
};
struct cublasEmulatedPreference {};

namespace {

template <class T, class... Values>
cublasStatus_t make(T** handle, Values... values) {
  *handle = new T{values...};
  return CUBLAS_STATUS_SUCCESS;
}
template <class T>
cublasStatus_t destroy(T* handle) {
  delete handle;
  return CUBLAS_STATUS_SUCCESS;
}

/// Rows and columns of op(matrix), which is column-major.
struct Size {
  std::uint64_t rows, columns;
  Size(const cublasEmulatedLayout& m, cublasOperation_t op)
      : rows(op == CUBLAS_OP_N ? m.rows : m.columns), columns(op == CUBLAS_OP_N ? m.columns : m.rows) {}
};

bool fits(const cublasEmulatedDescription& d, const cublasEmulatedLayout& a, const cublasEmulatedLayout& b,
          const cublasEmulatedLayout& c) {
  const Size left(a, d.a_op), right(b, d.b_op);
  for (const cublasEmulatedLayout* m : {&a, &b, &c}) {
    if (m->rows == 0 || m->columns == 0 || m->pitch < static_cast<std::int64_t>(m->rows)) return false;
  }
  const bool narrow = d.scale == CUDA_R_32F && a.type == CUDA_R_16BF;
  if (a.type != b.type || (a.type != d.scale && !narrow)) return false;
  if (c.type != d.scale && !(narrow && c.type == CUDA_R_16BF)) return false;
  return left.rows == c.rows && right.columns == c.columns && left.columns == right.rows;
}

/// To the 10 bits of tf32, to nearest, ties to even.
float rounded_to_tf32(float x) {
  const auto u = std::bit_cast<std::uint32_t>(x);
  return std::bit_cast<float>((u + 0xfffU + ((u >> 13) & 1U)) & ~0x1fffU);
}

/// The numbers of a matrix of bf16 or f32 as f32, one column after the other.
std::vector<float> widened(const void* data, const cublasEmulatedLayout& m) {
  std::vector<float> wide(m.rows * m.columns);
  for (std::uint64_t i = 0; i < wide.size(); ++i) {
    const std::uint64_t at = i / m.rows * static_cast<std::uint64_t>(m.pitch) + i % m.rows;
    wide[i] = m.type == CUDA_R_16BF ? static_cast<float>(static_cast<const tforge::bf16*>(data)[at])
                                    : static_cast<const float*>(data)[at];
  }
  return wide;
}
void narrow_to(const std::vector<float>& wide, void* data, const cublasEmulatedLayout& m) {
  for (std::uint64_t i = 0; i < wide.size(); ++i) {
    const std::uint64_t at = i / m.rows * static_cast<std::uint64_t>(m.pitch) + i % m.rows;
    if (m.type == CUDA_R_16BF) static_cast<tforge::bf16*>(data)[at] = tforge::bf16(wide[i]);
    else static_cast<float*>(data)[at] = wide[i];
  }
}

/// Algorithm k sums over the inner dimension in k parts, one after the other.
constexpr int kAlgorithms = 3;

template <class T>
void multiply(const cublasEmulatedDescription& d, int parts, const void* alpha, const void* a,
              const cublasEmulatedLayout& a_layout, std::int64_t lda, const void* b, std::int64_t ldb, const void* beta,
              void* c, const cublasEmulatedLayout& c_layout, std::int64_t ldc) {
  const auto blas_op = [](cublasOperation_t op) { return op == CUBLAS_OP_T ? CblasTrans : CblasNoTrans; };
  const auto inner = static_cast<std::int64_t>(Size(a_layout, d.a_op).columns);
  for (int part = 0; part < parts; ++part) {
    const std::int64_t first = inner * part / parts, end = inner * (part + 1) / parts;
    const T* left = static_cast<const T*>(a) + first * (d.a_op == CUBLAS_OP_T ? 1 : lda);
    const T* right = static_cast<const T*>(b) + first * (d.b_op == CUBLAS_OP_T ? ldb : 1);
    const T factor = part == 0 ? *static_cast<const T*>(beta) : T(1);
    const auto run = [&](auto gemm) {
      gemm(CblasColMajor, blas_op(d.a_op), blas_op(d.b_op), static_cast<int>(c_layout.rows),
           static_cast<int>(c_layout.columns), static_cast<int>(end - first), *static_cast<const T*>(alpha), left,
           static_cast<int>(lda), right, static_cast<int>(ldb), factor, static_cast<T*>(c), static_cast<int>(ldc));
    };
    if constexpr (sizeof(T) == 4) run(cblas_sgemm);
    else run(cblas_dgemm);
  }
}

}  // namespace

const char* cublasLtGetStatusString(cublasStatus_t status) {
  return status == CUBLAS_STATUS_SUCCESS ? "success" : "an argument does not fit";
}
cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) { return make(handle); }
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { return destroy(handle); }
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* description, cublasComputeType_t compute,
                                        cudaDataType_t scale) {
  return make(description, compute, scale);
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t description) { return destroy(description); }
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t description, cublasLtMatmulDescAttributes_t which,
                                              const void* value, std::size_t bytes) {
  if (bytes != sizeof(cublasOperation_t)) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(which == CUBLASLT_MATMUL_DESC_TRANSA ? &description->a_op : &description->b_op, value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType_t type, std::uint64_t rows,
                                          std::uint64_t columns, std::int64_t pitch) {
  return make(layout, type, rows, columns, pitch);
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) { return destroy(layout); }
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) { return make(preference); }
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) { return destroy(preference); }
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t,
                                                    cublasLtMatmulPreferenceAttributes_t which, const void*,
                                                    std::size_t bytes) {
  const std::size_t want = which == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES ? 8 : 4;
  return bytes == want ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}
std::size_t cublasLtGetVersion() { return 1; }
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t description,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t,
                                              cublasLtMatmulPreference_t, int wanted,
                                              cublasLtMatmulHeuristicResult_t* results, int* found) {
  *found = fits(*description, *a, *b, *c) ? std::min(wanted, kAlgorithms) : 0;
  for (int i = 0; i < *found; ++i) results[i].algo.number = static_cast<std::uint64_t>(i) + 1;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t, cublasLtMatmulDesc_t description, cublasLtMatrixLayout_t a,
                                       cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t,
                                       const cublasLtMatmulAlgo_t* algorithm, cublasLtMatmulHeuristicResult_t*) {
  const bool known = algorithm->number >= 1 && algorithm->number <= kAlgorithms;
  return known && fits(*description, *a, *b, *c) ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}
cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t d, const void* alpha, const void* a,
                              cublasLtMatrixLayout_t a_layout, const void* b, cublasLtMatrixLayout_t b_layout,
                              const void* beta, const void* c, cublasLtMatrixLayout_t c_layout, void* out,
                              cublasLtMatrixLayout_t out_layout, const cublasLtMatmulAlgo_t* algorithm, void*,
                              std::size_t, cudaStream_t) {
  if (!fits(*d, *a_layout, *b_layout, *c_layout) || c != out || c_layout != out_layout) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  const tforge_emulator::DeviceAccess access;
  const auto number = static_cast<int>(algorithm->number);
  if (const char* fastest = std::getenv("TFORGE_EMULATOR_FASTEST")) {
    tforge_emulator::pass_time(1000. * std::abs(number - std::atoi(fastest)));
  }
  const auto [lda, ldb, ldc] = std::tuple(a_layout->pitch, b_layout->pitch, c_layout->pitch);
  const bool tf32 = d->compute == CUBLAS_COMPUTE_32F_FAST_TF32;
  if (a_layout->type == CUDA_R_16BF || tf32) {
    std::vector<float> left = widened(a, *a_layout), right = widened(b, *b_layout);
    if (tf32) {
      for (float& x : left) x = rounded_to_tf32(x);
      for (float& x : right) x = rounded_to_tf32(x);
    }
    std::vector<float> sums = *static_cast<const float*>(beta) == 0
                                  ? std::vector<float>(c_layout->rows * c_layout->columns)
                                  : widened(c, *c_layout);
    multiply<float>(*d, number, alpha, left.data(), *a_layout, static_cast<std::int64_t>(a_layout->rows), right.data(),
                    static_cast<std::int64_t>(b_layout->rows), beta, sums.data(), *c_layout,
                    static_cast<std::int64_t>(c_layout->rows));
    narrow_to(sums, out, *out_layout);
  } else if (d->scale == CUDA_R_32F) {
    multiply<float>(*d, number, alpha, a, *a_layout, lda, b, ldb, beta, out, *c_layout, ldc);
  } else {
    multiply<double>(*d, number, alpha, a, *a_layout, lda, b, ldb, beta, out, *c_layout, ldc);
  }
  return CUBLAS_STATUS_SUCCESS;
}
