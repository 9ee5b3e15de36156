#include "kernels/cpu/gemm.h"

#include <cblas.h>
#include <omp.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <string>
#include <string_view>
#include <type_traits>

#include "kernels/cpu/parallel.h"

namespace tforge::kernels::cpu {
namespace {

constexpr std::int64_t kFewRows = 8;       // products of so few rows are matrix-vector products
constexpr double kWorthForking = 1 << 20;  // multiply-adds; below, one thread is faster
// BLAS packs its operands anew in each call, so blocks are as long as the threads of one process leave them.
constexpr std::int64_t kMostBlocks = 16, kFewBlocks = 4;
constexpr std::int64_t kLongBlock = 384;  // unless there are only kFewBlocks
constexpr std::int64_t kShortBlock = 64;

/// OpenBLAS's choice of kernels for the processor, made when it was loaded; absent from builds for one processor.
extern "C" [[gnu::weak]] void gotoblas_dynamic_quit();
extern "C" [[gnu::weak]] void gotoblas_dynamic_init();

/// An OpenBLAS older than the processor takes it for a Prescott of 2004 and runs at a fifth of the speed (0.3.21 on
/// Emerald Rapids). Any processor with AVX2 does better with the kernels of a known one; a choice of the user stands.
void choose_known_processor() {
  if (std::string_view(openblas_get_corename()) != "Prescott" || std::getenv("OPENBLAS_CORETYPE") != nullptr) return;
  if (gotoblas_dynamic_quit == nullptr || gotoblas_dynamic_init == nullptr) return;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  setenv("OPENBLAS_CORETYPE", avx512 ? "SkylakeX" : "Haswell", 1);
  gotoblas_dynamic_quit();
  gotoblas_dynamic_init();
}

/// Before the first BLAS call, whoever forgot to call start_runtime(). Threads come from the loops here, never from
/// inside a BLAS call.
void prepare_blas() {
  static const bool done = [] {
    choose_known_processor();
    const int threads = omp_get_max_threads();
    openblas_set_num_threads(1);
    omp_set_num_threads(threads);  // the call above sets it too
    return true;
  }();
  static_cast<void>(done);
}

/// Rows of a block when a side of `size` is cut; depends on the size alone.
std::int64_t block_size(std::int64_t size, double multiply_adds) {
  if (multiply_adds < kWorthForking) return size;
  const std::int64_t blocks = std::clamp(size / kLongBlock, kFewBlocks, kMostBlocks);
  return std::max(blocks_of(blocks_of(size, blocks), 32) * 32, kShortBlock);
}

template <class T>
struct Matrix {
  T* data;
  std::int64_t stride;
  Transpose op = Transpose::no;

  /// Address of row `i`, column `j` of op(matrix).
  T* at(std::int64_t i, std::int64_t j) const {
    return op == Transpose::yes ? data + j * stride + i : data + i * stride + j;
  }
  CBLAS_TRANSPOSE blas_op() const { return op == Transpose::yes ? CblasTrans : CblasNoTrans; }
};

/// A single row may have any stride; BLAS wants one that holds the row.
template <class View>
std::int64_t safe_stride(const View& v) {
  return std::max<std::int64_t>({v.rows() > 1 ? v.row_stride : 0, v.columns(), 1});
}

template <class T>
void blas_gemm(std::int64_t m, std::int64_t n, std::int64_t k, T alpha, Matrix<const T> a, const T* a_block,
               Matrix<const T> b, const T* b_block, T beta, Matrix<T> c, T* c_block) {
  const auto [M, N, K] = std::array{static_cast<int>(m), static_cast<int>(n), static_cast<int>(k)};
  const auto [lda, ldb, ldc] =
      std::array{static_cast<int>(a.stride), static_cast<int>(b.stride), static_cast<int>(c.stride)};
  if constexpr (std::is_same_v<T, float>) {
    cblas_sgemm(CblasRowMajor, a.blas_op(), b.blas_op(), M, N, K, alpha, a_block, lda, b_block, ldb, beta, c_block,
                ldc);
  } else {
    cblas_dgemm(CblasRowMajor, a.blas_op(), b.blas_op(), M, N, K, alpha, a_block, lda, b_block, ldb, beta, c_block,
                ldc);
  }
}

/// y += alpha * x op(B), for n columns of op(B) starting at b_block.
template <class T>
void blas_gemv(std::int64_t n, std::int64_t k, T alpha, Matrix<const T> b, const T* b_block, const T* x,
               std::int64_t x_stride, T* y) {
  // y^T = op(B)^T x^T: B stored as [n, k] is used as it is, B stored as [k, n] transposed.
  const bool as_stored = b.op == Transpose::yes;
  const int rows = static_cast<int>(as_stored ? n : k);
  const int columns = static_cast<int>(as_stored ? k : n);
  const CBLAS_TRANSPOSE op = as_stored ? CblasNoTrans : CblasTrans;
  const int ldb = static_cast<int>(b.stride);
  const int incx = static_cast<int>(x_stride);
  if constexpr (std::is_same_v<T, float>) {
    cblas_sgemv(CblasRowMajor, op, rows, columns, alpha, b_block, ldb, x, incx, T(1), y, 1);
  } else {
    cblas_dgemv(CblasRowMajor, op, rows, columns, alpha, b_block, ldb, x, incx, T(1), y, 1);
  }
}

}  // namespace

template <class T>
void gemm(Transpose a_op, Transpose b_op, double alpha, ConstTensorView a_view, ConstTensorView b_view, GradMode mode,
          TensorView c_view) {
  const Matrix<const T> a{a_view.as<T>(), safe_stride(a_view), a_op};
  const Matrix<const T> b{b_view.as<T>(), safe_stride(b_view), b_op};
  const Matrix<T> c{c_view.as<T>(), safe_stride(c_view)};
  const std::int64_t m = c_view.rows();
  const std::int64_t n = c_view.columns();
  const std::int64_t k = a_op == Transpose::yes ? a_view.rows() : a_view.columns();
  if (m == 0 || n == 0) return;
  const bool few_rows = m <= kFewRows;
  if (mode == GradMode::overwrite && (few_rows || k == 0)) {
    for (std::int64_t i = 0; i < m; ++i) std::fill_n(c.at(i, 0), n, T(0));
  }
  if (k == 0) return;
  prepare_blas();

  const T factor = static_cast<T>(alpha);
  const T beta = mode == GradMode::accumulate ? T(1) : T(0);
  const double work = static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
  if (few_rows) {
    const std::int64_t columns = block_size(n, work);
    parallel_blocks(blocks_of(n, columns), [&](std::int64_t block) {
      const std::int64_t first = block * columns;
      for (std::int64_t i = 0; i < m; ++i) {
        blas_gemv(std::min(columns, n - first), k, factor, b, b.at(0, first), a.at(i, 0),
                  a_op == Transpose::yes ? a.stride : 1, c.at(i, first));
      }
    });
  } else if (m >= n) {
    const std::int64_t rows = block_size(m, work);
    parallel_blocks(blocks_of(m, rows), [&](std::int64_t block) {
      const std::int64_t first = block * rows;
      blas_gemm(std::min(rows, m - first), n, k, factor, a, a.at(first, 0), b, b.at(0, 0), beta, c, c.at(first, 0));
    });
  } else {
    const std::int64_t columns = block_size(n, work);
    parallel_blocks(blocks_of(n, columns), [&](std::int64_t block) {
      const std::int64_t first = block * columns;
      blas_gemm(m, std::min(columns, n - first), k, factor, a, a.at(0, 0), b, b.at(0, first), beta, c, c.at(0, first));
    });
  }
}

template void gemm<float>(Transpose, Transpose, double, ConstTensorView, ConstTensorView, GradMode, TensorView);
template void gemm<double>(Transpose, Transpose, double, ConstTensorView, ConstTensorView, GradMode, TensorView);

void start_runtime(int threads) {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    throw DeviceError("this processor has no AVX2 and FMA (x86-64-v3), which TokenForge's CPU kernels need");
  }
  if (openblas_get_parallel() != 2) {
    throw DeviceError(
        "the loaded OpenBLAS ({}) is not the OpenMP flavour; install libopenblas-openmp-dev and let "
        "the loader find it first",
        openblas_get_config());
  }
  prepare_blas();
  if (threads > 0) omp_set_num_threads(threads);
}

const char* blas_description() {
  prepare_blas();
  static const std::string text = fmt::format("{}", openblas_get_config());
  return text.c_str();
}

}  // namespace tforge::kernels::cpu
