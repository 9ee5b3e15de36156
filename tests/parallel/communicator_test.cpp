// Every verb with different data on each rank, against numbers worked out by hand.
#include "parallel/communicator.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <string>
#include <type_traits>
#include <vector>

#include "core/device_queue.h"
#include "core/errors.h"
#include "parallel/device_world.h"
#include "support/mpi_world.h"
#include "support/nccl.h"

namespace tforge {
namespace {

/// Where the tensors of a test lie, and who moves them.
struct OnHost {
  static constexpr const char* kName = "Host";
  const std::string skipped;
  Communicator& world = test_world();
  Stream stream;
  Allocator memory;
};

/// Where `why_not` has a reason, an empty place, whose tests are skipped.
template <std::unique_ptr<Communicator> (*create)(Communicator&, const Stream&), std::string (*why_not)(int ranks)>
struct OnCuda {
  const std::string skipped = why_not(test_world().size());
  DeviceQueue queue{skipped.empty() ? Device::cuda : Device::cpu,
                    test_world().rank() % std::max(devices_of(Device::cuda).count, 1)};
  std::unique_ptr<Communicator> its_world = skipped.empty() ? create(test_world(), queue.stream()) : create_self();
  Communicator& world = *its_world;
  Stream& stream = queue.stream();
  Allocator memory{stream};
};
struct CudaNccl : OnCuda<create_nccl, test::why_no_nccl> {
  static constexpr const char* kName = "CudaNccl";
};
struct CudaStaged : OnCuda<create_staged, test::why_no_device> {
  static constexpr const char* kName = "CudaStaged";
};

template <class T, class P>
struct Kind {
  using Value = T;
  using Place = P;
};
struct KindNames {
  template <class K>
  static std::string GetName(int) {  // NOLINT(readability-identifier-naming): GoogleTest's
    return K::Place::kName + std::string(std::is_same_v<typename K::Value, float> ? "F32" : "F64");
  }
};

template <class K>
class CommunicatorTest : public testing::Test {
 protected:
  using V = typename K::Value;
  void SetUp() override {
    if (!place_.skipped.empty()) GTEST_SKIP() << place_.skipped;
  }
  Tensor tensor(const std::vector<V>& values) {
    return Tensor::of<V>(allocator_, Shape{static_cast<std::int64_t>(values.size())}, values, Purpose::communication);
  }
  std::vector<V> values(const Tensor& t) {
    const Tensor here = t.clone(host_);
    return {here.span<V>().begin(), here.span<V>().end()};
  }
  /// Every rank's `mine` has the same bits.
  bool agreed(const std::vector<V>& mine) {
    const std::string bytes(reinterpret_cast<const char*>(mine.data()), mine.size() * sizeof(V));
    const auto all = world_.all_gather_bytes(bytes);
    return std::ranges::all_of(all, [&](const std::string& other) { return other == bytes; });
  }
  /// Whose sum over the ranks depends on the order.
  std::vector<V> unlike(std::int64_t n) const {
    std::vector<V> v;
    for (std::int64_t i = 0; i < n; ++i) v.push_back(V(1) / static_cast<V>(3 * i + 7 * rank_ * rank_ + 1));
    return v;
  }

  typename K::Place place_;
  Communicator& world_ = place_.world;
  Allocator& allocator_ = place_.memory;
  Stream& stream_ = place_.stream;
  Allocator host_;
  const int rank_ = world_.rank();
  const int size_ = world_.size();
};
using Types = testing::Types<Kind<float, OnHost>, Kind<double, OnHost>, Kind<float, CudaStaged>,
                             Kind<double, CudaStaged>, Kind<float, CudaNccl>, Kind<double, CudaNccl>>;
TYPED_TEST_SUITE(CommunicatorTest, Types, KindNames);

TYPED_TEST(CommunicatorTest, AllReduceSumsAndTakesTheLargest) {
  using T = typename TypeParam::Value;
  const auto r = static_cast<T>(this->rank_);
  const auto p = static_cast<T>(this->size_);
  Tensor x = this->tensor({r + 1, -r, T(0.5)});
  this->world_.all_reduce(this->stream_, x.view(), ReduceOp::sum);
  EXPECT_EQ(this->values(x), (std::vector<T>{p * (p + 1) / 2, -p * (p - 1) / 2, p / 2}));
  Tensor y = this->tensor({r, -r, r == p - 1 ? T(7) : T(-7)});
  this->world_.all_reduce(this->stream_, y.view(), ReduceOp::max);
  EXPECT_EQ(this->values(y), (std::vector<T>{p - 1, 0, 7}));
}

TYPED_TEST(CommunicatorTest, BroadcastFromEachRoot) {
  using T = typename TypeParam::Value;
  for (int root = 0; root < this->size_; ++root) {
    const auto r = static_cast<T>(this->rank_);
    Tensor x = this->tensor({r * 10, r * 10 + 1});
    this->world_.broadcast(this->stream_, x.view(), root);
    EXPECT_EQ(this->values(x), (std::vector<T>{T(root) * 10, T(root) * 10 + 1}));
  }
}

TYPED_TEST(CommunicatorTest, AllGatherOfUnevenBlocks) {
  using T = typename TypeParam::Value;
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
  std::vector<T> at_its_place(expected.size(), T(-1));
  for (std::size_t i = 0; i < mine; ++i) {
    at_its_place[static_cast<std::size_t>(place) + i] = static_cast<T>(this->rank_) + T(0.25);
  }
  Tensor in_place = this->tensor(at_its_place);
  const Tensor own = in_place.rows(place, this->rank_);
  this->world_.all_gather(this->stream_, own.view(), in_place.view(), counts);
  EXPECT_EQ(this->values(in_place), expected);
}

TYPED_TEST(CommunicatorTest, ReduceScatterOfUnevenBlocks) {
  using T = typename TypeParam::Value;
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
  using T = typename TypeParam::Value;
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
  using T = typename TypeParam::Value;
  // Sizes on both sides of the borders at which MPI changes its algorithm; values whose sum depends on the order.
  for (const std::int64_t n : {1, 3, 1000, 2500, 20001, 300007}) {
    Tensor x = this->tensor(this->unlike(n)), again = x.clone(this->allocator_);
    this->world_.all_reduce(this->stream_, x.view(), ReduceOp::sum);
    this->world_.all_reduce(this->stream_, again.view(), ReduceOp::sum);
    const std::vector<T> sums = this->values(x);
    EXPECT_TRUE(this->agreed(sums)) << n;
    EXPECT_EQ(sums, this->values(again)) << n;
  }
}

TYPED_TEST(CommunicatorTest, StartedReductionsAreCompleteAfterFinish) {
  using T = typename TypeParam::Value;
  // Several at a time, sums that depend on the order, with and without progress in between.
  for (const int polls : {0, 3}) {
    std::vector<Tensor> tensors, again;
    for (const std::int64_t n : {1, 1000, 20001, 300007}) {
      tensors.push_back(this->tensor(this->unlike(n)));
      again.push_back(tensors.back().clone(this->allocator_));
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
      const std::vector<T> sums = this->values(tensors[k]);
      EXPECT_TRUE(this->agreed(sums)) << k;
      EXPECT_EQ(sums, this->values(again[k])) << k;
      T expected = 0;
      for (int r = 0; r < this->size_; ++r) expected += T(1) / static_cast<T>(7 * r * r + 1);
      EXPECT_NEAR(sums[0], expected, 1e-6);
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

TYPED_TEST(CommunicatorTest, PartsAndViewsOfTheHostGoTheirWay) {
  using T = typename TypeParam::Value;
  // Even and odd ranks, each with tensors where the whole has them.
  const auto part = this->world_.split(this->rank_ % 2, this->rank_);
  Tensor x = this->tensor({static_cast<T>(this->rank_)});
  part->all_reduce(this->stream_, x.view(), ReduceOp::sum);
  T expected = 0;
  for (int r = this->rank_ % 2; r < this->size_; r += 2) expected += static_cast<T>(r);
  EXPECT_EQ(this->values(x), std::vector<T>{expected});
  // Of the host, whatever the device is; both kinds may be under way.
  const std::vector<T> ones(3, T(1));
  Tensor here = Tensor::of<T>(this->host_, Shape{3}, ones, Purpose::communication);
  Tensor there = this->tensor(ones);
  this->world_.all_reduce(this->stream_, here.view(), ReduceOp::sum);
  this->world_.start_reduce(this->stream_, there.view(), Communicator::kEveryRank);
  this->world_.start_reduce(this->stream_, here.view(), Communicator::kEveryRank);
  this->world_.finish();
  EXPECT_EQ(this->values(here), std::vector<T>(3, static_cast<T>(this->size_ * this->size_)));
  EXPECT_EQ(this->values(there), std::vector<T>(3, static_cast<T>(this->size_)));
}

TYPED_TEST(CommunicatorTest, CountsItsTraffic) {
  using T = typename TypeParam::Value;
  Tensor x = this->tensor(std::vector<T>(100));
  this->world_.all_reduce(this->stream_, x.view(), ReduceOp::sum);  // the first one makes the group
  wait(this->stream_);
  const auto before = this->world_.traffic();
  this->world_.all_reduce(this->stream_, x.view(), ReduceOp::sum);
  this->world_.start_reduce(this->stream_, x.view(), Communicator::kEveryRank);
  this->world_.finish();
  wait(this->stream_);
  const auto after = this->world_.traffic();
  EXPECT_EQ(after.calls - before.calls, 2U);
  EXPECT_EQ(after.bytes - before.bytes, 200 * sizeof(T));
  EXPECT_GT(after.seconds, before.seconds);
  EXPECT_GT(after.exposed_seconds, before.exposed_seconds);
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
}

TYPED_TEST(CommunicatorTest, AddsBf16OnDevicesAlone) {
  const std::vector<bf16> halves{bf16(1.0F), bf16(static_cast<float>(this->world_.rank()))};
  Tensor x = Tensor::of<bf16>(this->allocator_, Shape{2}, halves, Purpose::communication);
  const auto add = [&] { this->world_.all_reduce(this->stream_, x.view(), ReduceOp::sum); };
  if (!std::is_same_v<typename TypeParam::Place, CudaNccl>) {
    EXPECT_THROW(add(), DTypeError);
    return;
  }
  add();
  Allocator host;
  const Tensor sum = x.clone(host);
  EXPECT_EQ(static_cast<float>(sum.span<bf16>()[0]), static_cast<float>(this->size_));
  EXPECT_EQ(static_cast<float>(sum.span<bf16>()[1]), static_cast<float>(this->size_ * (this->size_ - 1) / 2));
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
