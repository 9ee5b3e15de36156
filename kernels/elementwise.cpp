#include "kernels/elementwise.h"

#include "kernels/cpu/elementwise.h"

namespace tforge::kernels {
namespace {

/// Operands of one shape and dtype, on the CPU.
void check_alike(const char* op, const ConstTensorView& a, const ConstTensorView& b) {
  if (a.shape != b.shape) throw ShapeError("{}: operands of shapes {} and {}", op, a.shape.text(), b.shape.text());
  if (a.dtype != b.dtype) throw DTypeError("{}: operands of {} and {}", op, name_of(a.dtype), name_of(b.dtype));
}

}  // namespace

void fill(Stream&, TensorView y, double value) {
  with_compute_type("fill", y.dtype, [&](auto t) { cpu::fill(y, static_cast<decltype(t)>(value)); });
}

void add_to(Stream&, ConstTensorView x, GradMode mode, TensorView y) {
  check_alike("add_to", x, y);
  with_compute_type("add_to", y.dtype, [&](auto t) { cpu::add_to<decltype(t)>(x, mode, y); });
}

void add(Stream&, ConstTensorView a, ConstTensorView b, TensorView y) {
  check_alike("add", a, y);
  check_alike("add", b, y);
  with_compute_type("add", y.dtype, [&](auto t) { cpu::add<decltype(t)>(a, b, y); });
}

void scale(Stream&, double alpha, ConstTensorView x, TensorView y) {
  check_alike("scale", x, y);
  with_compute_type("scale", y.dtype, [&](auto t) { cpu::scale(static_cast<decltype(t)>(alpha), x, y); });
}

}  // namespace tforge::kernels
