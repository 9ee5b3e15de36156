#pragma once
// Kernel tests on a device: matrices there and back.
#include <tuple>
#include <type_traits>
#include <utility>

#include "core/copy.h"
#include "matrix.h"
#include "support/cuda_device.h"

namespace tforge::test {

/// A matrix in the device's memory, padding included.
template <class T>
class DeviceMatrix {
 public:
  DeviceMatrix(CudaDevice& device, const Matrix<T>& host)
      : stream_(device.stream),
        view_(host.view()),
        storage_(
            Tensor::empty(device.memory, Shape{view_.rows() * view_.row_stride}, view_.dtype, Purpose::activations)) {
    copy(stream_, all_of(host.view()), storage_.view());
  }
  TensorView view() { return {storage_.view().data, view_.dtype, Device::cuda, view_.shape, view_.row_stride}; }
  void get(Matrix<T>& host) const { copy(stream_, storage_.view(), all_of(host.view())); }
  void get(const Matrix<T>&) const {}

 private:
  template <class View>
  static View all_of(View v) {
    v.shape = Shape{v.rows() * v.row_stride};
    v.row_stride = v.shape[0];
    return v;
  }
  Stream& stream_;
  ConstTensorView view_;
  Tensor storage_;
};

/// Copies the matrices to the device, calls f(view...) of them there, and copies back those that are not const.
template <class F, class... Matrices>
void with_copies(CudaDevice& device, const F& f, Matrices&&... matrices) {
  const auto copy_of = [&]<class T>(const Matrix<T>& m) { return DeviceMatrix<T>(device, m); };
  std::tuple copies(copy_of(matrices)...);
  std::apply([&](auto&... copy) { f(copy.view()...); }, copies);
  std::apply([&](auto&... copy) { (copy.get(matrices), ...); }, copies);
}

/// The one row of a view of shape [1, n] as a vector.
inline TensorView vector_of(TensorView v) {
  v.shape = Shape{v.columns()};
  return v;
}

/// Calls f(rows, columns, padding) for awkward sizes, most with rows an odd number of elements apart.
template <class F>
void at_awkward_sizes(const F& f) {
  for (const std::int64_t rows : {1, 33}) {
    for (const std::int64_t columns : kAwkwardSizes) f(rows, columns, 2);
  }
  f(257, 31, 2);
  f(31, 256, 3);  // whole packs in a row, but not from every row's start
  f(33, 32, 1);
  f(31, 256, 0);  // whole packs in one run
  f(31, 256, 8);  // whole packs, rows apart
  f(3, 1284, 0);
  f(1030, 16, 0);  // more rows than the threads of a block
  f(1030, 9, 1);
}

}  // namespace tforge::test
