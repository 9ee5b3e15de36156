#include "kernels/slots.h"

#include "kernels/check.h"
#include "kernels/cpu/slots.h"
#include "kernels/cuda/slots.h"
#include "kernels/dispatch.h"
#include "kernels/work.h"

namespace tforge::kernels {
namespace {

void check_shape(const char* op, const SlotShape& s, std::int64_t columns) {
  if (s.batch < 0 || s.heads < 1 || s.block < 1 || s.slots < 1 || s.x_stride < s.block || s.y_stride < s.slots) {
    throw ShapeError(
        "{}: batch {}, heads {}, block {} of stride {}, slots {} of stride {}; want heads, block and slots of at least "
        "1 and strides that hold them",
        op, s.batch, s.heads, s.block, s.x_stride, s.slots, s.y_stride);
  }
  if (columns < 1 || columns % s.heads != 0) {
    throw ShapeError("{}: {} columns do not make {} heads", op, columns, s.heads);
  }
}

/// As many rows as the last sequence reaches, or more.
void check_rows(const char* op, const char* name, const ConstTensorView& x, DType dtype, std::int64_t columns,
                const SlotShape& s, std::int64_t stride, std::int64_t rows) {
  check_matrix(op, name, x, dtype, x.rows(), columns);
  const std::int64_t reach = s.batch == 0 ? 0 : (s.batch - 1) * stride + rows;
  if (x.rows() < reach) throw ShapeError("{}: {} has {} rows, want at least {}", op, name, x.rows(), reach);
}

[[maybe_unused]] cuda::SlotHeads heads_of(const SlotShape& s, std::int64_t columns) {
  return {s.batch, s.heads, s.block, s.slots, s.x_stride, s.y_stride, columns / s.heads};
}

double operations(const SlotShape& s, std::int64_t columns) {
  return 2 * static_cast<double>(s.batch * s.slots * s.block) * static_cast<double>(columns);
}

}  // namespace

void slots_forward(Stream& stream, const SlotShape& shape, ConstTensorView projection, ConstTensorView x,
                   TensorView y) {
  constexpr const char* kOp = "slots_forward";
  const std::int64_t columns = x.columns();
  check_device(kOp, stream, projection, x, y);
  check_shape(kOp, shape, columns);
  check_matrix(kOp, "projection", projection, x.dtype, shape.heads * shape.slots, shape.block);
  check_rows(kOp, "x", x, x.dtype, columns, shape, shape.x_stride, shape.block);
  check_rows(kOp, "y", y, x.dtype, columns, shape, shape.y_stride, shape.slots);
  const ProfileScope scope(stream, kOp, {operations(shape, columns), bytes_of(projection, x, y)});
  with_stored_type(kOp, stream, x.dtype, [&](auto t) {
    using T = decltype(t);
    on_device<T>(
        stream, [&](auto) { cpu::slots_forward<T>(shape, projection, x, y); },
        [&](auto) { cuda::slots_forward<T>(stream, heads_of(shape, columns), projection, x, y); });
  });
}

void slots_backward(Stream& stream, const SlotShape& shape, ConstTensorView projection, ConstTensorView x,
                    ConstTensorView dy, TensorView dx, GradMode mode, TensorView dprojection) {
  constexpr const char* kOp = "slots_backward";
  const std::int64_t columns = x.columns(), e_rows = shape.heads * shape.slots;
  check_device(kOp, stream, projection, x, dy, dx, dprojection);
  check_shape(kOp, shape, columns);
  check_matrix(kOp, "projection", projection, x.dtype, e_rows, shape.block);
  check_rows(kOp, "x", x, x.dtype, columns, shape, shape.x_stride, shape.block);
  check_rows(kOp, "dy", dy, x.dtype, columns, shape, shape.y_stride, shape.slots);
  check_rows(kOp, "dx", dx, x.dtype, columns, shape, shape.x_stride, shape.block);
  if (dprojection) check_matrix(kOp, "dprojection", dprojection, compute_dtype(x.dtype), e_rows, shape.block);
  const ProfileScope scope(stream, kOp, {2 * operations(shape, columns), bytes_of(projection, x, dy, dx, dprojection)});
  with_stored_type(kOp, stream, x.dtype, [&](auto t) {
    using T = decltype(t);
    on_device<T>(
        stream, [&](auto) { cpu::slots_backward<T>(shape, projection, x, dy, dx, mode, dprojection); },
        [&](auto) {
          cuda::slots_backward<T>(stream, heads_of(shape, columns), projection, x, dy, dx, mode,
                                  cuda::Rows<Compute<T>>(dprojection));
        });
  });
}

}  // namespace tforge::kernels
