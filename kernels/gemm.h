#pragma once
// Matrix product over OpenBLAS, on CUDA devices over cuBLASLt.
#include "core/device.h"
#include "core/tensor.h"

namespace tforge::kernels {

enum class Transpose : std::uint8_t { no, yes };

/// C {=, +=} alpha * op(A) op(B).   op(A) [M, K], op(B) [K, N], C [M, N]; f32 or f64, all alike; row strides allowed.
/// On a CUDA device A and B may be bf16, and C then bf16 or f32: sums in f32, rounded once.
/// The output is cut into blocks fixed by shape, each a single-threaded BLAS call inside an OpenMP loop: the result
/// does not depend on the number of threads. On a CUDA device cuBLASLt computes, with one algorithm for a shape and so
/// the same bits in every call: its own first choice, or the fastest of several (run.products); it needs the stream's
/// DeviceLibraries. K = 0 with overwrite gives zeros.
/// Throws ShapeError, DTypeError. No workspace.
void gemm(Stream& stream, Transpose a_op, Transpose b_op, double alpha, ConstTensorView a, ConstTensorView b,
          GradMode mode, TensorView c);

/// Checks once, at the start of a job, what the CPU kernels need: a processor with AVX2 and FMA, and OpenBLAS in its
/// OpenMP flavour (openblas_get_parallel() == 2). Gives an OpenBLAS that is older than the processor the kernels of one
/// it knows (unless OPENBLAS_CORETYPE is set), sets it to one thread per call and OpenMP to `threads` (0: leave).
/// Throws DeviceError naming the package to install.
void start_cpu_runtime(int threads);
/// "OpenBLAS 0.3.21 ... SkylakeX", for version texts.
const char* blas_description();

}  // namespace tforge::kernels
