#include "kernels/cpu/random.h"

#include "core/rng.h"
#include "kernels/cpu/parallel.h"

namespace tforge::kernels::cpu {

template <class T>
void fill_normal(std::uint64_t seed, std::string_view name, std::int64_t first_row, double deviation, GradMode mode,
                 TensorView y) {
  const Rng rng(seed, name);
  const std::int64_t columns = y.columns();
  parallel_blocks(y.rows(), [&](std::int64_t r) {
    T* row = y.as<T>() + r * y.row_stride;
    const auto first = static_cast<std::uint64_t>((first_row + r) * columns);
    for (std::int64_t c = 0; c < columns; ++c) {
      const T value = static_cast<T>(deviation * rng.normal(first + static_cast<std::uint64_t>(c)));
      row[c] = mode == GradMode::accumulate ? row[c] + value : value;
    }
  });
}

template void fill_normal<float>(std::uint64_t, std::string_view, std::int64_t, double, GradMode, TensorView);
template void fill_normal<double>(std::uint64_t, std::string_view, std::int64_t, double, GradMode, TensorView);

}  // namespace tforge::kernels::cpu
