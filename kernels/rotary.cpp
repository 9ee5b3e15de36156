#include "kernels/rotary.h"

#include <algorithm>

#include "kernels/check.h"
#include "kernels/cpu/rotary.h"
#include "kernels/cuda/rotary.h"
#include "kernels/dispatch.h"
#include "kernels/work.h"

namespace tforge::kernels {

void rotary_tables(Stream& stream, double base, TensorView cosine, TensorView sine) {
  constexpr const char* kOp = "rotary_tables";
  check_device(kOp, stream, cosine, sine);
  check_matrix(kOp, "cosine", cosine, cosine.dtype, cosine.rows(), cosine.columns());
  check_matrix(kOp, "sine", sine, cosine.dtype, cosine.rows(), cosine.columns());
  with_compute_type(kOp, cosine.dtype, [&](auto t) {
    using T = decltype(t);
    on_device(
        stream, [&] { cpu::rotary_tables<T>(base, cosine, sine); },
        [&](auto) { cuda::rotary_tables<T>(stream, base, cosine, sine); });
  });
}

void rotary_apply(Stream& stream, RotaryDirection direction, ConstTensorView cosine, ConstTensorView sine,
                  std::int64_t heads, std::int64_t seq, std::int64_t first_position, TensorView x) {
  constexpr const char* kOp = "rotary_apply";
  check_device(kOp, stream, cosine, sine, x);
  check_matrix(kOp, "x", x, x.dtype, x.rows(), x.columns());
  check_matrix(kOp, "cosine", cosine, compute_dtype(x.dtype), cosine.rows(), cosine.columns());
  check_matrix(kOp, "sine", sine, compute_dtype(x.dtype), cosine.rows(), cosine.columns());
  if (heads < 1 || x.columns() % heads != 0) {
    throw ShapeError("{}: {} columns do not make {} heads", kOp, x.columns(), heads);
  }
  if (2 * cosine.columns() > x.columns() / heads) {
    throw ShapeError("{}: {} dimensions rotate, a head has {}", kOp, 2 * cosine.columns(), x.columns() / heads);
  }
  if (seq < 1 || x.rows() % seq != 0) {
    throw ShapeError("{}: {} rows do not make sequences of {}", kOp, x.rows(), seq);
  }
  if (first_position < 0 || (x.rows() > 0 && first_position > cosine.rows() - seq)) {
    throw ShapeError("{}: positions {}..{}, the tables hold 0..{}", kOp, first_position, first_position + seq - 1,
                     cosine.rows() - 1);
  }
  const double rotated = static_cast<double>(x.rows() * heads * 2 * cosine.columns());
  const ProfileScope scope(stream, kOp, {3 * rotated, 2 * rotated * static_cast<double>(size_of(x.dtype))});
  with_stored_type(kOp, stream, x.dtype, [&](auto t) {
    using T = decltype(t);
    on_device<T>(
        stream, [&](auto) { cpu::rotary_apply<T>(direction, cosine, sine, heads, seq, first_position, x); },
        [&](auto) {
          const auto sign = static_cast<Compute<T>>(direction == RotaryDirection::forward ? 1 : -1);
          cuda::rotary_apply<T>(stream, sign, cosine, sine, heads, seq, first_position, x);
        });
  });
}

}  // namespace tforge::kernels
