// Shape, Tensor and its views.
#include "core/tensor.h"

#include <gtest/gtest.h>

#include <vector>

#include "support/scratch.h"

namespace tforge {
namespace {

using test::error_of;

TEST(Shape, Extents) {
  const Shape s{3, 19, 32};
  EXPECT_EQ(s.rank(), 3);
  EXPECT_EQ(s.elements(), 3 * 19 * 32);
  EXPECT_EQ(s.rows(), 3 * 19);
  EXPECT_EQ(s.columns(), 32);
  EXPECT_EQ(s[1], 19);
  EXPECT_EQ(s.text(), "[3, 19, 32]");
}

TEST(Shape, ScalarsVectorsAndEmptyOnes) {
  EXPECT_EQ(Shape{}.elements(), 1);
  EXPECT_EQ(Shape{}.rows(), 1);
  EXPECT_EQ(Shape{}.columns(), 1);
  EXPECT_EQ(Shape{}.text(), "[]");
  EXPECT_EQ(Shape{5}.rows(), 1);
  EXPECT_EQ(Shape{5}.columns(), 5);
  EXPECT_EQ((Shape{0, 7}.elements()), 0);
  EXPECT_EQ((Shape{0, 7}.columns()), 7);
}

TEST(Shape, EqualityIsOfRankAndExtents) {
  EXPECT_EQ((Shape{2, 3}), (Shape{2, 3}));
  EXPECT_FALSE((Shape{2, 3}) == (Shape{3, 2}));
  EXPECT_FALSE((Shape{2}) == (Shape{2, 0}));
}

TEST(Shape, RefusesFiveAxesAndNegativeExtents) {
  EXPECT_EQ(error_of<ShapeError>([] { Shape{1, 1, 1, 1, 1}; }), "a shape has at most 4 axes, not 5");
  EXPECT_EQ(error_of<ShapeError>([] { Shape{2, -1}; }), "extent -1 of a shape is negative");
}

class TensorTest : public testing::Test {
 protected:
  Tensor counted(const Shape& shape) {
    Tensor t = Tensor::empty(allocator, shape, DType::f32, Purpose::weights);
    float next = 0;
    for (float& v : t.span<float>()) v = next++;
    return t;
  }
  Allocator allocator;
};

TEST_F(TensorTest, OfCopiesItsValues) {
  std::vector<double> values{1, 2, 3, 4, 5, 6};
  const Tensor t = Tensor::of<double>(allocator, Shape{2, 3}, values, Purpose::weights);
  values[0] = 100;
  EXPECT_EQ(t.dtype(), DType::f64);
  EXPECT_EQ(t.bytes(), 48U);
  EXPECT_EQ(t.span<double>()[0], 1);
  EXPECT_EQ(t.span<double>()[5], 6);
  EXPECT_EQ(error_of<ShapeError>([&] { Tensor::of<double>(allocator, Shape{4}, values, Purpose::weights); }),
            "6 values for a tensor of shape [4]");
}

TEST_F(TensorTest, CopiesRowsAndShapesShareStorage) {
  Tensor t = counted(Shape{4, 3});
  Tensor copy = t;
  Tensor middle = t.rows(1, 2);
  Tensor flat = t.reshaped(Shape{12});
  EXPECT_EQ(middle.shape(), (Shape{2, 3}));
  EXPECT_EQ(middle.span<float>()[0], 3);
  copy.span<float>()[3] = 50;
  EXPECT_EQ(middle.span<float>()[0], 50);
  middle.rows(1, 1).span<float>()[2] = 60;  // rows of rows
  EXPECT_EQ(flat.span<float>()[8], 60);
  EXPECT_EQ(t.span<float>()[8], 60);
}

TEST_F(TensorTest, RowsOfOtherRanks) {
  EXPECT_EQ(counted(Shape{5}).rows(2, 2).span<float>()[1], 3);
  const Tensor cube = counted(Shape{3, 2, 2}).rows(1, 2);
  EXPECT_EQ(cube.shape(), (Shape{2, 2, 2}));
  EXPECT_EQ(cube.span<float>()[0], 4);
  const Tensor four = counted(Shape{2, 2, 2, 2}).rows(1, 1);
  EXPECT_EQ(four.shape(), (Shape{1, 2, 2, 2}));
  EXPECT_EQ(four.span<float>()[7], 15);
  EXPECT_EQ(counted(Shape{4, 3}).rows(4, 0).elements(), 0);
}

TEST_F(TensorTest, RangesAndShapesAreChecked) {
  const Tensor t = counted(Shape{4, 3});
  EXPECT_EQ(error_of<ShapeError>([&] { t.rows(3, 2); }), "rows 3..5 of a tensor of shape [4, 3]");
  EXPECT_THROW(t.rows(-1, 2), ShapeError);
  EXPECT_THROW(t.rows(0, -1), ShapeError);
  EXPECT_THROW(counted(Shape{}).rows(0, 1), ShapeError);
  EXPECT_EQ(error_of<ShapeError>([&] {
              t.reshaped(Shape{5, 3});
            }),
            "a tensor of shape [4, 3] cannot take shape [5, 3]");
}

TEST_F(TensorTest, UniqueUntilShared) {
  Tensor t = counted(Shape{4});
  EXPECT_TRUE(t.unique());
  {
    const Tensor part = t.rows(0, 1);
    EXPECT_FALSE(t.unique());
    EXPECT_FALSE(part.unique());
  }
  EXPECT_TRUE(t.unique());
  const Tensor moved = std::move(t);
  EXPECT_TRUE(moved.unique());
  EXPECT_FALSE(static_cast<bool>(t));  // NOLINT(bugprone-use-after-move): a moved tensor is empty
  EXPECT_FALSE(Tensor().unique());
}

TEST_F(TensorTest, SelfAssignmentKeepsTheTensor) {
  Tensor t = counted(Shape{4});
  const Tensor& same = t;
  t = same;
  EXPECT_TRUE(t.unique());
  EXPECT_EQ(t.span<float>()[3], 3);
}

TEST_F(TensorTest, CloneIsApart) {
  Tensor t = counted(Shape{4, 3});
  const Tensor clone = t.rows(1, 2).clone(allocator);
  t.fill_zero();
  EXPECT_TRUE(clone.unique());
  EXPECT_EQ(clone.purpose(), Purpose::weights);
  EXPECT_EQ(clone.shape(), (Shape{2, 3}));
  EXPECT_EQ(clone.span<float>()[5], 8);
  EXPECT_EQ(t.span<float>()[5], 0);
}

TEST_F(TensorTest, FillZeroOfRowsLeavesTheOthers) {
  const Tensor t = counted(Shape{4, 3});
  t.rows(1, 2).fill_zero();
  EXPECT_EQ(t.span<float>()[2], 2);
  EXPECT_EQ(t.span<float>()[3], 0);
  EXPECT_EQ(t.span<float>()[8], 0);
  EXPECT_EQ(t.span<float>()[9], 9);
}

TEST_F(TensorTest, ReadAsAnotherTypeIsRefused) {
  Tensor t = counted(Shape{2});
  EXPECT_EQ(error_of<DTypeError>([&] { t.span<double>(); }), "a tensor of f32 was read as f64");
  EXPECT_THROW(t.view().as<std::int32_t>(), DTypeError);
}

TEST_F(TensorTest, ViewsOfRowsAndColumns) {
  Tensor t = counted(Shape{4, 6});
  const TensorView v = t.view();
  EXPECT_TRUE(v.contiguous());
  const TensorView columns = v.column_range(2, 3);
  EXPECT_EQ(columns.shape, (Shape{4, 3}));
  EXPECT_EQ(columns.row_stride, 6);
  EXPECT_FALSE(columns.contiguous());
  EXPECT_EQ(columns.as<float>()[6], 8);
  const TensorView block = columns.row_range(1, 2);  // rows keep the stride
  EXPECT_EQ(block.as<float>()[0], 8);
  EXPECT_EQ(block.as<float>()[block.row_stride + 2], 16);
  EXPECT_TRUE(columns.row_range(3, 1).contiguous());  // one row is
  EXPECT_EQ(error_of<ShapeError>([&] { columns.column_range(1, 3); }), "columns 1..4 of a view of shape [4, 3]");
  EXPECT_EQ(error_of<ShapeError>([&] { columns.row_range(4, 1); }), "rows 4..5 of a view of shape [4, 3]");
  EXPECT_THROW(v.row_range(-1, 1), ShapeError);
  const ConstTensorView readable = block;
  EXPECT_EQ(readable.as<float>(), block.as<float>());
  EXPECT_FALSE(static_cast<bool>(TensorView{}));
}

TEST_F(TensorTest, AViewOfRankThreeIsItsRows) {
  Tensor t = counted(Shape{2, 3, 4});
  EXPECT_EQ(t.view().rows(), 6);
  EXPECT_EQ(t.view().row_range(4, 1).as<float>()[0], 16);
}

}  // namespace
}  // namespace tforge
