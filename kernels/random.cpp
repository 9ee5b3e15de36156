#include "kernels/random.h"

#include "kernels/check.h"
#include "kernels/cpu/random.h"
#include "kernels/dispatch.h"

namespace tforge::kernels {

void fill_normal(Stream& stream, std::uint64_t seed, std::string_view name, std::int64_t first_row, double deviation,
                 GradMode mode, TensorView y) {
  check_cpu("fill_normal", stream);
  with_compute_type("fill_normal", y.dtype, [&](auto t) {
    on_cpu(stream, [&] { cpu::fill_normal<decltype(t)>(seed, name, first_row, deviation, mode, y); });
  });
}

}  // namespace tforge::kernels
