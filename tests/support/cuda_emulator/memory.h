#pragma once
// Memory of the emulated device in its own tests.
#include <cuda_runtime.h>

#include <cstddef>
#include <vector>

template <class T>
struct Memory {
  explicit Memory(std::size_t count_) : count(count_) {
    void* place = nullptr;
    cudaMalloc(&place, count * sizeof(T));
    data = static_cast<T*>(place);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { cudaFree(data); }
  void set(const std::vector<T>& values) {
    cudaMemcpyAsync(data, values.data(), count * sizeof(T), {}, nullptr);
    cudaStreamSynchronize(nullptr);
  }
  std::vector<T> get() const {
    std::vector<T> values(count);
    cudaMemcpyAsync(values.data(), data, count * sizeof(T), {}, nullptr);
    return values;
  }
  std::size_t count;
  T* data = nullptr;
};
