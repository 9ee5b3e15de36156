#include "kernels/cpu/elementwise.h"

#include <immintrin.h>

#include <algorithm>
#include <array>

namespace tforge::kernels::cpu {
namespace {

constexpr std::int64_t kChunk = 16384;  // elements a thread takes at once: a few microseconds of work

/// Calls body(row, first column, count) over pieces of a [rows, columns] range, in parallel when it is worth a fork.
/// A contiguous range is seen as one long row.
template <class Body>
void for_each_piece(std::int64_t rows, std::int64_t columns, bool contiguous, Body body) {
  if (contiguous) {
    columns *= rows;
    rows = columns > 0 ? 1 : 0;
  }
  if (rows == 0 || columns == 0) return;
  const std::int64_t pieces_per_row = (columns + kChunk - 1) / kChunk;
  const std::int64_t rows_per_piece = std::max<std::int64_t>(1, kChunk / columns);
  const std::int64_t row_groups = (rows + rows_per_piece - 1) / rows_per_piece;
#pragma omp parallel for collapse(2) schedule(static) if (row_groups * pieces_per_row > 1)
  for (std::int64_t g = 0; g < row_groups; ++g) {
    for (std::int64_t p = 0; p < pieces_per_row; ++p) {
      const std::int64_t last_row = std::min(rows, (g + 1) * rows_per_piece);
      const std::int64_t first = p * kChunk;
      const std::int64_t count = std::min(kChunk, columns - first);
      for (std::int64_t r = g * rows_per_piece; r < last_row; ++r) body(r, first, count);
    }
  }
}

/// y[i] = (...(x_0[i] o x_1[i]) o ...), a few elements at a time, so that y may be one of the parts.
template <class T, class Operation>
void fold_in_order(std::span<const ConstTensorView> parts, TensorView y, Operation operation) {
  constexpr std::int64_t kFew = 64;
  T* out = y.as<T>();
  for_each_piece(1, y.elements(), true, [=](std::int64_t, std::int64_t first, std::int64_t count) {
    for (std::int64_t i = first; i < first + count; i += kFew) {
      const std::int64_t few = std::min(kFew, first + count - i);
      std::array<T, kFew> value;
      std::copy_n(parts[0].as<T>() + i, few, value.begin());
      for (const ConstTensorView& part : parts.subspan(1)) {
        const T* x = part.as<T>() + i;
        for (std::int64_t k = 0; k < few; ++k) {
          T& v = value[static_cast<std::size_t>(k)];
          v = operation(v, x[k]);
        }
      }
      std::copy_n(value.begin(), few, out + i);
    }
  });
}

constexpr std::int64_t kLanes = 8;

/// Eight bf16 as floats: the upper half of each.
void widen(const bf16* from, float* to) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  _mm256_storeu_ps(to, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)));
}

/// bf16(x) of eight floats, the bits of the scalar conversion.
void round_to_bf16(const float* from, bf16* to) {
  const __m256 x = _mm256_loadu_ps(from);
  const __m256i u = _mm256_castps_si256(x);
  const __m256i upper = _mm256_srli_epi32(u, 16);
  const __m256i half = _mm256_add_epi32(_mm256_and_si256(upper, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(u, half), 16);
  const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i bits = _mm256_blendv_epi8(rounded, quiet, is_nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}

}  // namespace

template <class T>
void fill(TensorView y, T value) {
  T* out = y.as<T>();
  for_each_piece(y.rows(), y.columns(), y.contiguous(), [=](std::int64_t row, std::int64_t first, std::int64_t count) {
    std::fill_n(out + row * y.row_stride + first, count, value);
  });
}

template <class T>
void add_to(ConstTensorView x, GradMode mode, TensorView y) {
  const T* in = x.as<T>();
  T* out = y.as<T>();
  for_each_piece(y.rows(), y.columns(), x.contiguous() && y.contiguous(),
                 [=](std::int64_t row, std::int64_t first, std::int64_t count) {
                   const T* s = in + row * x.row_stride + first;
                   T* d = out + row * y.row_stride + first;
                   if (mode == GradMode::overwrite) {
                     std::copy_n(s, count, d);
                   } else {
                     for (std::int64_t i = 0; i < count; ++i) d[i] += s[i];
                   }
                 });
}

template <class T>
void add(ConstTensorView a, ConstTensorView b, TensorView y) {
  const T* left = a.as<T>();
  const T* right = b.as<T>();
  T* out = y.as<T>();
  for_each_piece(y.rows(), y.columns(), a.contiguous() && b.contiguous() && y.contiguous(),
                 [=](std::int64_t row, std::int64_t first, std::int64_t count) {
                   const T* l = left + row * a.row_stride + first;
                   const T* r = right + row * b.row_stride + first;
                   T* d = out + row * y.row_stride + first;
                   for (std::int64_t i = 0; i < count; ++i) d[i] = l[i] + r[i];
                 });
}

template <class T>
void add_in_order(std::span<const ConstTensorView> parts, TensorView y) {
  fold_in_order<T>(parts, y, [](T a, T b) { return a + b; });
}

template <class T>
void max_in_order(std::span<const ConstTensorView> parts, TensorView y) {
  fold_in_order<T>(parts, y, [](T a, T b) { return a < b || b != b ? b : a; });
}

template <class T>
void add_row(ConstTensorView row, TensorView y) {
  const T* b = row.as<T>();
  for_each_piece(y.rows(), y.columns(), false, [&](std::int64_t r, std::int64_t first, std::int64_t count) {
    T* out = y.as<T>() + r * y.row_stride + first;
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) out[i] += b[first + i];
  });
}

/// A thread owns columns and walks all rows: no partial sums per thread, hence no workspace and fixed bits.
template <class T>
void column_sums(ConstTensorView x, GradMode mode, TensorView y) {
  constexpr std::int64_t kColumns = 64, kRows = 64;
  const std::int64_t rows = x.rows(), columns = x.columns();
  T* out = y.as<T>();
#pragma omp parallel for schedule(static) if (rows * columns > kChunk)
  for (std::int64_t first = 0; first < columns; first += kColumns) {
    const std::int64_t count = std::min(kColumns, columns - first);
    std::array<T, kColumns> total{};
    for (std::int64_t t0 = 0; t0 < rows; t0 += kRows) {
      std::array<T, kColumns> block{};
      for (std::int64_t t = t0; t < std::min(rows, t0 + kRows); ++t) {
        const T* in = x.as<T>() + t * x.row_stride + first;
#pragma omp simd
        for (std::int64_t i = 0; i < count; ++i) block[static_cast<std::size_t>(i)] += in[i];
      }
      for (std::size_t i = 0; i < total.size(); ++i) total[i] += block[i];
    }
    for (std::int64_t i = 0; i < count; ++i) {
      const T sum = total[static_cast<std::size_t>(i)];
      out[first + i] = mode == GradMode::accumulate ? out[first + i] + sum : sum;
    }
  }
}

template <class T>
void scale(T alpha, ConstTensorView x, TensorView y) {
  const T* in = x.as<T>();
  T* out = y.as<T>();
  for_each_piece(y.rows(), y.columns(), x.contiguous() && y.contiguous(),
                 [=](std::int64_t row, std::int64_t first, std::int64_t count) {
                   const T* s = in + row * x.row_stride + first;
                   T* d = out + row * y.row_stride + first;
                   for (std::int64_t i = 0; i < count; ++i) d[i] = alpha * s[i];
                 });
}

template <class T>
void sum_to(ConstTensorView x, GradMode mode, TensorView sum) {
  const std::int64_t count = x.elements();
  const T* in = count > 0 ? x.as<T>() : nullptr;
  T total = mode == GradMode::accumulate ? *sum.as<T>() : T(0);
  for (std::int64_t i = 0; i < count; ++i) total += in[i];
  *sum.as<T>() = total;
}

void to_bf16(ConstTensorView x, TensorView y) {
  const auto* in = x.as<float>();
  auto* out = y.as<bf16>();
  for_each_piece(y.rows(), y.columns(), x.contiguous() && y.contiguous(),
                 [=](std::int64_t row, std::int64_t first, std::int64_t count) {
                   const float* s = in + row * x.row_stride + first;
                   bf16* d = out + row * y.row_stride + first;
                   std::int64_t i = 0;
                   for (; i + kLanes <= count; i += kLanes) round_to_bf16(s + i, d + i);
                   for (; i < count; ++i) d[i] = bf16(s[i]);
                 });
}

void from_bf16(ConstTensorView x, TensorView y) {
  const auto* in = x.as<bf16>();
  auto* out = y.as<float>();
  for_each_piece(y.rows(), y.columns(), x.contiguous() && y.contiguous(),
                 [=](std::int64_t row, std::int64_t first, std::int64_t count) {
                   const bf16* s = in + row * x.row_stride + first;
                   float* d = out + row * y.row_stride + first;
                   std::int64_t i = 0;
                   for (; i + kLanes <= count; i += kLanes) widen(s + i, d + i);
                   for (; i < count; ++i) d[i] = static_cast<float>(s[i]);
                 });
}

#define TFORGE_INSTANTIATE(T)                                                  \
  template void fill<T>(TensorView, T);                                        \
  template void add_to<T>(ConstTensorView, GradMode, TensorView);              \
  template void add<T>(ConstTensorView, ConstTensorView, TensorView);          \
  template void add_in_order<T>(std::span<const ConstTensorView>, TensorView); \
  template void max_in_order<T>(std::span<const ConstTensorView>, TensorView); \
  template void add_row<T>(ConstTensorView, TensorView);                       \
  template void column_sums<T>(ConstTensorView, GradMode, TensorView);         \
  template void scale<T>(T, ConstTensorView, TensorView);                      \
  template void sum_to<T>(ConstTensorView, GradMode, TensorView)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cpu
