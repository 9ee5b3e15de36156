// Four virtual shards on 2, 3 and 4 ranks against the same four on one rank: the same bits, of every op that hears from
// other shards, forward and backward, and of the sums of gradients and numbers.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "autograd/ops/embedding.h"
#include "autograd/ops/head_cross_entropy.h"
#include "autograd/ops/pattention.h"
#include "core/copy.h"
#include "core/errors.h"
#include "core/rng.h"
#include "parallel/ops/gather_columns.h"
#include "parallel/ops/split_columns.h"
#include "parallel/ordered_sum.h"
#include "parallel/shard_gradients.h"
#include "parallel/tp_reducer.h"
#include "support/mpi_world.h"

namespace tforge {
namespace {

constexpr int kShards = 4;

/// The four shards dealt to the ranks of `ranks`: on three of them 2, 1, 1.
ShardBorders deal_to(const Communicator& ranks) { return ShardBorders::even(kShards, ranks.size(), "shards"); }

/// `count` numbers that are the same wherever they are asked for; `first` of them skipped.
std::vector<float> numbers(const std::string& name, std::int64_t first, std::int64_t count) {
  const Rng rng(11, name);
  std::vector<float> values;
  for (std::int64_t i = first; i < first + count; ++i) {
    values.push_back(static_cast<float>(rng.normal(static_cast<std::uint64_t>(i))));
  }
  return values;
}

std::vector<std::uint32_t> bits(std::span<const float> values) {
  std::vector<std::uint32_t> result;
  for (const float v : values) result.push_back(std::bit_cast<std::uint32_t>(v));
  return result;
}

class VirtualShards : public testing::Test {
 protected:
  Tensor tensor(const Shape& shape, const std::vector<float>& values) {
    return Tensor::of<float>(allocator_, shape, values, Purpose::activations);
  }
  Communicator& world_ = test_world();
  std::unique_ptr<Communicator> self_ = create_self();
  Allocator allocator_;
  Stream stream_;
};

// ---- sums ----

TEST_F(VirtualShards, PartsAreAddedInTheirOrder) {
  constexpr std::int64_t kElements = 70000;  // more than a piece of the kernel
  for (Communicator* ranks : {&world_, self_.get()}) {
    const ShardBorders deal = deal_to(*ranks);
    OrderedSum sum(allocator_, *ranks, deal);
    EXPECT_EQ(sum.shards(), kShards);
    EXPECT_EQ(sum.shards_here(), deal.count(ranks->rank()));
    std::vector<float> want(kElements, 0), largest(kElements, -1e30F);
    std::vector<Tensor> parts;
    std::vector<ConstTensorView> views;
    for (int s = 0; s < kShards; ++s) {
      std::vector<float> part = numbers("part", s * kElements, kElements);
      // Of widely different sizes: every other order of addition gives other bits in many places.
      for (float& v : part) v *= s % 2 == 0 ? 1e4F : 1.0F;
      for (std::size_t i = 0; i < want.size(); ++i) {
        want[i] = s == 0 ? part[i] : want[i] + part[i];
        largest[i] = std::max(largest[i], part[i]);
      }
      if (s >= deal.begin(ranks->rank()) && s < deal.end(ranks->rank())) parts.push_back(tensor({kElements}, part));
    }
    for (const Tensor& part : parts) views.push_back(part.view());
    Tensor total = Tensor::zeros(allocator_, {kElements}, DType::f32, Purpose::activations);
    sum.max(stream_, views, total.view());
    EXPECT_EQ(bits(total.span<float>()), bits(largest));
    sum.sum(stream_, views, total.view());
    EXPECT_EQ(bits(total.span<float>()), bits(want));
    // Over one of the parts.
    sum.sum(stream_, views, parts.back().view());
    EXPECT_EQ(bits(parts.back().span<float>()), bits(want));
  }
}

TEST_F(VirtualShards, SumsNumbersOfTheShards) {
  const std::vector<double> all = {1e16, 1, -1e16, 1};  // ((1e16 + 1) - 1e16) + 1, where 1e16 + 1 is 1e16
  for (Communicator* ranks : {&world_, self_.get()}) {
    const ShardBorders deal = deal_to(*ranks);
    const auto first = static_cast<std::size_t>(deal.begin(ranks->rank()));
    OrderedSum sum(allocator_, *ranks, deal);
    EXPECT_EQ(sum.sum(stream_, std::span(all).subspan(first, static_cast<std::size_t>(sum.shards_here()))), 1.0);
    const std::vector<double> too_many(5);
    EXPECT_THROW(sum.sum(stream_, too_many), InternalError);
  }
  EXPECT_THROW(OrderedSum(allocator_, *self_, ShardBorders::even(4, 2, "x")), InternalError);
  EXPECT_THROW(OrderedSum(allocator_, *self_, ShardBorders::even(kMaxShards + 1, 1, "x")), InternalError);
}

TEST_F(VirtualShards, GradientsOfSampleShards) {
  constexpr std::int64_t kElements = 1003;
  const auto gradient = [](int s) { return numbers("gradient", s * kElements, kElements); };
  std::vector<float> want = gradient(0);
  for (int s = 1; s < kShards; ++s) {
    const std::vector<float> next = gradient(s);
    for (std::size_t i = 0; i < want.size(); ++i) want[i] += next[i];
  }
  for (Communicator* ranks : {&world_, self_.get()}) {
    for (const std::int64_t piece : {std::int64_t{1} << 20, std::int64_t{100}}) {
      const ShardBorders deal = deal_to(*ranks);
      OrderedSum sum(allocator_, *ranks, deal);
      Tensor flat = Tensor::zeros(allocator_, {kElements}, DType::f32, Purpose::gradients);
      ShardGradients gradients(allocator_, sum, flat, piece);
      for (int step = 0; step < 2; ++step) {
        const std::int64_t here = deal.count(ranks->rank());
        for (std::int64_t s = 0; s < here; ++s) {
          std::ranges::copy(gradient(static_cast<int>(deal.begin(ranks->rank()) + s)), flat.span<float>().begin());
          if (s + 1 < here) gradients.keep(stream_, s);
        }
        gradients.finish(stream_);
        EXPECT_EQ(bits(flat.span<float>()), bits(want));
      }
    }
  }
}

// ---- ops ----

/// Rows of a parameter in four shards, of which the ranks hold whole ones.
struct Sharded {
  ShardBorders shards, ranks;
  ShardBorders deal;

  Sharded(std::int64_t rows, const Communicator& over)
      : shards(ShardBorders::even(rows, kShards, "rows")),
        ranks(ShardBorders::of_ranks(shards, deal_to(over))),
        deal(deal_to(over)) {}
  RowShards here(int rank) const {
    return RowShards(
        std::span(shards.borders)
            .subspan(static_cast<std::size_t>(deal.begin(rank)), static_cast<std::size_t>(deal.count(rank)) + 1));
  }
};

constexpr std::int64_t kRows = 37;
constexpr std::int64_t kHeads = 4;
constexpr std::int64_t kWidth = 24;
constexpr std::int64_t kTokens = 70;  // 18, 18, 17, 17
constexpr std::int64_t kWords = 101;  // 26, 25, 25, 25

class VirtualShardOps : public VirtualShards,
                        public testing::WithParamInterface<std::tuple<PattentionNorm, Recompute>> {
 protected:
  struct Held {
    std::string name;
    Var var;
    std::int64_t first_row;
  };
  struct Result {
    std::vector<float> outputs;
    double loss = 0;
    std::vector<double> nll;
    std::vector<Held> parameters;
  };

  Var parameter(Result& result, const std::string& name, const Sharded& rows, int rank) {
    const std::int64_t count = rows.ranks.count(rank), first = rows.ranks.begin(rank);
    const Var v =
        Var::parameter(tensor({count, kWidth}, numbers(name, first * kWidth, count * kWidth)),
                       Tensor::zeros(allocator_, {count, kWidth}, DType::f32, Purpose::gradients), nullptr, 0);
    result.parameters.push_back({name, v, first});
    return v;
  }

  Tensor words(const char* name) {
    const Rng rng(3, name);
    std::vector<std::int32_t> values;
    for (std::uint64_t t = 0; t < kRows; ++t) values.push_back(static_cast<std::int32_t>(rng.below(t, kWords)));
    return Tensor::of<std::int32_t>(allocator_, Shape{kRows}, values, Purpose::activations);
  }

  /// embedding -> three Pattentions at once -> cut by heads and put together -> one Pattention -> head and loss.
  Result run(Communicator& tp) {
    const auto [norm, recompute] = GetParam();
    const Sharded tokens(kTokens, tp), vocab(kWords, tp);
    const ShardBorders heads = ShardBorders::even(kHeads, tp.size(), "heads");
    const int rank = tp.rank();
    ColumnPlan qkv, one;
    std::vector<std::int64_t> columns;
    for (int r = 0; r < tp.size(); ++r) columns.push_back(kWidth / kHeads * heads.count(r));
    qkv.groups = {columns, columns, columns};
    one.groups = {columns};

    Result result;
    ShardReducer reducer(allocator_, tp, deal_to(tp));
    Tape tape(allocator_, stream_, TapeMode::training, {recompute, SavedDType::same});
    const Var table = parameter(result, "table", vocab, rank);
    const std::vector<double> scales{1.5, 2.0, 2.5}, scale{3.0};
    std::vector<PattentionTokens> group;
    for (std::size_t g = 0; g < 3; ++g) {
      const std::string name(1, "qkv"[g]);
      const Var keys = parameter(result, name + ".keys", tokens, rank);
      group.push_back({keys, parameter(result, name + ".values", tokens, rank), scales[g], tokens.here(rank)});
    }
    const Var keys = parameter(result, "proj.keys", tokens, rank);
    const std::vector<PattentionTokens> proj{
        {keys, parameter(result, "proj.values", tokens, rank), scale[0], tokens.here(rank)}};

    const Var x = embedding(tape, words("inputs"), table, vocab.ranks.begin(rank), vocab.here(rank), reducer);
    const Var y = row_normalize(tape, pattention(tape, x, group, norm, reducer), scales, norm);
    const Var cut = split_columns(tape, y, qkv, tp);
    const Var mixed = thirds_added(tape, cut);
    const Var all = gather_columns(tape, mixed, one, tp, Incoming::complete);
    const Var h = row_normalize(tape, pattention(tape, all, proj, norm, reducer), scale, norm);
    const HeadShards head{vocab.here(rank), kWords};
    const Tensor targets = words("targets");
    Tape quiet(allocator_, stream_, TapeMode::inference);
    const Tensor nll = head_nll(quiet, Var(h.value()), table, targets, vocab.ranks.begin(rank), reducer, head);
    result.nll.assign(nll.span<double>().begin(), nll.span<double>().end());
    const HeadLoss loss =
        head_cross_entropy(tape, h, table, targets, vocab.ranks.begin(rank), 1.0 / kRows, reducer, head);
    result.loss = number_of(stream_, loss.nll_sum);
    result.outputs.assign(h.value().span<float>().begin(), h.value().span<float>().end());
    tape.backward(loss.loss);
    return result;
  }

  /// q + 3 k + v of [q | k | v]: stands for attention, and is done by each rank for its own columns.
  static Var thirds_added(Tape& tape, const Var& qkv) {
    static constexpr std::array<float, 3> kFactors = {1, 3, 1};
    struct ThirdsNode final : Node {
      explicit ThirdsNode(const Var& in) : dqkv(use(in)), shape(in.shape()) {}
      void backward(Tape& t) override {
        Tensor d = t.empty(shape, DType::f32);
        const std::int64_t c = shape.columns() / 3;
        const float* from = dy().read().as<float>();
        for (std::int64_t i = 0; i < d.elements(); ++i) {
          const std::int64_t third = i % (3 * c) / c;
          d.span<float>()[static_cast<std::size_t>(i)] =
              kFactors[static_cast<std::size_t>(third)] * from[i / (3 * c) * c + i % c];
        }
        dqkv.adopt(t, std::move(d));
      }
      Grad dqkv;
      Shape shape;
    };
    Node* node = tape.record<ThirdsNode>(qkv);
    const std::int64_t c = qkv.shape().columns() / 3;
    Tensor y = Tensor::zeros(tape.allocator(), Shape{qkv.shape().rows(), c}, DType::f32, Purpose::activations);
    const auto in = qkv.value().span<float>();
    for (std::int64_t i = 0; i < qkv.value().elements(); ++i) {
      y.span<float>()[static_cast<std::size_t>(i / (3 * c) * c + i % c)] +=
          kFactors[static_cast<std::size_t>(i % (3 * c) / c)] * in[static_cast<std::size_t>(i)];
    }
    return tape.output(std::move(y), node);
  }

  static std::vector<float> gradient(const Var& v) {
    const ConstTensorView g = v.grad().read();
    return {g.as<float>(), g.as<float>() + g.elements()};
  }
};

TEST_P(VirtualShardOps, GiveTheBitsOfOneRank) {
  const Result whole = run(*self_);
  const Result here = run(world_);
  EXPECT_GT(whole.loss, 0);
  EXPECT_EQ(std::bit_cast<std::uint64_t>(here.loss), std::bit_cast<std::uint64_t>(whole.loss));
  EXPECT_EQ(here.nll, whole.nll);
  EXPECT_EQ(std::accumulate(whole.nll.begin(), whole.nll.end(), 0.0), whole.loss);
  EXPECT_EQ(bits(here.outputs), bits(whole.outputs));
  ASSERT_EQ(here.parameters.size(), whole.parameters.size());
  for (std::size_t i = 0; i < here.parameters.size(); ++i) {
    const Held& part = here.parameters[i];
    const std::vector<float> mine = gradient(part.var), all = gradient(whole.parameters[i].var);
    ASSERT_LT(mine.size(), all.size());
    const auto own = std::span(all).subspan(static_cast<std::size_t>(part.first_row * kWidth), mine.size());
    EXPECT_EQ(bits(mine), bits(own)) << part.name;
    EXPECT_TRUE(std::ranges::any_of(mine, [](float g) { return g != 0; })) << part.name << ": nothing to compare";
  }
}

INSTANTIATE_TEST_SUITE_P(AllNorms, VirtualShardOps,
                         testing::Combine(testing::Values(PattentionNorm::l2_norm_gelu, PattentionNorm::gelu_l2_norm,
                                                          PattentionNorm::softmax),
                                          testing::Values(Recompute::none, Recompute::scores)),
                         [](const auto& c) {
                           return std::string(name_of(std::get<0>(c.param))) +
                                  (std::get<1>(c.param) == Recompute::none ? "" : "_scores_again");
                         });

TEST_F(VirtualShards, OpsRefuseShardsThatNobodyAdds) {
  Tape tape(allocator_, stream_, TapeMode::inference);
  const std::vector<std::int64_t> borders{0, 2, 5};
  const Var rows(tensor({5, 3}, numbers("rows", 0, 15)));
  const PattentionTokens layer{rows, rows, 1.0, RowShards(borders)};
  EXPECT_THROW(pattention(tape, rows, std::span(&layer, 1), PattentionNorm::l2_norm_gelu, identity_reducer()),
               ShapeError);
  const Tensor targets = Tensor::zeros(allocator_, {5}, DType::i32, Purpose::activations);
  EXPECT_THROW(head_nll(tape, rows, rows, targets, 0, identity_reducer(), {RowShards(borders), 5}), ShapeError);
}

}  // namespace
}  // namespace tforge
