#include "parallel/grad_sync.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "autograd/tape.h"
#include "core/errors.h"
#include "parallel/tp_reducer.h"
#include "support/mpi_world.h"

namespace tforge {
namespace {

constexpr std::array<Reduction, 3> kReductions = {Reduction::blocking, Reduction::nonblocking, Reduction::polled};

/// Three parameters of 1000, 5 and 2000 elements, each a bucket, the last first.
std::vector<Bucket> three_buckets() {
  const std::array<FlatBlock, 3> blocks = {{{0, 1000, 10}, {1008, 5, 1}, {1024, 2000, 20}}};
  return make_buckets(blocks, 3024, 1, test_world().size());
}

TEST(GradSync, SumsTheFlatGradientsOfAllRanksInEachWay) {
  Communicator& world = test_world();
  const float p = static_cast<float>(world.size());
  for (const Reduction reduction : kReductions) {
    Allocator allocator;
    Stream stream;
    Tensor flat = Tensor::zeros(allocator, Shape{3024}, DType::f32, Purpose::gradients);
    GradSync sync(world, flat, three_buckets(), reduction);
    for (int step = 0; step < 3; ++step) {
      for (std::size_t i = 0; i < 3024; ++i) {
        flat.span<float>()[i] = static_cast<float>(world.rank() * (i % 7 == 0 ? 2 : 1)) + static_cast<float>(step);
      }
      sync.gradient_ready(2);  // of an earlier micro-batch: nothing may start
      sync.begin(stream);
      // In another order than the buckets'; parameter 1 is never heard of.
      sync.gradient_ready(0);
      sync.node_done();
      sync.gradient_ready(2);
      sync.node_done();
      sync.finish(stream);
      for (std::size_t i = 0; i < 3024; ++i) {
        const float sum = p * (p - 1) / 2 * (i % 7 == 0 ? 2.0F : 1.0F) + p * static_cast<float>(step);
        ASSERT_EQ(flat.span<float>()[i], sum) << i;
      }
    }
  }
}

TEST(GradSync, StartsABucketWhenItsLastGradientIsFinal) {
  Communicator& world = test_world();
  Allocator allocator;
  Stream stream;
  Tensor flat = Tensor::zeros(allocator, Shape{3024}, DType::f32, Purpose::gradients);
  GradSync sync(world, flat, three_buckets(), Reduction::nonblocking);
  const std::uint64_t calls = world.traffic().calls, bytes = world.traffic().bytes;
  sync.begin(stream);
  sync.gradient_ready(1);  // waits for the bucket before it
  EXPECT_EQ(world.traffic().calls, calls);
  sync.gradient_ready(2);
  EXPECT_EQ(world.traffic().calls, calls + 2);
  EXPECT_EQ(world.traffic().bytes, bytes + std::uint64_t{2016} * 4);
  EXPECT_THROW(sync.gradient_ready(2), InternalError);  // a second time
  sync.finish(stream);
  EXPECT_EQ(world.traffic().calls, calls + 3);
  EXPECT_EQ(world.traffic().bytes, bytes + std::uint64_t{3024} * 4);
}

TEST(LookupSync, AddsTheRowsOfAllRanksToTheTable) {
  Communicator& world = test_world();
  Allocator allocator;
  Stream stream;
  Tape tape(allocator, stream, TapeMode::training);
  const int rank = world.rank(), p = world.size();
  // Rank r looks up r + 1 rows: 0, 1, ..., r of a table whose rows 1, 2 and so on are held here.
  std::vector<std::int64_t> rows;
  for (int r = 0; r < p; ++r) rows.push_back(r + 1);
  LookupSync lookup(allocator, world, rows, 2, DType::f32);
  for (int step = 0; step < 2; ++step) {
    std::vector<std::int32_t> tokens(static_cast<std::size_t>(rank) + 1);
    std::iota(tokens.begin(), tokens.end(), 0);
    const Tensor ids = Tensor::of<std::int32_t>(allocator, Shape{rank + 1}, tokens, Purpose::activations);
    const Tensor h = Tensor::zeros(allocator, Shape{rank + 1, 2}, DType::f32, Purpose::activations);
    Tensor table = Tensor::zeros(allocator, Shape{p, 2}, DType::f32, Purpose::gradients);
    for (float& x : table.span<float>()) x = 100;
    const Var leaf = lookup.leaf(h, ids);
    Grad grad = leaf.grad();
    const GradTarget to = grad.target(tape);
    EXPECT_EQ(to.mode, GradMode::overwrite) << "step " << step;
    std::fill_n(to.view.as<float>(), 2 * (rank + 1), static_cast<float>(rank + 1));
    lookup.finish(stream, 1, table.view());
    for (int row = 1; row <= p; ++row) {
      // Ranks row, row + 1, ... looked it up.
      float sum = 100;
      for (int r = row; r < p; ++r) sum += static_cast<float>(r + 1);
      EXPECT_EQ(table.span<float>()[static_cast<std::size_t>(row - 1) * 2 + 1], sum) << row;
    }
  }
  const Tensor wrong = Tensor::zeros(allocator, Shape{p + 5, 2}, DType::f32, Purpose::activations);
  EXPECT_THROW(lookup.leaf(wrong, wrong), ShapeError);
}

TEST(LookupSync, PaysWhenTheRowsAreFewerThanTwoTables) {
  EXPECT_TRUE(LookupSync::pays(1024, 50304, 768, DType::f32));
  EXPECT_FALSE(LookupSync::pays(4096, 256, 128, DType::f32));
  // 2 * 100 rows of 4 elements; each looked-up row is a token longer.
  EXPECT_TRUE(LookupSync::pays(159, 100, 4, DType::f32));
  EXPECT_FALSE(LookupSync::pays(160, 100, 4, DType::f32));
}

/// Six elements as three rows of two, in two buckets: the last two rows, then the first.
std::vector<Bucket> two_buckets(int ranks) {
  const std::array<FlatBlock, 2> blocks = {{{0, 2, 2}, {2, 4, 2}}};
  return make_buckets(blocks, 6, 4, ranks);
}

TEST(GradSync, ScattersTheSumsAndGathersTheValuesInEachWay) {
  Communicator& world = test_world();
  const auto r = static_cast<float>(world.rank());
  const auto p = static_cast<float>(world.size());
  const std::vector<float> mine = {r, 1, -2 * r, 0, 1, r};
  const std::vector<float> sums = {p * (p - 1) / 2, p, -p * (p - 1), 0, p, p * (p - 1) / 2};
  for (const Reduction reduction : kReductions) {
    Allocator allocator;
    Stream stream;
    Tensor flat = Tensor::of<float>(allocator, Shape{6}, mine, Purpose::gradients);
    GradSync sync(world, flat, two_buckets(world.size()), reduction, Sums::at_owner);
    sync.begin(stream);
    sync.gradient_ready(1);
    sync.node_done();
    sync.gradient_ready(0);
    sync.finish(stream);
    Tensor values = Tensor::zeros(allocator, Shape{6}, DType::f32, Purpose::weights);
    std::int64_t owned = 0;
    for (const Bucket& bucket : sync.buckets()) {
      for (std::int64_t i = bucket.begin(world.rank()); i < bucket.end(world.rank()); ++i) {
        const auto k = static_cast<std::size_t>(i);
        EXPECT_EQ(flat.span<float>()[k], sums[k]) << i;
        values.span<float>()[k] = 10 * r + static_cast<float>(i);
        ++owned;
      }
    }
    EXPECT_LT(owned, 6);
    sync.gather(stream, values);
    for (const Bucket& bucket : sync.buckets()) {
      for (int owner = 0; owner < world.size(); ++owner) {
        for (std::int64_t i = bucket.begin(owner); i < bucket.end(owner); ++i) {
          EXPECT_EQ(values.span<float>()[static_cast<std::size_t>(i)], static_cast<float>(10 * owner + i)) << i;
        }
      }
    }
    // What is updated everywhere has nothing to be gathered.
    const std::vector<float> before(values.span<float>().begin(), values.span<float>().end());
    for (float& x : values.span<float>()) x += r;
    GradSync(world, flat, two_buckets(world.size()), reduction, Sums::everywhere).gather(stream, values);
    for (std::size_t i = 0; i < 6; ++i) EXPECT_EQ(values.span<float>()[i], before[i] + r);
  }
}

TEST(GlobalNorm, CountsEveryElementOnce) {
  Communicator& world = test_world();
  Stream stream;
  // Shards with sums of squares 1, 2, 3, ... and a replicated parameter of 4.
  const int p = world.size();
  EXPECT_EQ(global_norm(stream, world, world.rank() + 1, 4), std::sqrt(p * (p + 1) / 2 + 4.0));
  EXPECT_EQ(global_norm(stream, *create_self(), 5, 4), 3);
  // What is replicated may differ in its last bits, the norm does not.
  const double norm = global_norm(stream, world, 1, 4 + 1e-14 * world.rank());
  for (const std::string& other : world.all_gather_bytes(fmt::format("{}", norm))) {
    EXPECT_EQ(other, fmt::format("{}", norm));
  }
}

TEST(GlobalNorm, IsNotFiniteOnAnyRankWhenItIsNotOnOne) {
  Communicator& world = test_world();
  Stream stream;
  const double mine = world.rank() == 1 ? std::numeric_limits<double>::quiet_NaN() : 1;
  EXPECT_FALSE(std::isfinite(global_norm(stream, world, mine, 4)));
  EXPECT_FALSE(std::isfinite(global_norm(stream, world, 4, mine)));
}

TEST(TpReducer, ReducesOverTheRanks) {
  Communicator& world = test_world();
  Stream stream;
  TpReducer reducer(world);
  EXPECT_FALSE(reducer.is_identity());
  std::vector<double> x{1.0 + world.rank(), -1.0 * world.rank()};
  const TensorView view{x.data(), DType::f64, Device::cpu, Shape{2}, 2};
  reducer.max(stream, view, view);
  const double p = world.size();
  EXPECT_EQ(x, (std::vector<double>{p, 0}));
  reducer.sum(stream, view, view);
  EXPECT_EQ(x, (std::vector<double>{p * p, 0}));
  const auto self = create_self();
  EXPECT_TRUE(TpReducer(*self).is_identity());
}

}  // namespace
}  // namespace tforge
