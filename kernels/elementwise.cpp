#include "kernels/elementwise.h"

#include "kernels/check.h"
#include "kernels/cpu/elementwise.h"
#include "kernels/cuda/elementwise.h"
#include "kernels/dispatch.h"
#include "kernels/work.h"

namespace tforge::kernels {

void fill(Stream& stream, TensorView y, double value) {
  check_device("fill", stream, y);
  check_matrix("fill", "y", y, y.dtype, y.rows(), y.columns());
  const ProfileScope scope(stream, "fill", {0, bytes_of(y)});
  with_stored_type("fill", stream, y.dtype, [&](auto t) {
    using T = decltype(t);
    [[maybe_unused]] const T v(static_cast<Compute<T>>(value));
    on_device<T>(
        stream, [&](auto) { cpu::fill(y, v); }, [&](auto) { cuda::fill<T>(stream, y, v); });
  });
}

void add_to(Stream& stream, ConstTensorView x, GradMode mode, TensorView y) {
  check_device("add_to", stream, x, y);
  check_matrix("add_to", "y", y, y.dtype, y.rows(), y.columns());
  check_matrix("add_to", "x", x, y.dtype, y.rows(), y.columns());
  const ProfileScope scope(stream, "add_to", {static_cast<double>(y.elements()), bytes_of(x) + bytes_written(mode, y)});
  with_stored_type("add_to", stream, y.dtype, [&](auto t) {
    using T = decltype(t);
    on_device<T>(
        stream, [&](auto) { cpu::add_to<T>(x, mode, y); }, [&](auto) { cuda::add_to<T>(stream, x, mode, y); });
  });
}

void add(Stream& stream, ConstTensorView a, ConstTensorView b, TensorView y) {
  check_device("add", stream, a, b, y);
  check_matrix("add", "y", y, y.dtype, y.rows(), y.columns());
  check_matrix("add", "a", a, y.dtype, y.rows(), y.columns());
  check_matrix("add", "b", b, y.dtype, y.rows(), y.columns());
  const ProfileScope scope(stream, "add", {static_cast<double>(y.elements()), bytes_of(a, b, y)});
  with_stored_type("add", stream, y.dtype, [&](auto t) {
    using T = decltype(t);
    on_device<T>(
        stream, [&](auto) { cpu::add<T>(a, b, y); }, [&](auto) { cuda::add<T>(stream, a, b, y); });
  });
}

void add_row(Stream& stream, ConstTensorView row, TensorView y) {
  check_device("add_row", stream, row, y);
  check_matrix("add_row", "y", y, y.dtype, y.rows(), y.columns());
  check_vector("add_row", "row", row, compute_dtype(y.dtype), y.columns());
  const ProfileScope scope(stream, "add_row", {static_cast<double>(y.elements()), bytes_of(row) + 2 * bytes_of(y)});
  with_stored_type("add_row", stream, y.dtype, [&](auto t) {
    using T = decltype(t);
    on_device<T>(
        stream, [&](auto) { cpu::add_row<T>(row, y); },
        [&](auto) { cuda::add_row<T>(stream, row.as<Compute<T>>(), y); });
  });
}

void column_sums(Stream& stream, ConstTensorView x, GradMode mode, TensorView y) {
  check_device("column_sums", stream, x, y);
  check_matrix("column_sums", "x", x, x.dtype, x.rows(), x.columns());
  check_vector("column_sums", "y", y, compute_dtype(x.dtype), x.columns());
  const ProfileScope scope(stream, "column_sums",
                           {static_cast<double>(x.elements()), bytes_of(x) + bytes_written(mode, y)});
  with_stored_type("column_sums", stream, x.dtype, [&](auto t) {
    using T = decltype(t);
    on_device<T>(
        stream, [&](auto) { cpu::column_sums<T>(x, mode, y); },
        [&](auto) { cuda::column_sums<T>(stream, x, mode, y.as<Compute<T>>()); });
  });
}

namespace {

void check_parts(const char* op, Stream& stream, std::span<const ConstTensorView> parts, const ConstTensorView& y) {
  check_device(op, stream, y);
  if (parts.empty()) throw ShapeError("{}: no parts", op);
  if (stream.device() == Device::cuda && parts.size() > cuda::kMostParts) {
    throw ShapeError("{}: {} parts, a CUDA device takes at most {}", op, parts.size(), cuda::kMostParts);
  }
  check_vector(op, "y", y, y.dtype, y.elements());
  for (const ConstTensorView& part : parts) {
    check_device(op, stream, part);
    check_vector(op, "a part", part, y.dtype, y.elements());
  }
}

template <class T>
cuda::Parts<T> cuda_parts(std::span<const ConstTensorView> parts) {
  cuda::Parts<T> by_value{};
  for (const ConstTensorView& part : parts) by_value.data[by_value.count++] = part.as<T>();
  return by_value;
}

Work work_of_parts(std::span<const ConstTensorView> parts, const ConstTensorView& y) {
  const auto count = static_cast<double>(parts.size());
  return {static_cast<double>(y.elements()) * (count - 1), bytes_of(y) * (count + 1)};
}

}  // namespace

void add_in_order(Stream& stream, std::span<const ConstTensorView> parts, TensorView y) {
  check_parts("add_in_order", stream, parts, y);
  const ProfileScope scope(stream, "add_in_order", work_of_parts(parts, y));
  with_compute_type("add_in_order", y.dtype, [&](auto t) {
    using T = decltype(t);
    on_device(
        stream, [&] { cpu::add_in_order<T>(parts, y); },
        [&](auto) { cuda::add_in_order<T>(stream, cuda_parts<T>(parts), y.as<T>(), y.elements()); });
  });
}

void max_in_order(Stream& stream, std::span<const ConstTensorView> parts, TensorView y) {
  check_parts("max_in_order", stream, parts, y);
  const ProfileScope scope(stream, "max_in_order", work_of_parts(parts, y));
  with_compute_type("max_in_order", y.dtype, [&](auto t) {
    using T = decltype(t);
    on_device(
        stream, [&] { cpu::max_in_order<T>(parts, y); },
        [&](auto) { cuda::max_in_order<T>(stream, cuda_parts<T>(parts), y.as<T>(), y.elements()); });
  });
}

void scale(Stream& stream, double alpha, ConstTensorView x, TensorView y) {
  check_device("scale", stream, x, y);
  check_matrix("scale", "y", y, y.dtype, y.rows(), y.columns());
  check_matrix("scale", "x", x, y.dtype, y.rows(), y.columns());
  const ProfileScope scope(stream, "scale", {static_cast<double>(y.elements()), bytes_of(x, y)});
  with_stored_type("scale", stream, y.dtype, [&](auto t) {
    using T = decltype(t);
    const auto factor = static_cast<Compute<T>>(alpha);
    on_device<T>(
        stream, [&](auto) { cpu::scale(factor, x, y); }, [&](auto) { cuda::scale<T>(stream, factor, x, y); });
  });
}

void sum_to(Stream& stream, ConstTensorView x, GradMode mode, TensorView sum) {
  check_device("sum_to", stream, x, sum);
  check_vector("sum_to", "x", x, x.dtype, x.elements());
  check_vector("sum_to", "sum", sum, x.dtype, 1);
  const ProfileScope scope(stream, "sum_to", {static_cast<double>(x.elements()), bytes_of(x)});
  with_compute_type("sum_to", x.dtype, [&](auto t) {
    using T = decltype(t);
    on_device(
        stream, [&] { cpu::sum_to<T>(x, mode, sum); },
        [&](auto) {
          cuda::sum_to<T>(stream, x.elements() > 0 ? x.as<T>() : nullptr, x.elements(), mode, sum.as<T>());
        });
  });
}

void convert(Stream& stream, ConstTensorView x, TensorView y) {
  check_device("convert", stream, x, y);
  check_matrix("convert", "y", y, y.dtype, y.rows(), y.columns());
  check_matrix("convert", "x", x, x.dtype, y.rows(), y.columns());
  const ProfileScope scope(stream, "convert", {0, bytes_of(x, y)});
  if (x.dtype == DType::f32 && y.dtype == DType::bf16) {
    on_device(
        stream, [&] { cpu::to_bf16(x, y); }, [&](auto) { cuda::to_bf16(stream, x, y); });
  } else if (x.dtype == DType::bf16 && y.dtype == DType::f32) {
    on_device(
        stream, [&] { cpu::from_bf16(x, y); }, [&](auto) { cuda::from_bf16(stream, x, y); });
  } else {
    throw DTypeError("convert: from {} to {}, want f32 and bf16", name_of(x.dtype), name_of(y.dtype));
  }
}

}  // namespace tforge::kernels
