#include "kernels/memory_layer.h"

#include <array>
#include <numeric>
#include <string>

#include "device_matrix.h"
#include "kernels/cpu/memory_layer_passes.h"
#include "matrix.h"

namespace tforge {
namespace {

using kernels::MemoryHash;
using test::Matrix;
Stream cpu;

using Codes = Matrix<std::int32_t>;

/// Table k looks at the coordinates from k * step on, and round again.
Codes chunks(std::int64_t bits, std::int64_t tables, std::int64_t d, std::int64_t step) {
  Codes c(bits, tables, 2);
  for (std::int64_t k = 0; k < tables; ++k) {
    for (std::int64_t i = 0; i < bits; ++i) c(i, k) = static_cast<std::int32_t>((k * step + i) % d);
  }
  return c;
}

/// The layer as the paper writes it, in f64, with the gradients of <dy, y>.
struct Reference {
  Matrix<double> weights, y, dx, dtables, dweights;
  Codes codes;

  template <class T>
  Reference(const MemoryHash& hash, const Codes& coordinates, const Matrix<T>& x, const Matrix<T>& tables,
            const Matrix<T>& dy)
      : weights(x.rows(), coordinates.columns()),
        y(x.rows(), tables.columns()),
        dx(x.rows(), x.columns()),
        dtables(tables.rows(), tables.columns()),
        dweights(coordinates.columns(), x.rows()),
        codes(x.rows(), coordinates.columns()) {
    for (Matrix<double>* m : {&y, &dx, &dtables}) {
      for (std::int64_t i = 0; i < m->rows() * m->columns(); ++i) (*m)(i / m->columns(), i % m->columns()) = 0;
    }
    const std::int64_t bits = coordinates.rows();
    for (std::int64_t t = 0; t < x.rows(); ++t) {
      for (std::int64_t k = 0; k < coordinates.columns(); ++k) {
        std::vector<double> z;
        for (std::int64_t i = 0; i < bits; ++i) z.push_back(static_cast<double>(x(t, coordinates(i, k))));
        std::int32_t code = 0;
        for (const double v : z) code = 2 * code + (v < 0 ? 0 : 1);
        z.resize(static_cast<std::size_t>(hash.weight_bits));
        double p = 1, size = 0;
        for (const double v : z) {
          p /= 1 + std::exp(-2 * std::abs(v) / hash.temperature);
          size += std::abs(v);
        }
        const double w = hash.weight == HashWeight::p ? p : size * p;
        codes(t, k) = code;
        weights(t, k) = w;
        double along = 0;
        const std::int64_t row = k * (std::int64_t{1} << bits) + code;
        for (std::int64_t c = 0; c < y.columns(); ++c) {
          y(t, c) += w * static_cast<double>(tables(row, c));
          dtables(row, c) += w * static_cast<double>(dy(t, c));
          along += static_cast<double>(tables(row, c)) * static_cast<double>(dy(t, c));
        }
        dweights(k, t) = along;
        for (std::size_t i = 0; i < z.size(); ++i) {
          const double sign = z[i] < 0 ? -1 : 1;
          const double slope = 2 / hash.temperature * p * sign / (1 + std::exp(2 * std::abs(z[i]) / hash.temperature));
          dx(t, coordinates(static_cast<std::int64_t>(i), k)) +=
              along * (hash.weight == HashWeight::p ? slope : sign * p + size * slope);
        }
      }
    }
  }
};

/// The kernels with all their outputs, between NaN.
template <class T>
struct Outputs {
  Codes codes;
  Matrix<T> weights, y, dx, dtables, dweights;

  Outputs(MemoryHash hash, const Codes& coordinates, const Matrix<T>& x, const Matrix<T>& tables, const Matrix<T>& dy)
      : codes(x.rows(), coordinates.columns(), 1),
        weights(x.rows(), coordinates.columns(), 3),
        y(x.rows(), tables.columns(), 2),
        dx(x.rows(), x.columns(), 1),
        dtables(tables.rows(), tables.columns(), 5),
        dweights(coordinates.columns(), x.rows(), 1) {
    hash.coordinates = coordinates.view();
    forward(hash, x, tables);
    backward(hash, x, tables, dy, GradMode::overwrite);
  }
  void forward(const MemoryHash& hash, const Matrix<T>& x, const Matrix<T>& tables) {
    kernels::memory_hash_forward(cpu, hash, x.view(), codes.view(), weights.view());
    const kernels::MemoryForward layer{tables.view(), y.view()};
    kernels::memory_lookup_forward(cpu, hash.coordinates.rows(), view(codes), view(weights), {&layer, 1});
  }
  void backward(const MemoryHash& hash, const Matrix<T>& x, const Matrix<T>& tables, const Matrix<T>& dy,
                GradMode mode) {
    const std::int64_t bits = hash.coordinates.rows();
    Codes order(1, kernels::memory_lookup_workspace(x.rows(), bits, hash.coordinates.columns()));
    const kernels::MemoryBackward layer{tables.view(), dy.view(), mode, dtables.view()};
    kernels::memory_lookup_backward(cpu, bits, view(codes), view(weights), {&layer, 1}, dweights.view(),
                                    order.vector());
    kernels::memory_hash_backward(cpu, hash, x.view(), view(dweights), mode, dx.view());
  }
  bool same_bits(const Outputs& other) const {
    return codes.same_bits(other.codes) && weights.same_bits(other.weights) && y.same_bits(other.y) &&
           dx.same_bits(other.dx) && dtables.same_bits(other.dtables) && dweights.same_bits(other.dweights);
  }
  template <class M>
  static ConstTensorView view(const M& m) {
    return m.view();
  }
};

// Buckets of the paper's figures 2 and 3 among them. At 0 the slope is the one of the positive side.
struct ByHand {
  std::vector<double> z;
  std::int32_t code;
  double p, s;
  std::vector<double> dp, ds;
};
const ByHand kByHand[] = {
    {{0.7, -0.1}, 2, .441068, .352854, {.174501, -.397108}, {.580669, -.758754}},
    {{-0.5, 0.2}, 1, .437676, .306373, {-.235418, .351289}, {-.602469, .683578}},
    {{-1.1, -2.7, .6}, 1, .688753, 3.030514, {-.137407, -.006194, .318859}, {-1.293344, -.716005, 2.091731}},
    {{3.4, -1.9, -2.3}, 4, .967307, 7.351536, {.002152, -.042332, -.019253}, {.983665, -1.289029, -1.113629}},
    {{1, -1, .5, -.5, 2, -2, .25, 0},
     171,
     .124444,
     .902215,
     {.029668, -.029668, .066936, -.066936, .004477, -.004477, .093965, .124444},
     {.339537, -.339537, .609730, -.609730, .156898, -.156898, .805690, 1.026659}},
    {{0, 0, 0, 0, 0, 0, 0, -0.0},
     255,
     .00390625,
     0,
     std::vector<double>(8, .00390625),
     std::vector<double>(8, .00390625)},
};

template <class T>
void check_by_hand() {
  for (const ByHand& c : kByHand) {
    const auto bits = static_cast<std::int64_t>(c.z.size());
    const Codes coordinates = chunks(bits, 1, bits, 0);
    Matrix<T> x(1, bits), tables(std::int64_t{1} << bits, 1), dy(1, 1);
    for (std::int64_t i = 0; i < bits; ++i) x(0, i) = static_cast<T>(c.z[static_cast<std::size_t>(i)]);
    for (std::int64_t r = 0; r < tables.rows(); ++r) tables(r, 0) = static_cast<T>(r == c.code ? 1 : 1000);
    dy(0, 0) = 1;
    for (const HashWeight weight : {HashWeight::p, HashWeight::l1_times_p}) {
      const Outputs<T> run({weight, 1.0, bits, {}}, coordinates, x, tables, dy);
      const bool is_p = weight == HashWeight::p;
      EXPECT_EQ(run.codes(0, 0), c.code);
      EXPECT_NEAR(static_cast<double>(run.y(0, 0)), is_p ? c.p : c.s, 1e-6);
      for (std::int64_t i = 0; i < bits; ++i) {
        EXPECT_NEAR(static_cast<double>(run.dx(0, i)), (is_p ? c.dp : c.ds)[static_cast<std::size_t>(i)], 1e-6)
            << c.code << " " << i;
      }
    }
  }
}
TEST(MemoryLayer, ByHand) {
  check_by_hand<float>();
  check_by_hand<double>();
}

/// Numbers away from 0, where f32 and f64 see the same signs.
template <class T>
Matrix<T> inputs(std::int64_t rows, std::int64_t columns, std::uint64_t seed) {
  auto x = Matrix<T>::random(rows, columns, seed, 1, 2);
  for (std::int64_t i = 0; i < rows * columns; ++i) {
    T& v = x(i / columns, i % columns);
    v += static_cast<T>(v < 0 ? -0.01 : 0.01);
  }
  return x;
}

template <class T>
void check_against_reference(double tolerance) {
  struct Case {
    std::int64_t rows, bits, weight_bits, tables, d_out;
  };
  // Few and many rows; several groups of tables and blocks of rows; whole strips of columns, lines, and pieces of one.
  for (const Case& c : {Case{1, 8, 8, 17, 257}, Case{33, 1, 1, 5, 31}, Case{70, 4, 4, 16, 1}, Case{300, 10, 8, 5, 150},
                        Case{1100, 4, 3, 9, 33}, Case{5, 13, 2, 1, 3}}) {
    for (const HashWeight weight : {HashWeight::p, HashWeight::l1_times_p}) {
      const std::int64_t d = 40;
      const Codes coordinates = chunks(c.bits, c.tables, d, 3);  // tables share coordinates
      const MemoryHash hash{weight, weight == HashWeight::p ? 0.7 : 1.0, c.weight_bits, {}};
      const Matrix<T> x = inputs<T>(c.rows, d, 1);
      const auto tables = Matrix<T>::random(c.tables << c.bits, c.d_out, 2, 1, 1);
      const auto dy = Matrix<T>::random(c.rows, c.d_out, 3, 1, 1);
      Reference want(hash, coordinates, x, tables, dy);
      Outputs<T> got(hash, coordinates, x, tables, dy);
      SCOPED_TRACE(testing::Message() << c.rows << " rows, " << c.bits << " bits");
      ASSERT_TRUE(got.codes.same_bits(want.codes));
      test::expect_near(got.weights, want.weights, tolerance * want.weights.largest());
      test::expect_near(got.y, want.y, tolerance * want.y.largest());
      test::expect_near(got.dweights, want.dweights, tolerance * want.dweights.largest());
      test::expect_near(got.dx, want.dx, tolerance * want.dx.largest());
      test::expect_near(got.dtables, want.dtables, tolerance * want.dtables.largest());

      MemoryHash with = hash;
      with.coordinates = coordinates.view();
      got.backward(with, x, tables, dy, GradMode::accumulate);
      for (Matrix<double>* once : {&want.dx, &want.dtables}) {
        for (std::int64_t i = 0; i < once->rows() * once->columns(); ++i)
          (*once)(i / once->columns(), i % once->columns()) *= 2;
      }
      test::expect_near(got.dx, want.dx, tolerance * want.dx.largest());
      test::expect_near(got.dtables, want.dtables, tolerance * want.dtables.largest());
      EXPECT_TRUE(got.y.padding_untouched() && got.dx.padding_untouched() && got.dtables.padding_untouched() &&
                  got.weights.padding_untouched() && got.dweights.padding_untouched());
    }
  }
}
TEST(MemoryLayer, MatchesTheScalarReferenceF64) { check_against_reference<double>(1e-13); }
TEST(MemoryLayer, MatchesTheScalarReferenceF32) { check_against_reference<float>(3e-6); }

class MemoryLayerGradient : public testing::TestWithParam<HashWeight> {};
TEST_P(MemoryLayerGradient, MatchesFiniteDifferences) {
  const MemoryHash hash{GetParam(), GetParam() == HashWeight::p ? 1.3 : 1.0, 3, {}};
  const Codes coordinates = chunks(4, 5, 12, 3);
  Matrix<double> x = inputs<double>(4, 12, 4), tables = Matrix<double>::random(5 << 4, 6, 5);
  const auto dy = Matrix<double>::random(4, 6, 6);
  Outputs<double> run(hash, coordinates, x, tables, dy);
  MemoryHash with = hash;
  with.coordinates = coordinates.view();
  const auto loss = [&] {
    run.forward(with, x, tables);
    return run.y.dot(dy);
  };
  test::expect_gradient(x, run.dx, loss);
  test::expect_gradient(tables, run.dtables, loss);
}
INSTANTIATE_TEST_SUITE_P(Weights, MemoryLayerGradient, testing::Values(HashWeight::p, HashWeight::l1_times_p),
                         [](const auto& test) { return std::string(name_of(test.param)); });

TEST(MemoryLayer, LayersOfAGroupShareTheHash) {
  const std::int64_t rows = 50, bits = 4, tables = 6, d = 24;
  const MemoryHash hash{HashWeight::p, 1.0, bits, {}};
  const Codes coordinates = chunks(bits, tables, d, 4);
  const Matrix<double> x = inputs<double>(rows, d, 1);
  std::vector<Matrix<double>> t, dy, y, dt;
  std::vector<kernels::MemoryForward> forward;
  std::vector<kernels::MemoryBackward> backward;
  for (std::int64_t g = 0; g < 3; ++g) {
    t.push_back(Matrix<double>::random(tables << bits, 10 + g, static_cast<std::uint64_t>(10 + g)));
    dy.push_back(Matrix<double>::random(rows, 10 + g, static_cast<std::uint64_t>(20 + g)));
    y.emplace_back(rows, 10 + g);
    dt.emplace_back(tables << bits, 10 + g);
  }
  for (std::size_t g = 0; g < 3; ++g) {
    forward.push_back({t[g].view(), y[g].view()});
    backward.push_back({t[g].view(), dy[g].view(), GradMode::overwrite, g == 1 ? TensorView{} : dt[g].view()});
  }
  MemoryHash with = hash;
  with.coordinates = coordinates.view();
  Codes codes(rows, tables), order(1, kernels::memory_lookup_workspace(rows, bits, tables));
  Matrix<double> weights(rows, tables), dweights(tables, rows), want(tables, rows);
  kernels::memory_hash_forward(cpu, with, x.view(), codes.view(), weights.view());
  kernels::memory_lookup_forward(cpu, bits, codes.view(), weights.view(), forward);
  kernels::memory_lookup_backward(cpu, bits, codes.view(), weights.view(), backward, dweights.view(), order.vector());
  for (std::int64_t i = 0; i < rows * tables; ++i) want(i % tables, i / tables) = 0;
  for (std::size_t g = 0; g < 3; ++g) {
    const Outputs<double> alone(hash, coordinates, x, t[g], dy[g]);
    EXPECT_TRUE(y[g].same_bits(alone.y));
    EXPECT_TRUE(g == 1 || dt[g].same_bits(alone.dtables));  // the gradient of the second one is not wanted
    for (std::int64_t i = 0; i < rows * tables; ++i) {
      want(i % tables, i / tables) += alone.dweights(i % tables, i / tables);
    }
  }
  test::expect_near(dweights, want, 1e-12);
}

TEST(MemoryLayer, BitsDependOnNeitherThreadsNorRowsNorProcessor) {
  const std::int64_t rows = 500, d = 64, tables = 19, bits = 8;
  const MemoryHash hash{HashWeight::l1_times_p, 1.0, bits, {}};
  const Codes coordinates = chunks(bits, tables, d, 3);
  const auto x = Matrix<float>::random(rows, d, 1);
  const auto table = Matrix<float>::random(tables << bits, 150, 2);
  const auto dy = Matrix<float>::random(rows, 150, 3);
  const Outputs<float> whole(hash, coordinates, x, table, dy);
  test::at_one_and_two_threads(
      [&](int) { EXPECT_TRUE(Outputs<float>(hash, coordinates, x, table, dy).same_bits(whole)); });

  Matrix<float> one_x(1, d), one_dy(1, 150);
  for (const std::int64_t t : {0L, 77L, 499L}) {  // a row alone is looked up in another order
    std::copy_n(&x(t, 0), d, &one_x(0, 0));
    std::copy_n(&dy(t, 0), 150, &one_dy(0, 0));
    const Outputs<float> one(hash, coordinates, one_x, table, one_dy);
    EXPECT_EQ(0, std::memcmp(&one.y(0, 0), &whole.y(t, 0), 150 * sizeof(float)));
    EXPECT_EQ(0, std::memcmp(&one.dx(0, 0), &whole.dx(t, 0), static_cast<std::size_t>(d) * sizeof(float)));
  }
}

template <class T>
void expect_equal_families() {
  const auto& a = kernels::cpu::memory_passes_avx2<T>();
  const auto& b = kernels::cpu::memory_passes_avx512<T>();
  const std::int64_t tables = 21, bits = 5, d = 40, h = 201;
  const Codes coordinates = chunks(bits, tables, d, 2);
  const auto x = Matrix<T>::random(1, d, 1), dweights = Matrix<T>::random(1, tables, 2);
  const auto table = Matrix<T>::random(tables << bits, h, 3), dy = Matrix<T>::random(9, h, 4);
  const Codes hit = Codes::of(1, 4, {0, 3, 4, 8});
  std::array<Codes, 2> codes = {Codes(1, tables), Codes(1, tables)};
  std::array<Matrix<T>, 2> weights = {Matrix<T>(1, tables), Matrix<T>(1, tables)},
                           y = {Matrix<T>(1, h), Matrix<T>(1, h)}, dx = {Matrix<T>(1, d), Matrix<T>(1, d)},
                           gradient = {Matrix<T>(1, 20), Matrix<T>(1, 20)}, dots = {Matrix<T>(1, 9), Matrix<T>(1, 9)};
  for (const HashWeight weight : {HashWeight::p, HashWeight::l1_times_p}) {
    const kernels::cpu::HashSpec<T> hash{weight, -2, bits, bits - 1, tables, &coordinates(0, 0), tables + 2};
    for (std::size_t i = 0; i < 2; ++i) {
      const auto& passes = i == 0 ? a : b;
      passes.hash(hash, &x(0, 0), &codes[i](0, 0), &weights[i](0, 0));
      for (std::int64_t c = 0; c < d; ++c) dx[i](0, c) = 0;
      passes.hash_backward(hash, &x(0, 0), &dweights(0, 0), 1, &dx[i](0, 0));
      passes.lookup({bits, tables, &codes[i](0, 0), tables, &weights[i](0, 0), tables}, 1, &table(0, 0), h, h,
                    GradMode::overwrite, &y[i](0, 0), h, 2);
      for (std::int64_t t = 0; t < 9; ++t) dots[i](0, t) = 0;
      passes.hits(4, &hit(0, 0), &dweights(0, 0), 1, &dy(0, 0), h, 20, {&table(0, 0), &gradient[i](0, 0), {}},
                  GradMode::overwrite, &dots[i](0, 0));
    }
    EXPECT_TRUE(codes[0].same_bits(codes[1]));
    EXPECT_TRUE(weights[0].same_bits(weights[1]));
    EXPECT_TRUE(y[0].same_bits(y[1]));
    EXPECT_TRUE(dx[0].same_bits(dx[1]));
    EXPECT_TRUE(gradient[0].same_bits(gradient[1]));
    EXPECT_TRUE(dots[0].same_bits(dots[1]));
  }
}
TEST(MemoryLayer, BothProcessorFamiliesGiveTheSameBits) {
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512dq")) GTEST_SKIP() << "no AVX-512 here";
  expect_equal_families<float>();
  expect_equal_families<double>();
}

TEST(MemoryLayer, RowsThatWereHitAreNeverZero) {
  const std::int64_t rows = 7, bits = 3, tables = 2;
  const Codes coordinates = chunks(bits, tables, 6, 3);
  Matrix<float> dy(rows, 40);
  for (std::int64_t i = 0; i < rows * 40; ++i) dy(i / 40, i % 40) = 0;
  const Outputs<float> run({HashWeight::p, 1.0, bits, {}}, coordinates, Matrix<float>::random(rows, 6, 1),
                           Matrix<float>::random(tables << bits, 40, 2), dy);
  for (std::int64_t row = 0; row < tables << bits; ++row) {
    bool hit = false;
    for (std::int64_t t = 0; t < rows; ++t) hit = hit || run.codes(t, row >> bits) == (row & 7);
    EXPECT_EQ(run.dtables(row, 0), hit ? std::numeric_limits<float>::min() : 0.0F);
    for (std::int64_t c = 1; c < 40; ++c) EXPECT_EQ(run.dtables(row, c), 0.0F);
  }
}

TEST(MemoryLayer, TablesOfAShardAreRanges) {
  const std::int64_t rows = 40, tables = 7, bits = 3, d = 21, first = 2, count = 3;
  const MemoryHash hash{HashWeight::p, 1.0, bits, {}};
  const Codes coordinates = chunks(bits, tables, d, 3);
  const Matrix<double> x = inputs<double>(rows, d, 1);
  auto table = Matrix<double>::random(tables << bits, 12, 2);
  const auto dy = Matrix<double>::random(rows, 12, 3);
  Outputs<double> all(hash, coordinates, x, table, dy);
  MemoryHash part = hash;
  part.coordinates = coordinates.view().column_range(first, count);
  const kernels::MemoryForward layer{table.view().row_range(first << bits, count << bits), all.y.view()};
  kernels::memory_lookup_forward(cpu, bits, all.codes.view().column_range(first, count),
                                 all.weights.view().column_range(first, count), {&layer, 1});
  // The same as with zeros in all other tables.
  for (std::int64_t r = 0; r < table.rows(); ++r) {
    for (std::int64_t c = 0; c < 12; ++c) table(r, c) *= r >> bits >= first && r >> bits < first + count ? 1.0 : 0.0;
  }
  const Outputs<double> want(hash, coordinates, x, table, dy);
  test::expect_near(all.y, want.y, 1e-15);
  Matrix<double> dx(rows, d);
  kernels::memory_hash_backward(cpu, part, x.view(), want.dweights.view().row_range(first, count), GradMode::overwrite,
                                dx.view());
  test::expect_near(dx, want.dx, 1e-15);
}

/// The kernels on a device: the hash, a group of two layers of which the first wants its gradient alone, backward twice
/// (overwrite, accumulate), beside the same on the CPU.
template <class T>
void compare_on_cuda(test::CudaDevice& device, const MemoryHash& hash, std::int64_t rows, std::int64_t tables,
                     std::int64_t bits, std::int64_t columns, double epsilon) {
  SCOPED_TRACE(testing::Message() << rows << " rows, " << tables << " tables of " << bits << " bits");
  struct Run {
    Matrix<T> weights, y, y2, dtables, dweights, dx;
    Codes codes, order;
  };
  const std::int64_t d = 40, padding = columns % 2;
  const Codes coordinates = chunks(bits, tables, d, 3);  // tables share coordinates
  const Matrix<T> x = inputs<T>(rows, d, 1);
  const auto table = Matrix<T>::random(tables << bits, columns, 2, 1, padding);
  const auto table2 = Matrix<T>::random(tables << bits, 5, 3);
  const auto dy = Matrix<T>::random(rows, columns, 4, 1, padding), dy2 = Matrix<T>::random(rows, 5, 5);
  const auto all = [&](Stream& stream, Run& r) {
    const std::int64_t size = kernels::memory_lookup_workspace(rows, bits, tables, stream.device());
    r.order = Codes(1, size);
    const auto run = [&](auto at, auto x_, auto t1, auto t2, auto g1, auto g2, auto codes, auto weights, auto y1,
                         auto y2, auto dtables, auto dweights, auto dx, auto order) {
      MemoryHash with = hash;
      with.coordinates = at;
      kernels::memory_hash_forward(stream, with, x_, codes, weights);
      const std::array forward{kernels::MemoryForward{t1, y1}, kernels::MemoryForward{t2, y2}};
      kernels::memory_lookup_forward(stream, bits, codes, weights, forward);
      for (const GradMode mode : {GradMode::overwrite, GradMode::accumulate}) {
        const std::array backward{kernels::MemoryBackward{t1, g1, mode, dtables},
                                  kernels::MemoryBackward{t2, g2, mode, {}}};
        kernels::memory_lookup_backward(stream, bits, codes, weights, backward, dweights, test::vector_of(order));
        kernels::memory_hash_backward(stream, with, x_, dweights, mode, dx);
      }
    };
    if (stream.device() == Device::cuda) {
      test::with_copies(device, run, coordinates, x, table, table2, dy, dy2, r.codes, r.weights, r.y, r.y2, r.dtables,
                        r.dweights, r.dx, r.order);
    } else {
      run(coordinates.view(), x.view(), table.view(), table2.view(), dy.view(), dy2.view(), r.codes.view(),
          r.weights.view(), r.y.view(), r.y2.view(), r.dtables.view(), r.dweights.view(), r.dx.view(), r.order.view());
    }
  };
  Run want{Matrix<T>(rows, tables, 3), Matrix<T>(rows, columns, padding),
           Matrix<T>(rows, 5),         Matrix<T>(tables << bits, columns, padding),
           Matrix<T>(tables, rows, 1), Matrix<T>(rows, d, 1),
           Codes(rows, tables, 1),     Codes(1, 1)};
  Run got = want, again = want;
  all(cpu, want);
  all(device.stream, got);
  all(device.stream, again);
  EXPECT_TRUE(got.codes.same_bits(want.codes));
  // An output is a sum of `terms` products of numbers of the order of 1, with a weight that may be off as well.
  const auto near = [&](const Matrix<T>& a, const Matrix<T>& b, std::int64_t terms) {
    test::expect_near(a, b, epsilon * static_cast<double>(terms + 4 * bits) * std::max(1.0, b.largest()));
    EXPECT_TRUE(a.padding_untouched());
  };
  near(got.weights, want.weights, 1);
  near(got.y, want.y, tables);
  near(got.y2, want.y2, tables);
  near(got.dtables, want.dtables, 2 * rows);
  near(got.dweights, want.dweights, columns + 5);
  near(got.dx, want.dx, columns + 5 + 2 * tables * bits);
  EXPECT_TRUE(got.y.same_bits(again.y) && got.dtables.same_bits(again.dtables) && got.dx.same_bits(again.dx));
}

TEST(MemoryLayer, CudaFollowsTheCpu) {
  test::on_cuda([](test::CudaDevice& device) {
    for (const HashWeight weight : {HashWeight::p, HashWeight::l1_times_p}) {
      const auto hash = [&](std::int64_t weight_bits) { return MemoryHash{weight, 0.7, weight_bits, {}}; };
      for (const std::int64_t columns : test::kAwkwardSizes) {
        compare_on_cuda<float>(device, hash(4), 33, 5, 4, columns, 1.2e-7);
      }
      compare_on_cuda<float>(device, hash(2), 1, 33, 3, 64, 1.2e-7);
      compare_on_cuda<float>(device, hash(1), 1100, 3, 1, 8, 1.2e-7);  // more than a batch of the sort
      compare_on_cuda<float>(device, hash(9), 31, 2, 11, 4, 1.2e-7);   // more rows of a table than threads that sort
      compare_on_cuda<float>(device, hash(3), 0, 4, 3, 7, 1.2e-7);
      compare_on_cuda<double>(device, hash(3), 31, 35, 4, 30, 2.3e-16);
    }
  });
}

TEST(MemoryLayer, CudaRowsThatWereHitAreNeverZero) {
  test::on_cuda([](test::CudaDevice& device) {
    const std::int64_t rows = 7, bits = 3;
    const auto codes = Codes::of(rows, 1, {1, 1, 4, 6, 1, 4, 1});
    const auto weights = Matrix<float>::random(rows, 1, 1);
    const auto table = Matrix<float>::random(8, 40, 2);
    const auto dy = Matrix<float>::of(rows, 40, std::vector<float>(static_cast<std::size_t>(rows) * 40));
    Matrix<float> dtables(8, 40);
    Codes order(1, kernels::memory_lookup_workspace(rows, bits, 1, Device::cuda));
    test::with_copies(
        device,
        [&](auto codes_, auto weights_, auto table_, auto dy_, auto dtables_, auto order_) {
          const kernels::MemoryBackward layer{table_, dy_, GradMode::overwrite, dtables_};
          kernels::memory_lookup_backward(device.stream, bits, codes_, weights_, {&layer, 1}, {},
                                          test::vector_of(order_));
        },
        codes, weights, table, dy, dtables, order);
    for (std::int64_t row = 0; row < 8; ++row) {
      const bool hit = row == 1 || row == 4 || row == 6;
      for (std::int64_t c = 0; c < 40; ++c) {
        EXPECT_EQ(dtables(row, c), hit && c == 0 ? std::numeric_limits<float>::min() : 0.0F);
      }
    }
  });
}

TEST(MemoryLayer, RefusesWhatDoesNotFit) {
  const Codes coordinates = chunks(4, 3, 12, 4);
  Matrix<float> x(5, 12), weights(5, 3), y(5, 7), tables(3 << 4, 7), dweights(3, 5), dx(5, 12);
  Codes codes(5, 3), order(1, 1);
  MemoryHash hash{HashWeight::p, 1.0, 4, coordinates.view()};
  const auto forward = [&](const MemoryHash& h) {
    kernels::memory_hash_forward(cpu, h, x.view(), codes.view(), weights.view());
  };
  EXPECT_NO_THROW(forward(hash));
  hash.weight_bits = 5;
  EXPECT_THROW(forward(hash), ShapeError);
  hash = {HashWeight::p, 0.0, 4, coordinates.view()};
  EXPECT_THROW(forward(hash), ShapeError);
  hash = {HashWeight::p, 1.0, 4, coordinates.view().column_range(0, 2)};
  EXPECT_THROW(forward(hash), ShapeError);
  hash = {HashWeight::p, 1.0, 4, x.view()};
  EXPECT_THROW(forward(hash), DTypeError);
  kernels::MemoryForward layer{tables.view(), y.view()};
  EXPECT_THROW(kernels::memory_lookup_forward(cpu, 5, codes.view(), weights.view(), {&layer, 1}), ShapeError);
  EXPECT_THROW(kernels::memory_lookup_forward(cpu, 4, codes.view(), weights.view(), {}), ShapeError);
  const kernels::MemoryBackward back{tables.view(), y.view(), GradMode::overwrite, {}};
  EXPECT_THROW(kernels::memory_lookup_backward(cpu, 4, codes.view(), weights.view(), {&back, 1}, dweights.view(),
                                               order.vector()),
               ShapeError);  // workspace
}

}  // namespace
}  // namespace tforge
