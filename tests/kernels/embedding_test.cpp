#include "kernels/embedding.h"

#include "device_matrix.h"
#include "matrix.h"

namespace tforge {
namespace {

using test::Matrix;
Stream cpu;

template <class T>
void backward(const Matrix<std::int32_t>& tokens, const Matrix<T>& dy, std::int64_t first_row, GradMode mode,
              Matrix<T>& dtable) {
  Matrix<std::int32_t> workspace(1, kernels::embedding_workspace(tokens.columns(), dtable.rows()));
  kernels::embedding_backward(cpu, tokens.vector(), dy.view(), first_row, mode, dtable.view(), workspace.vector());
}

TEST(Embedding, ByHandOfAShard) {
  // Rows 10 and 11 are held here; 9 and 12 are not.
  const auto table = Matrix<float>::of(2, 2, {1, 2, 3, 4});
  const auto tokens = Matrix<std::int32_t>::of(1, 5, {11, 9, 10, 11, 12});
  Matrix<float> y(5, 2, 1);
  kernels::embedding_forward(cpu, tokens.vector(), table.view(), 10, y.view());
  test::expect_near(y, Matrix<float>::of(5, 2, {3, 4, 0, 0, 1, 2, 3, 4, 0, 0}), 0);
  EXPECT_TRUE(y.padding_untouched());

  const auto dy = Matrix<float>::of(5, 2, {1, 2, 100, 100, 3, 4, 5, 6, 100, 100});
  Matrix<float> dtable(3, 2, 1);  // over NaN; row 12 is held too now
  backward(tokens, dy, 10, GradMode::overwrite, dtable);
  test::expect_near(dtable, Matrix<float>::of(3, 2, {3, 4, 6, 8, 100, 100}), 0);
  backward(tokens, dy, 10, GradMode::accumulate, dtable);
  test::expect_near(dtable, Matrix<float>::of(3, 2, {6, 8, 12, 16, 200, 200}), 0);
  EXPECT_TRUE(dtable.padding_untouched());

  Matrix<float> none(4, 2);
  backward(tokens, dy, 100, GradMode::overwrite, none);  // no token here: zeros
  EXPECT_EQ(none.largest(), 0);
}

TEST(Embedding, GradientMatchesFiniteDifferences) {
  auto table = Matrix<double>::random(6, 3, 1);
  const auto tokens = Matrix<std::int32_t>::of(1, 7, {3, 0, 5, 3, 3, 7, 0});
  const auto dy = Matrix<double>::random(7, 3, 2);
  Matrix<double> y(7, 3), dtable(6, 3);
  backward(tokens, dy, 0, GradMode::overwrite, dtable);
  test::expect_gradient(table, dtable, [&] {
    kernels::embedding_forward(cpu, tokens.vector(), table.view(), 0, y.view());
    return y.dot(dy);
  });
}

TEST(Embedding, SumsInOrderWhateverTheThreads) {
  constexpr std::int64_t kTokens = 2000, kRows = 257, kColumns = 33;
  const Rng rng(1, "tokens");
  Matrix<std::int32_t> tokens(1, kTokens);
  for (std::int64_t t = 0; t < kTokens; ++t) {  // token 0 is half of the text
    const auto u = static_cast<std::uint64_t>(t);
    tokens(0, t) = u % 2 == 0 ? 0 : static_cast<std::int32_t>(rng.below(u, kRows));
  }
  const auto dy = Matrix<float>::random(kTokens, kColumns, 2, 1, 3);
  Matrix<float> want(kRows, kColumns);
  for (std::int64_t r = 0; r < kRows; ++r) {
    for (std::int64_t c = 0; c < kColumns; ++c) want(r, c) = 0;
  }
  for (std::int64_t t = 0; t < kTokens; ++t) {
    for (std::int64_t c = 0; c < kColumns; ++c) want(tokens(0, t), c) += dy(t, c);
  }
  test::at_one_and_two_threads([&](int) {
    Matrix<float> dtable(kRows, kColumns);
    backward(tokens, dy, 0, GradMode::overwrite, dtable);
    EXPECT_TRUE(dtable.same_bits(want));
  });
}

TEST(Embedding, RefusesWhatDoesNotFit) {
  Matrix<float> table(4, 3), y(5, 3), narrow(5, 2);
  Matrix<std::int32_t> tokens(1, 5), workspace(1, 8);
  Matrix<float> float_tokens(1, 5);
  EXPECT_THROW(kernels::embedding_forward(cpu, tokens.vector(), table.view(), 0, narrow.view()), ShapeError);
  EXPECT_THROW(kernels::embedding_forward(cpu, float_tokens.vector(), table.view(), 0, y.view()), DTypeError);
  EXPECT_THROW(kernels::embedding_backward(cpu, tokens.vector(), y.view(), 0, GradMode::overwrite, table.view(),
                                           workspace.vector()),
               ShapeError);  // workspace: 5 + 4 elements
}

TEST(Embedding, CudaGivesTheCpusBits) {
  test::on_cuda([](test::CudaDevice& device) {
    for (const std::int64_t columns : {1, 31, 33, 64, 260}) {
      for (const std::int64_t count : {1, 257, 2500}) {  // more than two batches of the sort
        constexpr std::int64_t kRows = 37, kFirst = 5;
        const Rng rng(1, "tokens");
        Matrix<std::int32_t> tokens(1, count), workspace(1, kernels::embedding_workspace(count, kRows));
        for (std::int64_t t = 0; t < count; ++t) {  // token 6 is half of the text; some are not held here
          const auto u = static_cast<std::uint64_t>(t);
          tokens(0, t) = u % 2 == 0 ? 6 : static_cast<std::int32_t>(rng.below(u, kRows + 2 * kFirst));
        }
        const auto table = Matrix<float>::random(kRows, columns, 1, 1, columns % 2);
        const auto dy = Matrix<float>::random(count, columns, 2, 1, columns % 2);
        Matrix<float> y(count, columns, 1), want_y(count, columns), dtable(kRows, columns), want_dtable = dtable;
        test::with_copies(
            device,
            [&](auto tokens_, auto table_, auto dy_, auto y_, auto dtable_, auto w) {
              const TensorView t = test::vector_of(tokens_);
              kernels::embedding_forward(device.stream, t, table_, kFirst, y_);
              for (const GradMode mode : {GradMode::overwrite, GradMode::accumulate}) {
                kernels::embedding_backward(device.stream, t, dy_, kFirst, mode, dtable_, test::vector_of(w));
              }
            },
            tokens, table, dy, y, dtable, workspace);
        kernels::embedding_forward(cpu, tokens.vector(), table.view(), kFirst, want_y.view());
        backward(tokens, dy, kFirst, GradMode::overwrite, want_dtable);
        backward(tokens, dy, kFirst, GradMode::accumulate, want_dtable);
        EXPECT_TRUE(y.same_bits(want_y));
        EXPECT_TRUE(dtable.same_bits(want_dtable));
        EXPECT_TRUE(y.padding_untouched());
      }
    }
  });
}

}  // namespace
}  // namespace tforge
