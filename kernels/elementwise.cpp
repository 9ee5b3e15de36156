#include "kernels/elementwise.h"

#include "kernels/check.h"
#include "kernels/cpu/elementwise.h"
#include "kernels/work.h"

namespace tforge::kernels {

void fill(Stream& stream, TensorView y, double value) {
  check_device("fill", stream);
  check_matrix("fill", "y", y, y.dtype, y.rows(), y.columns());
  const ProfileScope scope(stream, "fill", {0, bytes_of(y)});
  with_compute_type("fill", y.dtype, [&](auto t) { cpu::fill(y, static_cast<decltype(t)>(value)); });
}

void add_to(Stream& stream, ConstTensorView x, GradMode mode, TensorView y) {
  check_device("add_to", stream);
  check_matrix("add_to", "y", y, y.dtype, y.rows(), y.columns());
  check_matrix("add_to", "x", x, y.dtype, y.rows(), y.columns());
  const ProfileScope scope(stream, "add_to", {static_cast<double>(y.elements()), bytes_of(x) + bytes_written(mode, y)});
  with_compute_type("add_to", y.dtype, [&](auto t) { cpu::add_to<decltype(t)>(x, mode, y); });
}

void add(Stream& stream, ConstTensorView a, ConstTensorView b, TensorView y) {
  check_device("add", stream);
  check_matrix("add", "y", y, y.dtype, y.rows(), y.columns());
  check_matrix("add", "a", a, y.dtype, y.rows(), y.columns());
  check_matrix("add", "b", b, y.dtype, y.rows(), y.columns());
  const ProfileScope scope(stream, "add", {static_cast<double>(y.elements()), bytes_of(a, b, y)});
  with_compute_type("add", y.dtype, [&](auto t) { cpu::add<decltype(t)>(a, b, y); });
}

void add_row(Stream& stream, ConstTensorView row, TensorView y) {
  check_device("add_row", stream);
  check_matrix("add_row", "y", y, y.dtype, y.rows(), y.columns());
  check_vector("add_row", "row", row, y.dtype, y.columns());
  const ProfileScope scope(stream, "add_row", {static_cast<double>(y.elements()), bytes_of(row) + 2 * bytes_of(y)});
  with_compute_type("add_row", y.dtype, [&](auto t) { cpu::add_row<decltype(t)>(row, y); });
}

void column_sums(Stream& stream, ConstTensorView x, GradMode mode, TensorView y) {
  check_device("column_sums", stream);
  check_matrix("column_sums", "x", x, y.dtype, x.rows(), x.columns());
  check_vector("column_sums", "y", y, y.dtype, x.columns());
  const ProfileScope scope(stream, "column_sums",
                           {static_cast<double>(x.elements()), bytes_of(x) + bytes_written(mode, y)});
  with_compute_type("column_sums", y.dtype, [&](auto t) { cpu::column_sums<decltype(t)>(x, mode, y); });
}

namespace {

void check_parts(const char* op, Stream& stream, std::span<const ConstTensorView> parts, const ConstTensorView& y) {
  check_device(op, stream);
  if (parts.empty()) throw ShapeError("{}: no parts", op);
  check_vector(op, "y", y, y.dtype, y.elements());
  for (const ConstTensorView& part : parts) check_vector(op, "a part", part, y.dtype, y.elements());
}

Work work_of_parts(std::span<const ConstTensorView> parts, const ConstTensorView& y) {
  const auto count = static_cast<double>(parts.size());
  return {static_cast<double>(y.elements()) * (count - 1), bytes_of(y) * (count + 1)};
}

}  // namespace

void add_in_order(Stream& stream, std::span<const ConstTensorView> parts, TensorView y) {
  check_parts("add_in_order", stream, parts, y);
  const ProfileScope scope(stream, "add_in_order", work_of_parts(parts, y));
  with_compute_type("add_in_order", y.dtype, [&](auto t) { cpu::add_in_order<decltype(t)>(parts, y); });
}

void max_in_order(Stream& stream, std::span<const ConstTensorView> parts, TensorView y) {
  check_parts("max_in_order", stream, parts, y);
  const ProfileScope scope(stream, "max_in_order", work_of_parts(parts, y));
  with_compute_type("max_in_order", y.dtype, [&](auto t) { cpu::max_in_order<decltype(t)>(parts, y); });
}

void scale(Stream& stream, double alpha, ConstTensorView x, TensorView y) {
  check_device("scale", stream);
  check_matrix("scale", "y", y, y.dtype, y.rows(), y.columns());
  check_matrix("scale", "x", x, y.dtype, y.rows(), y.columns());
  const ProfileScope scope(stream, "scale", {static_cast<double>(y.elements()), bytes_of(x, y)});
  with_compute_type("scale", y.dtype, [&](auto t) { cpu::scale(static_cast<decltype(t)>(alpha), x, y); });
}

void convert(Stream& stream, ConstTensorView x, TensorView y) {
  check_device("convert", stream);
  check_matrix("convert", "y", y, y.dtype, y.rows(), y.columns());
  check_matrix("convert", "x", x, x.dtype, y.rows(), y.columns());
  const ProfileScope scope(stream, "convert", {0, bytes_of(x, y)});
  if (x.dtype == DType::f32 && y.dtype == DType::bf16) cpu::to_bf16(x, y);
  else if (x.dtype == DType::bf16 && y.dtype == DType::f32) cpu::from_bf16(x, y);
  else throw DTypeError("convert: from {} to {}, want f32 and bf16", name_of(x.dtype), name_of(y.dtype));
}

}  // namespace tforge::kernels
