#include "parallel/grad_sync.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "parallel/tp_reducer.h"
#include "support/mpi_world.h"

namespace tforge {
namespace {

TEST(GradSync, SumsTheFlatGradientsOfAllRanks) {
  Communicator& world = test_world();
  Allocator allocator;
  Stream stream;
  const auto r = static_cast<float>(world.rank());
  const auto p = static_cast<float>(world.size());
  Tensor flat = Tensor::of<float>(allocator, Shape{3}, std::vector<float>{r, 1, -2 * r}, Purpose::gradients);
  const Tensor first = flat.rows(0, 1);  // a parameter's part of the flat tensor
  GradSync sync(world, flat);
  sync.finish(stream);
  EXPECT_EQ(first.span<float>()[0], p * (p - 1) / 2);
  EXPECT_EQ(flat.span<float>()[1], p);
  EXPECT_EQ(flat.span<float>()[2], -p * (p - 1));
}

TEST(GlobalNorm, CountsEveryElementOnce) {
  Communicator& world = test_world();
  Stream stream;
  // Shards with sums of squares 1, 2, 3, ... and a replicated parameter of 4.
  const int p = world.size();
  EXPECT_EQ(global_norm(stream, world, world.rank() + 1, 4), std::sqrt(p * (p + 1) / 2 + 4.0));
  EXPECT_EQ(global_norm(stream, *create_self(), 5, 4), 3);
}

TEST(GlobalNorm, IsNotFiniteOnAnyRankWhenItIsNotOnOne) {
  Communicator& world = test_world();
  Stream stream;
  const double mine = world.rank() == 1 ? std::numeric_limits<double>::quiet_NaN() : 1;
  EXPECT_FALSE(std::isfinite(global_norm(stream, world, mine, 4)));
}

TEST(TpReducer, ReducesOverTheRanks) {
  Communicator& world = test_world();
  Stream stream;
  TpReducer reducer(world);
  EXPECT_FALSE(reducer.is_identity());
  std::vector<double> x{1.0 + world.rank(), -1.0 * world.rank()};
  const TensorView view{x.data(), DType::f64, Device::cpu, Shape{2}, 2};
  reducer.max(stream, view);
  const double p = world.size();
  EXPECT_EQ(x, (std::vector<double>{p, 0}));
  reducer.sum(stream, view);
  EXPECT_EQ(x, (std::vector<double>{p * p, 0}));
  const auto self = create_self();
  EXPECT_TRUE(TpReducer(*self).is_identity());
}

}  // namespace
}  // namespace tforge
