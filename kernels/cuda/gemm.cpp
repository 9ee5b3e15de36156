#include "kernels/cuda/gemm.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/cuda/runtime.h"
#include "core/errors.h"
#include "kernels/cuda/cublas_lt.cuh"
#include "kernels/cuda/timing.h"
#include "kernels/device_libraries.h"

namespace tforge::kernels::cuda {

namespace {

void check(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS) throw DeviceError("{}: {}", what, cublas_lt().cublasLtGetStatusString(status));
}

/// A handle of cuBLASLt that is destroyed with its owner.
template <class Handle, auto CublasLt::*kDestroy>
class Owned {
 public:
  Owned() = default;
  Owned(Owned&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Owned& operator=(Owned&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Owned() {
    if (handle_ != nullptr) (cublas_lt().*kDestroy)(handle_);
  }
  operator Handle() const { return handle_; }  // NOLINT(google-explicit-constructor): stands for the handle
  Handle* place() { return &handle_; }

 private:
  Handle handle_ = nullptr;
};
using Library = Owned<cublasLtHandle_t, &CublasLt::cublasLtDestroy>;
using Description = Owned<cublasLtMatmulDesc_t, &CublasLt::cublasLtMatmulDescDestroy>;
using Layout = Owned<cublasLtMatrixLayout_t, &CublasLt::cublasLtMatrixLayoutDestroy>;
using Preference = Owned<cublasLtMatmulPreference_t, &CublasLt::cublasLtMatmulPreferenceDestroy>;

template <class T>
constexpr cudaDataType_t kType = CUDA_R_32F;
template <>
constexpr cudaDataType_t kType<double> = CUDA_R_64F;
template <>
constexpr cudaDataType_t kType<bf16> = CUDA_R_16BF;

/// A row-major matrix is a column-major one of the transposed matrix.
template <class T>
Layout layout_of(const Rows<T>& m) {
  constexpr cudaDataType_t type = kType<std::remove_const_t<T>>;
  Layout layout;
  const std::int64_t pitch = std::max<std::int64_t>({m.rows > 1 ? m.stride : 0, m.columns, 1});
  check(cublas_lt().cublasLtMatrixLayoutCreate(layout.place(), type, static_cast<std::uint64_t>(m.columns),
                                               static_cast<std::uint64_t>(m.rows), pitch),
        "cublasLtMatrixLayoutCreate");
  return layout;
}

/// The largest power of two, up to 256, that divides an address.
std::uint32_t alignment_of(const void* data) {
  return 1U << std::min(std::countr_zero(reinterpret_cast<std::uintptr_t>(data)), 8);
}

/// All that the choice of an algorithm depends on.
using Key =
    std::tuple<cudaDataType_t, cudaDataType_t, Op, Op, std::array<std::int64_t, 9>, std::array<std::uint32_t, 3>>;

/// A product made ready: the descriptions of its operands, and the algorithm.
struct Plan {
  Description description;
  Layout a, b, c;
  cublasLtMatmulAlgo_t algorithm{};
};

/// Memory of the device for as long as a measurement takes.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes) : memory_(tforge::cuda::allocate(bytes)) {
    if (memory_ == nullptr) {
      throw ResourceError(
          "no {:.1f} MiB of device memory for the measurement of a product; use run.products = \"rule\"",
          static_cast<double>(bytes) / (1 << 20));
    }
  }
  ~Scratch() { tforge::cuda::release(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return memory_; }

 private:
  void* memory_;
};

/// cublasLtMatmulAlgo_t as text, and back: it may be written down and read by the same version of the library.
std::string text_of(const cublasLtMatmulAlgo_t& algorithm) {
  std::string text;
  for (const std::uint8_t byte : std::bit_cast<std::array<std::uint8_t, sizeof(algorithm)>>(algorithm)) {
    text += fmt::format("{:02x}", byte);
  }
  return text;
}
std::optional<cublasLtMatmulAlgo_t> algorithm_of(const std::string& text) {
  std::array<std::uint8_t, sizeof(cublasLtMatmulAlgo_t)> bytes{};
  if (text.size() != 2 * bytes.size()) return std::nullopt;
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    const char* at = text.data() + 2 * i;
    if (std::from_chars(at, at + 2, bytes[i], 16).ptr != at + 2) return std::nullopt;
  }
  return std::bit_cast<cublasLtMatmulAlgo_t>(bytes);
}

class CublasLtProducts final : public MatrixProducts {
 public:
  CublasLtProducts(void* workspace, std::size_t bytes, F32Products f32, Choices& choices)
      : workspace_(workspace), workspace_bytes_(bytes), f32_(f32), choices_(choices) {
    check(cublas_lt().cublasLtCreate(library_.place()), "cublasLtCreate");
  }
  std::string bits_depend_on() const override {
    return fmt::format("{}, cuBLASLt {}", tforge::cuda::kind_of_device(), cublas_lt().cublasLtGetVersion());
  }
  void forget() override { plans_.clear(); }
  void run(const Stream& stream, Op a_op, Op b_op, double alpha, Rows<const float> a, Rows<const float> b,
           GradMode mode, Rows<float> c) override {
    product(stream, a_op, b_op, alpha, a, b, mode, c);
  }
  void run(const Stream& stream, Op a_op, Op b_op, double alpha, Rows<const double> a, Rows<const double> b,
           GradMode mode, Rows<double> c) override {
    product(stream, a_op, b_op, alpha, a, b, mode, c);
  }
  void run(const Stream& stream, Op a_op, Op b_op, double alpha, Rows<const bf16> a, Rows<const bf16> b, GradMode mode,
           Rows<bf16> c) override {
    product(stream, a_op, b_op, alpha, a, b, mode, c);
  }
  void run(const Stream& stream, Op a_op, Op b_op, double alpha, Rows<const bf16> a, Rows<const bf16> b, GradMode mode,
           Rows<float> c) override {
    product(stream, a_op, b_op, alpha, a, b, mode, c);
  }

 private:
  template <class T, class Out>
  void product(const Stream& stream, Op a_op, Op b_op, double alpha_, const Rows<const T>& a, const Rows<const T>& b,
               GradMode mode, const Rows<Out>& c) {
    using Scale = Compute<T>;
    const Key key{kType<T>,
                  kType<Out>,
                  a_op,
                  b_op,
                  {a.rows, a.columns, a.stride, b.rows, b.columns, b.stride, c.rows, c.columns, c.stride},
                  {alignment_of(a.data), alignment_of(b.data), alignment_of(c.data)}};
    auto found = plans_.find(key);
    if (found == plans_.end()) {
      Plan plan = make_plan(a_op, b_op, a, b, c);
      choose(stream, question_of(key), a, b, c, plan);
      found = plans_.emplace(key, std::move(plan)).first;
    }
    run_plan(stream, found->second, found->second.algorithm, static_cast<Scale>(alpha_),
             mode == GradMode::accumulate ? Scale(1) : Scale(0), a, b, c.data);
  }

  template <class T, class Out>
  void run_plan(const Stream& stream, const Plan& plan, const cublasLtMatmulAlgo_t& algorithm, Compute<T> alpha,
                Compute<T> beta, const Rows<const T>& a, const Rows<const T>& b, Out* c) {
    // Column-major: C^T = op(B)^T op(A)^T.
    check(cublas_lt().cublasLtMatmul(library_, plan.description, &alpha, b.data, plan.b, a.data, plan.a, &beta, c,
                                     plan.c, c, plan.c, &algorithm, workspace_, workspace_bytes_,
                                     static_cast<cudaStream_t>(stream.native())),
          "cublasLtMatmul");
  }

  /// What `choices_` calls a product.
  std::string question_of(const Key& key) const {
    const auto& [type, out, a_op, b_op, shape, alignment] = key;
    const auto name = [&](cudaDataType_t t) {
      if (t == CUDA_R_16BF) return "bf16";
      if (t == CUDA_R_64F) return "f64";
      return f32_ == F32Products::tf32 ? "tf32" : "f32";
    };
    return fmt::format("{}{} {}{} {} {} {}", name(type), a_op == Op::transposed ? "^T" : "", name(type),
                       b_op == Op::transposed ? "^T" : "", name(out), fmt::join(shape, ","), fmt::join(alignment, ","));
  }

  /// The algorithm of a plan: the one that is known, else by measurement or by rule.
  template <class T, class Out>
  void choose(const Stream& stream, const std::string& question, const Rows<const T>& a, const Rows<const T>& b,
              const Rows<Out>& c, Plan& plan) {
    if (const std::string* known = choices_.find(question)) {
      const std::optional<cublasLtMatmulAlgo_t> algorithm = algorithm_of(*known);
      cublasLtMatmulHeuristicResult_t ignored{};
      if (!algorithm || cublas_lt().cublasLtMatmulAlgoCheck(library_, plan.description, plan.b, plan.a, plan.c, plan.c,
                                                            &*algorithm, &ignored) != CUBLAS_STATUS_SUCCESS) {
        throw DataError(
            "{} is damaged: \"{}\" is no algorithm of cuBLASLt for {}; remove it, and they are measured anew",
            choices_.source(), *known, question);
      }
      plan.algorithm = *algorithm;
      return;
    }
    constexpr int kCandidates = 8;
    const bool measures = choices_.measures();
    const std::vector<cublasLtMatmulHeuristicResult_t> candidates =
        candidates_of(plan, measures ? kCandidates : 1, a, b, c);
    plan.algorithm = candidates[0].algo;
    if (!measures) return;
    const Scratch result(static_cast<std::size_t>((c.rows - 1) * c.stride + c.columns) * sizeof(Out));
    float least = std::numeric_limits<float>::infinity();
    for (const cublasLtMatmulHeuristicResult_t& candidate : candidates) {
      const float milliseconds = least_milliseconds(stream, [&] {
        run_plan(stream, plan, candidate.algo, Compute<T>(1), Compute<T>(0), a, b, static_cast<Out*>(result.data()));
      });
      if (milliseconds >= least) continue;
      least = milliseconds;
      plan.algorithm = candidate.algo;
    }
    choices_.keep(question, text_of(plan.algorithm));
  }

  template <class T, class Out>
  Plan make_plan(Op a_op, Op b_op, const Rows<const T>& a, const Rows<const T>& b, const Rows<Out>& c) {
    cublasComputeType_t how = std::is_same_v<T, double> ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F;
    if (std::is_same_v<T, float> && f32_ == F32Products::tf32) how = CUBLAS_COMPUTE_32F_FAST_TF32;
    Plan plan;
    check(cublas_lt().cublasLtMatmulDescCreate(plan.description.place(), how, kType<Compute<T>>),
          "cublasLtMatmulDescCreate");
    const auto set_op = [&](cublasLtMatmulDescAttributes_t which, Op op) {
      const cublasOperation_t value = op == Op::transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
      check(cublas_lt().cublasLtMatmulDescSetAttribute(plan.description, which, &value, sizeof(value)),
            "cublasLtMatmulDescSetAttribute");
    };
    set_op(CUBLASLT_MATMUL_DESC_TRANSA, b_op);
    set_op(CUBLASLT_MATMUL_DESC_TRANSB, a_op);
    plan.a = layout_of(a);
    plan.b = layout_of(b);
    plan.c = layout_of(c);
    return plan;
  }

  /// By the library's rule, the best first. Throws DeviceError where there is none.
  template <class T, class Out>
  std::vector<cublasLtMatmulHeuristicResult_t> candidates_of(const Plan& plan, int most, const Rows<const T>& a,
                                                             const Rows<const T>& b, const Rows<Out>& c) {
    Preference preference;
    check(cublas_lt().cublasLtMatmulPreferenceCreate(preference.place()), "cublasLtMatmulPreferenceCreate");
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t which, auto value) {
      check(cublas_lt().cublasLtMatmulPreferenceSetAttribute(preference, which, &value, sizeof(value)),
            "cublasLtMatmulPreferenceSetAttribute");
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<std::uint64_t>(workspace_bytes_));
    // Parts of a sum over k are added as they were computed, never rounded to the type of C between.
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, std::uint32_t{CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE});
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment_of(b.data));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment_of(a.data));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment_of(c.data));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment_of(c.data));
    std::vector<cublasLtMatmulHeuristicResult_t> best(static_cast<std::size_t>(most));
    int count = 0;
    check(cublas_lt().cublasLtMatmulAlgoGetHeuristic(library_, plan.description, plan.b, plan.a, plan.c, plan.c,
                                                     preference, most, best.data(), &count),
          "cublasLtMatmulAlgoGetHeuristic");
    best.resize(static_cast<std::size_t>(count));
    std::erase_if(best, [](const auto& result) { return result.state != CUBLAS_STATUS_SUCCESS; });
    if (best.empty()) {
      throw DeviceError("cuBLASLt has no algorithm for a product of [{}, {}] and [{}, {}]", a.rows, a.columns, b.rows,
                        b.columns);
    }
    return best;
  }

  Library library_;
  void* workspace_;
  std::size_t workspace_bytes_;
  F32Products f32_;
  Choices& choices_;
  std::map<Key, Plan> plans_;
};

}  // namespace

std::unique_ptr<MatrixProducts> make_products(void* workspace, std::size_t workspace_bytes, F32Products f32,
                                              Choices& choices) {
  return std::make_unique<CublasLtProducts>(workspace, workspace_bytes, f32, choices);
}

template <class T>
void gemm(const Stream& stream, Op a_op, Op b_op, double alpha, ConstTensorView a, ConstTensorView b, GradMode mode,
          TensorView c) {
  if (c.elements() == 0) return;
  if ((a_op == Op::transposed ? a.rows() : a.columns()) == 0) {
    if (mode == GradMode::overwrite) {
      const std::size_t element = size_of(c.dtype);
      tforge::cuda::zero(stream, c.data, static_cast<std::size_t>(c.row_stride) * element,
                         static_cast<std::size_t>(c.columns()) * element, static_cast<std::size_t>(c.rows()));
    }
    return;
  }
  if (stream.libraries() == nullptr) throw InternalError("a product on a CUDA stream without DeviceLibraries");
  MatrixProducts& products = stream.libraries()->products();
  const Rows<const T> left(a), right(b);
  if (c.dtype == dtype_of<T>::value) products.run(stream, a_op, b_op, alpha, left, right, mode, Rows<T>(c));
  else products.run(stream, a_op, b_op, alpha, left, right, mode, Rows<Compute<T>>(c));
}

#define TFORGE_INSTANTIATE(T) \
  template void gemm<T>(const Stream&, Op, Op, double, ConstTensorView, ConstTensorView, GradMode, TensorView)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
TFORGE_INSTANTIATE(bf16);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cuda
