#include "core/cuda/runtime.h"

#include <cuda_runtime.h>

#include <utility>

#include "core/errors.h"

namespace tforge::cuda {

namespace {

cudaStream_t native(const Stream& stream) { return static_cast<cudaStream_t>(stream.native()); }

WaitWatch* wait_watch = nullptr;

void* or_null(cudaError_t status, void* memory, const char* what) {
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // not an error of the call that comes next
    return nullptr;
  }
  check(status, what);
  return memory;
}

}  // namespace

void check(int status, const char* what) {
  if (status == cudaSuccess) return;
  throw DeviceError("{}: {}", what, cudaGetErrorString(static_cast<cudaError_t>(status)));
}

Devices devices() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    cudaGetLastError();
    return {0, cudaGetErrorString(status)};
  }
  return {count, count == 0 ? "the driver sees none" : ""};
}

std::string id_of(int number) {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, number), "cudaGetDeviceProperties");
  std::string id;
  for (const char byte : properties.uuid.bytes) id += fmt::format("{:02x}", static_cast<unsigned char>(byte));
  return id;
}

std::string kind_of_device() {
  int number = 0;
  check(cudaGetDevice(&number), "cudaGetDevice");
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, number), "cudaGetDeviceProperties");
  return fmt::format("{} of {} multiprocessors", properties.name, properties.multiProcessorCount);
}

void* create_stream(int number) {
  check(cudaSetDevice(number), "cudaSetDevice");
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  return stream;
}

void destroy_stream(void* native) { cudaStreamDestroy(static_cast<cudaStream_t>(native)); }

void wait(const Stream& stream) {
  if (wait_watch != nullptr) wait_watch->before_wait();
  check(cudaStreamSynchronize(native(stream)), "cudaStreamSynchronize");
}

WaitWatch* set_wait_watch(WaitWatch* watch) { return std::exchange(wait_watch, watch); }

void* allocate(std::size_t bytes) {
  void* memory = nullptr;
  const cudaError_t status = cudaMalloc(&memory, bytes);
  return or_null(status, memory, "cudaMalloc");
}

void* allocate_pinned(std::size_t bytes) {
  void* memory = nullptr;
  const cudaError_t status = cudaMallocHost(&memory, bytes);
  return or_null(status, memory, "cudaMallocHost");
}

void release(void* device_memory) { cudaFree(device_memory); }
void release_pinned(void* host_memory) { cudaFreeHost(host_memory); }

bool is_pinned(const void* host_memory) {
  cudaPointerAttributes attributes{};
  check(cudaPointerGetAttributes(&attributes, host_memory), "cudaPointerGetAttributes");
  return attributes.type == cudaMemoryTypeHost;
}

void zero(const Stream& stream, void* to, std::size_t bytes) {
  check(cudaMemsetAsync(to, 0, bytes, native(stream)), "cudaMemsetAsync");
}

void zero(const Stream& stream, void* to, std::size_t pitch, std::size_t row_bytes, std::size_t rows) {
  if (rows == 1) return zero(stream, to, row_bytes);
  check(cudaMemset2DAsync(to, pitch, 0, row_bytes, rows, native(stream)), "cudaMemset2DAsync");
}

void copy(const Stream& stream, const void* from, std::size_t from_pitch, void* to, std::size_t to_pitch,
          std::size_t row_bytes, std::size_t rows) {
  if (row_bytes == 0 || rows == 0) return;
  if (rows == 1 || (from_pitch == row_bytes && to_pitch == row_bytes)) {
    check(cudaMemcpyAsync(to, from, row_bytes * rows, cudaMemcpyDefault, native(stream)), "cudaMemcpyAsync");
  } else {
    check(cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, row_bytes, rows, cudaMemcpyDefault, native(stream)),
          "cudaMemcpy2DAsync");
  }
}

}  // namespace tforge::cuda
