// The values of the passes are tested through the kernels that use them; here: both processor families give the same
// bits, at lengths with and without whole lines, and write nothing behind a row.
#include "kernels/cpu/row_passes.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "core/rng.h"

namespace tforge {
namespace {

using namespace kernels::cpu;

constexpr std::int64_t kReach = 11;  // of the passes that clear behind a row
constexpr std::int64_t kRoom = 32;   // the row's end, rounded up to lines, and what must stay untouched

template <class T>
std::vector<T> row(std::int64_t count, const char* name) {
  std::vector<T> values(static_cast<std::size_t>(count + kRoom), T(-7));
  const Rng rng(1, name);
  for (std::int64_t i = 0; i < count; ++i) {
    values[static_cast<std::size_t>(i)] = static_cast<T>(3 * rng.normal(static_cast<std::uint64_t>(i)));
  }
  return values;
}

/// Everything that the passes of one family give for rows of `count` elements.
template <class T>
std::vector<T> results(const RowPasses<T>& passes, std::int64_t count) {
  const std::vector<T> a = row<T>(count, "a"), b = row<T>(count, "b");
  std::vector<T> all = {passes.sum_of_squares(a.data(), count),
                        static_cast<T>(passes.sum_of_squares_in_f64(a.data(), count)), passes.largest(a.data(), count),
                        passes.dot(a.data(), b.data(), count), passes.sum_of_exponentials(a.data(), count, T(2))};
  const auto keep = [&](const std::vector<T>& values) { all.insert(all.end(), values.begin(), values.end()); };
  const auto fresh = [&] { return std::vector<T>(static_cast<std::size_t>(count + kRoom), T(-5)); };
  for (const PattentionNorm norm :
       {PattentionNorm::l2_norm_gelu, PattentionNorm::gelu_l2_norm, PattentionNorm::softmax}) {
    for (const T parameter : {T(0), T(1.25)}) {
      std::vector<T> p = fresh(), d = b;
      all.push_back(passes.activate(norm, parameter, a.data(), count, p.data()));
      keep(p);
      all.push_back(passes.activate_backward(norm, parameter, T(0.5), a.data(), count, d.data(), p.data()));
      keep(p), keep(d);
    }
  }
  std::vector<T> y = fresh();
  passes.scale(T(0.3), a.data(), count, y.data());
  keep(y);
  passes.through_row_norm(T(0.3), T(-0.2), a.data(), count, y.data());
  keep(y);
  passes.gelu(a.data(), count, y.data());
  keep(y);
  for (const GradMode mode : {GradMode::overwrite, GradMode::accumulate}) {
    passes.gelu_backward(a.data(), b.data(), count, mode, y.data());
    keep(y);
  }
  const std::int64_t third = count / 3;
  std::vector<T> products(7 * 13);
  for (const std::int64_t rows : {1, 5, 7}) {
    passes.dots(rows, a.data(), third / 8, 13, b.data(), third / 14, third, products.data(), 13);
    keep(products);
  }
  for (const std::int64_t rows : {1, 3}) {
    passes.weighted_rows(rows, b.data(), third / 3, third, a.data(), 1, third, y.data(), third);
    keep(y);
  }
  passes.scaled_exponentials(y.data(), count, T(1), T(0.1));
  keep(y);
  std::vector<T> p = a, ds = b;
  const Softmax<T> softmax = passes.exponentials(p.data(), count, count + kReach, T(0.7));
  all.push_back(softmax.max), all.push_back(softmax.sum);
  keep(p);
  p = a;
  passes.score_gradients(p.data(), ds.data(), count, count + kReach, T(0.7), T(9), T(0.25));
  keep(p), keep(ds);
  return all;
}

template <class T>
void expect_same_bits() {
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512dq")) {
    GTEST_SKIP() << "this processor has no AVX-512 to compare with";
  }
  for (const std::int64_t count : {1, 7, 8, 15, 16, 17, 31, 33, 64, 257, 1500}) {
    const std::vector<T> narrow = results(row_passes_avx2<T>(), count);
    const std::vector<T> wide = results(row_passes_avx512<T>(), count);
    ASSERT_EQ(narrow.size(), wide.size());
    for (std::size_t i = 0; i < wide.size(); ++i) ASSERT_EQ(narrow[i], wide[i]) << "count " << count << ", value " << i;
  }
}

TEST(RowPasses, EveryProcessorFamilyGivesTheSameBitsF32) { expect_same_bits<float>(); }
TEST(RowPasses, EveryProcessorFamilyGivesTheSameBitsF64) { expect_same_bits<double>(); }

double at(const std::vector<double>& values, std::int64_t i) { return values.at(static_cast<std::size_t>(i)); }

/// Products of few rows in f64 against sums element by element, each row by itself against all together.
TEST(RowPasses, ProductsOfFewRows) {
  const RowPasses<double>& passes = row_passes<double>();
  for (const std::int64_t rows : {1, 3, 4, 6, 16}) {
    for (const std::int64_t count : {1, 8, 45, 300}) {
      for (const std::int64_t others : {1, 6, 20, 290}) {
        const std::vector<double> x = row<double>(rows * count, "x"), b = row<double>(others * count, "b");
        std::vector<double> all(static_cast<std::size_t>(rows * others + 1), -5), alone(all.size(), -5);
        passes.dots(rows, x.data(), count, others, b.data(), count, count, all.data(), others);
        for (std::int64_t i = 0; i < rows; ++i) {
          passes.dots(1, x.data() + i * count, count, others, b.data(), count, count, alone.data() + i * others, 1);
          for (std::int64_t j = 0; j < others; ++j) {
            double want = 0;
            for (std::int64_t k = 0; k < count; ++k) want += at(x, i * count + k) * at(b, j * count + k);
            ASSERT_NEAR(at(all, i * others + j), want, 1e-11);
          }
        }
        ASSERT_EQ(all, alone);

        std::vector<double> sums(static_cast<std::size_t>(rows * count + 1), -5), own(sums.size(), -5);
        const std::vector<double> p = row<double>(rows * others, "p");
        passes.weighted_rows(rows, p.data(), others, others, b.data(), count, count, sums.data(), count);
        for (std::int64_t i = 0; i < rows; ++i) {
          passes.weighted_rows(1, p.data() + i * others, 1, others, b.data(), count, count, own.data() + i * count, 1);
          for (std::int64_t c = 0; c < count; ++c) {
            double want = 0;
            for (std::int64_t k = 0; k < others; ++k)
              want = std::fma(at(p, i * others + k), at(b, k * count + c), want);
            ASSERT_EQ(at(sums, i * count + c), want);
          }
        }
        ASSERT_EQ(sums, own);
      }
    }
  }
}

TEST(RowPasses, NothingIsWrittenBehindARow) {
  for (const RowPasses<float>* passes : {&row_passes_avx2<float>(), &row_passes<float>()}) {
    for (const std::int64_t count : {1, 15, 17, 40}) {
      const std::vector<float> a = row<float>(count, "a");
      std::vector<float> p(a.size(), -5.F), d = row<float>(count, "b");
      passes->activate_backward(PattentionNorm::l2_norm_gelu, 1.F, 0.F, a.data(), count, d.data(), p.data());
      for (auto i = static_cast<std::size_t>(count); i < a.size(); ++i) {
        ASSERT_EQ(p[i], -5.F);
        ASSERT_EQ(d[i], -7.F);
      }
    }
  }
}

}  // namespace
}  // namespace tforge
