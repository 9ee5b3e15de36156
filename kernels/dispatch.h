#pragma once
// The one line in which a kernel's public function chooses the code for the stream's device.
#include <type_traits>

#include "core/cuda_built.h"
#include "core/device.h"
#include "core/dtype.h"

namespace tforge::kernels {

/// Calls `cuda` for a stream of a CUDA device, `cpu` else, and nothing in a rehearsal. A build without CUDA does not
/// look at `cuda`: it is a generic lambda, [&](auto) { return cuda::kernel(...); }, that nothing instantiates there.
template <class Cpu, class Cuda>
void on_device(const Stream& stream, const Cpu& cpu, [[maybe_unused]] const Cuda& cuda) {
  if (stream.rehearses()) return;
  if constexpr (kCudaBuilt) {
    if (stream.device() == Device::cuda) return cuda(kCudaBuilt);
  }
  cpu();
}

/// The same for operands stored as T; bf16 has code on CUDA devices only. There `cpu` is left alone like `cuda` above.
template <class T, class Cpu, class Cuda>
void on_device(const Stream& stream, [[maybe_unused]] const Cpu& cpu, [[maybe_unused]] const Cuda& cuda) {
  if (stream.rehearses()) return;
  if constexpr (kCudaBuilt) {
    if (stream.device() == Device::cuda) return cuda(kCudaBuilt);
  }
  if constexpr (!std::is_same_v<T, bf16>) cpu(T{});
}

/// The same for a kernel that has code for the CPU only (check_cpu).
template <class Cpu>
void on_cpu(const Stream& stream, const Cpu& cpu) {
  if (!stream.rehearses()) cpu();
}

/// Calls `f(T{})` with the type that `dtype` is stored in: f32 or f64, on a CUDA device also bf16.
/// Throws DTypeError naming `op` for any other.
template <class F>
void with_stored_type(const char* op, const Stream& stream, DType dtype, const F& f) {
  if (dtype == DType::bf16 && stream.device() == Device::cuda) return f(bf16{});
  with_compute_type(op, dtype, f);
}

}  // namespace tforge::kernels
