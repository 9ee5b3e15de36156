// The Memory Layer with its tables over the ranks: the same numbers as on one rank, and with virtual shards the same
// bits.
#include "autograd/ops/memory_layer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "core/rng.h"
#include "parallel/ops/copy_to.h"
#include "parallel/ops/reduce_from.h"
#include "parallel/shard.h"
#include "parallel/tp_reducer.h"
#include "support/mpi_world.h"

namespace tforge {
namespace {

constexpr std::int64_t kRows = 9, kBits = 3, kTables = 7, kWidth = 21, kColumns = 5;
constexpr int kShards = 4;
enum class Shards : std::uint8_t { ranks, virtual_ones };

struct Result {
  std::vector<float> y, dx, dtables;  // dtables: of the rows held here, of both layers
  std::int64_t first_row = 0;
};

Tensor numbers(Allocator& allocator, const char* name, const Shape& shape, std::int64_t first_row) {
  const Rng rng(5, name);
  Tensor t = Tensor::empty(allocator, shape, DType::f32, Purpose::activations);
  auto i = static_cast<std::uint64_t>(first_row * shape.columns());
  for (float& v : t.span<float>()) v = static_cast<float>(rng.normal(i++));
  return t;
}

/// Two layers of one hash; with their tables over `tp`.
Result run(Allocator& allocator, Communicator& tp, Shards kind) {
  Stream stream;
  const ShardBorders deal = ShardBorders::even(kShards, tp.size(), "shards");
  const ShardBorders shards = ShardBorders::even(kTables, kShards, "tables");
  const ShardBorders ranks =
      kind == Shards::ranks ? ShardBorders::even(kTables, tp.size(), "tables") : ShardBorders::of_ranks(shards, deal);
  const std::int64_t first = ranks.begin(tp.rank()), count = ranks.count(tp.rank());
  std::vector<std::int32_t> coordinates;
  for (std::int64_t i = 0; i < kBits; ++i) {
    for (std::int64_t k = first; k < first + count; ++k)
      coordinates.push_back(static_cast<std::int32_t>(kBits * k + i));
  }
  const MemoryHashing hash{HashWeight::l1_times_p, 1.0, kBits,
                           Tensor::of<std::int32_t>(allocator, Shape{kBits, count}, coordinates, Purpose::weights)};
  std::vector<std::int64_t> borders;  // rows of the shards held here
  for (std::int64_t s = deal.begin(tp.rank()); s <= deal.end(tp.rank()); ++s) {
    borders.push_back(shards.borders[static_cast<std::size_t>(s)] << kBits);
  }
  std::vector<MemoryTables> layers;
  std::vector<Tensor> gradients;
  for (const char* name : {"a", "b"}) {
    const Shape shape{count << kBits, kColumns};
    gradients.push_back(Tensor::zeros(allocator, shape, DType::f32, Purpose::gradients));
    layers.push_back({Var::parameter(numbers(allocator, name, shape, first << kBits), gradients.back(), nullptr, 0),
                      {},
                      kind == Shards::ranks ? RowShards() : RowShards(borders)});
  }
  std::unique_ptr<Reducer> reducer;
  if (kind == Shards::ranks) reducer = std::make_unique<TpReducer>(tp);
  else reducer = std::make_unique<ShardReducer>(allocator, tp, deal);

  Tape tape(allocator, stream, TapeMode::training);
  Var x = tape.leaf(numbers(allocator, "x", Shape{kRows, kWidth}, 0));
  Grad dx = x.grad();
  const Var read = kind == Shards::ranks ? copy_to(tape, x, tp) : x;
  Var y = memory_layer(tape, read, hash, layers, *reducer);
  if (kind == Shards::ranks) y = reduce_from(tape, std::move(y), tp);
  Result r;
  r.first_row = first << kBits;
  r.y.assign(y.value().span<float>().begin(), y.value().span<float>().end());
  tape.backward(y, numbers(allocator, "dy", Shape{kRows, 2 * kColumns}, 0));
  const Tensor gradient = dx.take(tape);
  r.dx.assign(gradient.span<float>().begin(), gradient.span<float>().end());
  for (const Tensor& g : gradients) r.dtables.insert(r.dtables.end(), g.span<float>().begin(), g.span<float>().end());
  return r;
}

/// What one rank has of the rows that `part` holds.
std::vector<float> rows_of(const Result& whole, const Result& part) {
  std::vector<float> rows;
  const auto size = static_cast<std::ptrdiff_t>(part.dtables.size()) / 2;
  for (const std::ptrdiff_t layer : {0, 1}) {
    const auto from = whole.dtables.begin() + layer * (kTables << kBits) * kColumns + part.first_row * kColumns;
    rows.insert(rows.end(), from, from + size);
  }
  return rows;
}

TEST(MemoryLayerOverRanks, GivesWhatOneRankGives) {
  Allocator allocator;
  const std::unique_ptr<Communicator> self = create_self();
  const Result want = run(allocator, *self, Shards::ranks), got = run(allocator, test_world(), Shards::ranks);
  const auto near = [](const std::vector<float>& a, const std::vector<float>& b) {
    ASSERT_EQ(a.size(), b.size());
    for (std::size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], 1e-5F) << i;
  };
  near(got.y, want.y);
  near(got.dx, want.dx);
  EXPECT_EQ(got.dtables, rows_of(want, got));  // of rows that one rank owns: the same bits
  const auto largest = std::ranges::max(want.dx, {}, [](float v) { return std::abs(v); });
  EXPECT_GT(std::abs(largest), 0.1F);
}

TEST(MemoryLayerOverRanks, VirtualShardsGiveTheSameBits) {
  Allocator allocator;
  const std::unique_ptr<Communicator> self = create_self();
  const Result want = run(allocator, *self, Shards::virtual_ones);
  const Result got = run(allocator, test_world(), Shards::virtual_ones);
  EXPECT_EQ(got.y, want.y);
  EXPECT_EQ(got.dx, want.dx);
  EXPECT_EQ(got.dtables, rows_of(want, got));
}

}  // namespace
}  // namespace tforge
