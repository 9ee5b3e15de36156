// Every verb with different data on each rank, against numbers worked out by hand.
#include "parallel/communicator.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "core/errors.h"
#include "support/mpi_world.h"

namespace tforge {
namespace {

template <class T>
class CommunicatorTest : public testing::Test {
 protected:
  Tensor tensor(const std::vector<T>& values) {
    return Tensor::of<T>(allocator_, Shape{static_cast<std::int64_t>(values.size())}, values, Purpose::communication);
  }
  static std::vector<T> values(const Tensor& t) { return {t.span<T>().begin(), t.span<T>().end()}; }

  Communicator& world_ = test_world();
  const int rank_ = world_.rank();
  const int size_ = world_.size();
  Allocator allocator_;
  Stream stream_;
};
using Types = testing::Types<float, double>;
TYPED_TEST_SUITE(CommunicatorTest, Types);

TYPED_TEST(CommunicatorTest, AllReduceSumsAndTakesTheLargest) {
  using T = TypeParam;
  const auto r = static_cast<T>(this->rank_);
  const auto p = static_cast<T>(this->size_);
  Tensor x = this->tensor({r + 1, -r, T(0.5)});
  this->world_.all_reduce(this->stream_, x.view(), ReduceOp::sum);
  EXPECT_EQ(this->values(x), (std::vector<T>{p * (p + 1) / 2, -p * (p - 1) / 2, p / 2}));
  Tensor y = this->tensor({r, -r, r == 1 ? T(7) : T(-7)});
  this->world_.all_reduce(this->stream_, y.view(), ReduceOp::max);
  EXPECT_EQ(this->values(y), (std::vector<T>{p - 1, 0, 7}));
}

TYPED_TEST(CommunicatorTest, BroadcastFromEachRoot) {
  using T = TypeParam;
  for (int root = 0; root < this->size_; ++root) {
    const auto r = static_cast<T>(this->rank_);
    Tensor x = this->tensor({r * 10, r * 10 + 1});
    this->world_.broadcast(this->stream_, x.view(), root);
    EXPECT_EQ(this->values(x), (std::vector<T>{T(root) * 10, T(root) * 10 + 1}));
  }
}

TYPED_TEST(CommunicatorTest, AllGatherOfUnevenBlocks) {
  using T = TypeParam;
  // Rank r contributes r times its number: rank 0 nothing.
  std::vector<std::int64_t> counts;
  std::vector<T> expected;
  for (int r = 0; r < this->size_; ++r) {
    counts.push_back(r);
    expected.insert(expected.end(), static_cast<std::size_t>(r), T(r) + T(0.25));
  }
  const auto mine = static_cast<std::size_t>(this->rank_);
  const Tensor send = this->tensor(std::vector<T>(mine, static_cast<T>(this->rank_) + T(0.25)));
  Tensor receive = this->tensor(std::vector<T>(expected.size(), T(-1)));
  this->world_.all_gather(this->stream_, send.view(), receive.view(), counts);
  EXPECT_EQ(this->values(receive), expected);

  // Each rank's block already at its place.
  std::int64_t place = std::accumulate(counts.begin(), counts.begin() + this->rank_, std::int64_t{0});
  Tensor in_place = this->tensor(std::vector<T>(expected.size(), T(-1)));
  for (std::size_t i = 0; i < mine; ++i) {
    in_place.span<T>()[static_cast<std::size_t>(place) + i] = static_cast<T>(this->rank_) + T(0.25);
  }
  const Tensor own = in_place.rows(place, this->rank_);
  this->world_.all_gather(this->stream_, own.view(), in_place.view(), counts);
  EXPECT_EQ(this->values(in_place), expected);
}

TYPED_TEST(CommunicatorTest, ReduceScatterOfUnevenBlocks) {
  using T = TypeParam;
  // Rank s sends to rank r (r + 1) elements of value 100 r + s + 1.
  std::vector<std::int64_t> counts;
  std::vector<T> values;
  for (int r = 0; r < this->size_; ++r) {
    counts.push_back(r + 1);
    values.insert(values.end(), static_cast<std::size_t>(r) + 1, static_cast<T>(100 * r + this->rank_ + 1));
  }
  const auto mine = static_cast<std::size_t>(this->rank_) + 1;
  Tensor receive = this->tensor(std::vector<T>(mine, T(-1)));
  const Tensor send = this->tensor(values);
  this->world_.reduce_scatter(this->stream_, send.view(), receive.view(), counts);
  const int p = this->size_;
  EXPECT_EQ(this->values(receive), std::vector<T>(mine, static_cast<T>(100 * this->rank_ * p + p * (p + 1) / 2)));
}

TYPED_TEST(CommunicatorTest, ReduceScatterInPlace) {
  using T = TypeParam;
  // Sizes on both sides of the borders at which MPI changes its algorithm; rank 1 owns nothing.
  for (const std::int64_t n : {1, 1000, 100000}) {
    std::vector<std::int64_t> counts;
    for (int r = 0; r < this->size_; ++r) counts.push_back(r == 1 ? 0 : n + r);
    const std::int64_t all = std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
    const std::int64_t first = std::accumulate(counts.begin(), counts.begin() + this->rank_, std::int64_t{0});
    std::vector<T> values;
    for (std::int64_t i = 0; i < all; ++i) values.push_back(static_cast<T>(i % 1000 + this->rank_));
    Tensor send = this->tensor(values);
    Tensor own = send.rows(first, counts[static_cast<std::size_t>(this->rank_)]);
    this->world_.reduce_scatter(this->stream_, send.view(), own.view(), counts);
    const int p = this->size_;
    std::vector<T> expected;
    for (std::int64_t i = first; i < first + own.elements(); ++i) {
      expected.push_back(static_cast<T>(i % 1000 * p + p * (p - 1) / 2));
    }
    EXPECT_EQ(this->values(own), expected) << n;
  }
}

TYPED_TEST(CommunicatorTest, EveryRankGetsTheSameBitsAtEverySize) {
  using T = TypeParam;
  // Sizes on both sides of the borders at which MPI changes its algorithm; values whose sum depends on the order.
  for (const std::int64_t n : {1, 3, 1000, 2500, 20001, 300007}) {
    Tensor x = Tensor::empty(this->allocator_, Shape{n}, dtype_of<T>::value, Purpose::communication);
    for (std::int64_t i = 0; i < n; ++i) {
      x.span<T>()[static_cast<std::size_t>(i)] = T(1) / static_cast<T>(3 * i + 7 * this->rank_ * this->rank_ + 1);
    }
    Tensor again = x.clone(this->allocator_);
    this->world_.all_reduce(this->stream_, x.view(), ReduceOp::sum);
    this->world_.all_reduce(this->stream_, again.view(), ReduceOp::sum);
    const auto* bytes = reinterpret_cast<const char*>(x.span<T>().data());
    const std::string mine(bytes, x.bytes());
    for (const std::string& other : this->world_.all_gather_bytes(mine)) EXPECT_TRUE(other == mine) << n;
    EXPECT_EQ(std::memcmp(bytes, again.span<T>().data(), x.bytes()), 0) << n;
  }
}

TYPED_TEST(CommunicatorTest, StartedReductionsAreCompleteAfterFinish) {
  using T = TypeParam;
  // Several at a time, sums that depend on the order, with and without progress in between.
  for (const int polls : {0, 3}) {
    std::vector<Tensor> tensors, again;
    for (const std::int64_t n : {1, 1000, 20001, 300007}) {
      Tensor x = Tensor::empty(this->allocator_, Shape{n}, dtype_of<T>::value, Purpose::communication);
      for (std::int64_t i = 0; i < n; ++i) {
        x.span<T>()[static_cast<std::size_t>(i)] = T(1) / static_cast<T>(3 * i + 7 * this->rank_ * this->rank_ + 1);
      }
      again.push_back(x.clone(this->allocator_));
      tensors.push_back(std::move(x));
    }
    for (auto* group : {&tensors, &again}) {
      for (Tensor& x : *group) {
        this->world_.start_reduce(this->stream_, x.view(), Communicator::kEveryRank);
        for (int i = 0; i < polls; ++i) this->world_.progress();
      }
      EXPECT_THROW(this->world_.barrier(), InternalError);  // not before finish
      this->world_.finish();
    }
    for (std::size_t k = 0; k < tensors.size(); ++k) {
      const Tensor& x = tensors[k];
      const auto* bytes = reinterpret_cast<const char*>(x.span<T>().data());
      const std::string mine(bytes, x.bytes());
      for (const std::string& other : this->world_.all_gather_bytes(mine)) EXPECT_TRUE(other == mine) << k;
      EXPECT_EQ(std::memcmp(bytes, again[k].template span<T>().data(), x.bytes()), 0) << k;
      T expected = 0;
      for (int r = 0; r < this->size_; ++r) expected += T(1) / static_cast<T>(7 * r * r + 1);
      EXPECT_NEAR(x.span<T>()[0], expected, 1e-6);
    }
  }
  // On one rank: element r of the tensor on rank r.
  const auto rank = static_cast<T>(this->rank_);
  Tensor x = this->tensor(std::vector<T>(static_cast<std::size_t>(this->size_), rank + 1));
  for (int root = 0; root < this->size_; ++root) this->world_.start_reduce(this->stream_, x.rows(root, 1).view(), root);
  this->world_.finish();
  std::vector<T> expected(static_cast<std::size_t>(this->size_), rank + 1);
  expected[static_cast<std::size_t>(this->rank_)] = static_cast<T>(this->size_ * (this->size_ + 1) / 2);
  EXPECT_EQ(this->values(x), expected);
  this->world_.finish();  // of nothing
  this->world_.progress();
}

TYPED_TEST(CommunicatorTest, RefusesOperandsThatDoNotFit) {
  Tensor a = this->tensor({1, 2, 3});
  Tensor b = this->tensor({1, 2, 3, 4});
  const std::vector<std::int64_t> counts(static_cast<std::size_t>(this->size_), 1);
  EXPECT_THROW(this->world_.all_gather(this->stream_, a.view(), b.view(), counts), ShapeError);
  EXPECT_THROW(this->world_.reduce_scatter(this->stream_, b.view(), a.view(), counts), ShapeError);
  EXPECT_THROW(this->world_.all_gather(this->stream_, a.view(), b.view(), std::vector<std::int64_t>{3}), ShapeError);
  EXPECT_THROW(this->world_.broadcast(this->stream_, a.view(), this->size_), InternalError);
  Tensor m = b.reshaped(Shape{2, 2});
  EXPECT_THROW(this->world_.all_reduce(this->stream_, m.view().column_range(0, 1), ReduceOp::sum), ShapeError);
  Tensor half = Tensor::zeros(this->allocator_, Shape{3}, DType::bf16, Purpose::communication);
  EXPECT_THROW(this->world_.all_reduce(this->stream_, half.view(), ReduceOp::sum), DTypeError);
}

TEST(Communicator, ReducesIntegersAndMovesHalves) {
  Communicator& world = test_world();
  Allocator allocator;
  Stream stream;
  const std::vector<std::int32_t> values{world.rank(), 1 << 20};
  Tensor x = Tensor::of<std::int32_t>(allocator, Shape{2}, values, Purpose::communication);
  world.all_reduce(stream, x.view(), ReduceOp::sum);
  EXPECT_EQ(x.span<std::int32_t>()[0], world.size() * (world.size() - 1) / 2);
  EXPECT_EQ(x.span<std::int32_t>()[1], world.size() << 20);
  const std::vector<bf16> halves{bf16(static_cast<float>(world.rank() + 1))};
  Tensor h = Tensor::of<bf16>(allocator, Shape{1}, halves, Purpose::communication);
  world.broadcast(stream, h.view(), 1);
  EXPECT_EQ(static_cast<float>(h.span<bf16>()[0]), 2.0F);
}

TEST(Communicator, GathersBytesOfDifferentLengths) {
  Communicator& world = test_world();
  const auto all = world.all_gather_bytes(std::string(static_cast<std::size_t>(world.rank()) * 3, 'x') + '\0');
  ASSERT_EQ(all.size(), static_cast<std::size_t>(world.size()));
  for (std::size_t r = 0; r < all.size(); ++r) EXPECT_EQ(all[r], std::string(r * 3, 'x') + '\0');
}

TEST(Communicator, SplitsByColorAndOrdersByKey) {
  Communicator& world = test_world();
  // Even and odd ranks, each in reverse order.
  const auto part = world.split(world.rank() % 2, -world.rank());
  const int members = (world.size() + 1 - world.rank() % 2) / 2;
  EXPECT_EQ(part->size(), members);
  EXPECT_EQ(part->rank(), members - 1 - world.rank() / 2);
  const auto all = part->all_gather_bytes(std::to_string(world.rank()));
  for (int i = 0; i < members; ++i) {
    EXPECT_EQ(all[static_cast<std::size_t>(i)], std::to_string(2 * (members - 1 - i) + world.rank() % 2));
  }
}

TEST(Communicator, CountsItsTraffic) {
  Communicator& world = test_world();
  Allocator allocator;
  Stream stream;
  Tensor x = Tensor::zeros(allocator, Shape{100}, DType::f64, Purpose::communication);
  const auto before = world.traffic();
  world.all_reduce(stream, x.view(), ReduceOp::sum);
  EXPECT_EQ(world.traffic().calls - before.calls, 1U);
  EXPECT_EQ(world.traffic().bytes - before.bytes, 800U);
  EXPECT_GT(world.traffic().seconds, before.seconds);
  EXPECT_NEAR(world.traffic().seconds - before.seconds, world.traffic().exposed_seconds - before.exposed_seconds, 1e-9);
  const auto blocking = world.traffic();
  world.start_reduce(stream, x.view(), Communicator::kEveryRank);
  world.start_reduce(stream, Tensor::zeros(allocator, Shape{0}, DType::f64, Purpose::communication).view(), 0);
  EXPECT_EQ(world.traffic().seconds, blocking.seconds);  // not before it is complete
  world.finish();
  EXPECT_EQ(world.traffic().calls - blocking.calls, 2U);
  EXPECT_EQ(world.traffic().bytes - blocking.bytes, 800U);
  EXPECT_GT(world.traffic().seconds, blocking.seconds);
  EXPECT_GT(world.traffic().exposed_seconds, blocking.exposed_seconds);
}

TEST(Communicator, OfOneRankCopies) {
  Allocator allocator;
  Stream stream;
  const auto self = create_self();
  const std::vector<float> values{1, 2, 3};
  const Tensor x = Tensor::of<float>(allocator, Shape{3}, values, Purpose::communication);
  Tensor y = Tensor::zeros(allocator, Shape{3}, DType::f32, Purpose::communication);
  Tensor z = Tensor::zeros(allocator, Shape{3}, DType::f32, Purpose::communication);
  const std::vector<std::int64_t> counts{3};
  self->all_gather(stream, x.view(), y.view(), counts);
  self->reduce_scatter(stream, x.view(), z.view(), counts);
  EXPECT_TRUE(std::ranges::equal(y.span<float>(), values));
  EXPECT_TRUE(std::ranges::equal(z.span<float>(), values));
  EXPECT_EQ(self->size(), 1);
  EXPECT_EQ(self->all_gather_bytes("a"), std::vector<std::string>{"a"});
  EXPECT_THROW(self->all_gather(stream, x.view(), y.view(), std::vector<std::int64_t>{2}), ShapeError);
}

}  // namespace
}  // namespace tforge
