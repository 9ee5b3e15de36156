// Layers whose parameters are sharded over the ranks against the same layers on one rank: values, loss and every
// gradient, in f64. Rows are uneven (5 tokens, 7 words), and one rank may hold nothing but zero keys.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "autograd/ops/embedding.h"
#include "autograd/ops/head_cross_entropy.h"
#include "autograd/ops/pattention.h"
#include "core/copy.h"
#include "core/rng.h"
#include "parallel/ops/copy_to.h"
#include "parallel/ops/gather_columns.h"
#include "parallel/ops/reduce_from.h"
#include "parallel/ops/reduce_scatter_columns.h"
#include "parallel/shard.h"
#include "parallel/tp_reducer.h"
#include "support/mpi_world.h"

namespace tforge {
namespace {

constexpr std::int64_t kRows = 6;
constexpr std::int64_t kHeads = 4;
constexpr std::int64_t kWidth = 8;  // d = 4 heads of 2
constexpr std::int64_t kTokens = 5;
constexpr std::int64_t kWords = 7;
constexpr double kBound = 1e-12;

enum class Keys : std::uint8_t { random, zero_on_last_rank };

/// Everything on this rank: parameters and the gradients that one forward and backward pass gave them.
struct Model {
  Var table;                             // [words, d]
  std::vector<std::pair<Var, Var>> qkv;  // keys, values
  std::pair<Var, Var> proj;
  double loss = 0;
  std::vector<double> logits_input;
};

class ShardedLayers : public testing::TestWithParam<std::tuple<PattentionNorm, Keys>> {
 protected:
  /// Rows [first, first + count) of a parameter that is the same on every mesh.
  Var parameter(const std::string& name, const ShardBorders& rows, int rank, std::int64_t columns, bool zero_tail) {
    const Rng rng(7, name);
    const std::int64_t count = rows.count(rank);
    std::vector<double> values;
    for (std::int64_t i = rows.begin(rank) * columns; i < rows.end(rank) * columns; ++i) {
      values.push_back(zero_tail && i >= tail_ * columns ? 0.0 : rng.normal(static_cast<std::uint64_t>(i)));
    }
    return Var::parameter(Tensor::of<double>(allocator_, Shape{count, columns}, values, Purpose::weights),
                          Tensor::zeros(allocator_, Shape{count, columns}, DType::f64, Purpose::gradients), nullptr, 0);
  }

  Tensor words(const char* name) {
    const Rng rng(3, name);
    std::vector<std::int32_t> values;
    for (std::uint64_t t = 0; t < kRows; ++t) values.push_back(static_cast<std::int32_t>(rng.below(t, kWords)));
    return Tensor::of<std::int32_t>(allocator_, Shape{kRows}, values, Purpose::activations);
  }

  /// embedding -> q, k, v Pattentions -> (q + k + v of the rank's heads) -> proj Pattention -> head and loss.
  Model run(Communicator& tp) {
    const auto [norm, keys] = GetParam();
    const bool zero = keys == Keys::zero_on_last_rank;
    const ShardBorders tokens = ShardBorders::even(kTokens, tp.size(), "tokens");
    const ShardBorders vocab = ShardBorders::even(kWords, tp.size(), "words");
    const ShardBorders heads = ShardBorders::even(kHeads, tp.size(), "heads");
    Model m;
    m.table = parameter("table", vocab, tp.rank(), kWidth, false);
    for (const char* name : {"q", "k", "v"}) {
      m.qkv.emplace_back(parameter(std::string(name) + ".keys", tokens, tp.rank(), kWidth, zero),
                         parameter(std::string(name) + ".values", tokens, tp.rank(), kWidth, false));
    }
    m.proj = {parameter("proj.keys", tokens, tp.rank(), kWidth, zero),
              parameter("proj.values", tokens, tp.rank(), kWidth, false)};

    ColumnPlan before;
    std::vector<std::int64_t> columns;
    for (int r = 0; r < tp.size(); ++r) columns.push_back(kWidth / kHeads * heads.count(r));
    before.groups = {columns, columns, columns};
    before.common = norm == PattentionNorm::l2_norm_gelu ? 0 : 3;
    const ColumnPlan after{{columns}, 0};
    const std::int64_t mine = columns[static_cast<std::size_t>(tp.rank())];

    TpReducer reducer(tp);
    Tape tape(allocator_, stream_, TapeMode::training);
    const std::vector<double> scales{1.5, 2.0, 2.5};
    std::vector<PattentionTokens> group;
    for (std::size_t g = 0; g < 3; ++g) group.push_back({m.qkv[g].first, m.qkv[g].second, scales[g]});

    const Var x = reduce_from(tape, embedding(tape, words("inputs"), m.table, vocab.begin(tp.rank())), tp);
    Var u = pattention(tape, copy_to(tape, x, tp), group, norm, reducer);
    const Var qkv = row_normalize(tape, reduce_scatter_columns(tape, u, before, tp), scales, norm);
    const Var mixed = thirds_multiplied(tape, qkv, mine);
    const Var all = gather_columns(tape, mixed, after, tp);
    const std::vector<PattentionTokens> proj{{m.proj.first, m.proj.second, 3.0}};
    const std::vector<double> proj_scale{3.0};
    Var p = pattention(tape, all, proj, norm, reducer);
    const Var h = row_normalize(tape, reduce_from(tape, std::move(p), tp), proj_scale, norm);
    const HeadLoss head = head_cross_entropy(tape, copy_to(tape, h, tp), m.table, words("targets"),
                                             vocab.begin(tp.rank()), 1.0 / kRows, reducer);
    m.loss = number_of(stream_, head.nll_sum);
    m.logits_input.assign(h.value().span<double>().begin(), h.value().span<double>().end());
    tape.backward(head.loss);
    return m;
  }

  /// q * k + v of [q | k | v]: stands for attention, mixes the three and is done by each rank for its own columns.
  static Var thirds_multiplied(Tape& tape, const Var& qkv, std::int64_t columns) {
    struct ThirdsNode final : Node {
      ThirdsNode(const Var& in, std::int64_t c) : din(use(in)), saved(in.value()), columns(c) {}
      void backward(Tape& t) override {
        Tensor d = t.empty(saved.shape(), DType::f64);
        const double* dy_at = dy().read().as<double>();
        const auto in = std::as_const(saved).span<double>();
        const auto c = static_cast<std::size_t>(columns);
        for (std::size_t i = 0; i < kRows * c; ++i) {
          const std::size_t at = i / c * 3 * c + i % c;
          d.span<double>()[at] = dy_at[i] * in[at + c];
          d.span<double>()[at + c] = dy_at[i] * in[at];
          d.span<double>()[at + 2 * c] = dy_at[i];
        }
        din.adopt(t, std::move(d));
      }
      Grad din;
      Tensor saved;
      std::int64_t columns;
    };
    Node* node = tape.record<ThirdsNode>(qkv, columns);
    Tensor y = tape.empty(Shape{kRows, columns}, DType::f64);
    const auto in = qkv.value().span<double>();
    const auto c = static_cast<std::size_t>(columns);
    for (std::size_t i = 0; i < kRows * c; ++i) {
      const std::size_t at = i / c * 3 * c + i % c;
      y.span<double>()[i] = in[at] * in[at + c] + in[at + 2 * c];
    }
    return tape.output(std::move(y), node);
  }

  static void expect_near(const std::string& what, std::span<const double> got, std::span<const double> want,
                          double largest) {
    ASSERT_EQ(got.size(), want.size()) << what;
    double worst = 0;
    for (std::size_t i = 0; i < got.size(); ++i) worst = std::max(worst, std::abs(got[i] - want[i]));
    EXPECT_LE(worst, kBound * largest) << what;
  }
  static std::span<const double> gradient(const Var& x) {
    const ConstTensorView view = x.grad().read();
    return {view.as<double>(), static_cast<std::size_t>(view.elements())};
  }
  /// This rank's rows of a whole gradient against the gradient that it computed for its shard.
  void expect_shard(const std::string& what, const Var& shard, const Var& whole, std::int64_t rows) const {
    const ShardBorders borders = ShardBorders::even(rows, world_.size(), what);
    const auto all = gradient(whole);
    const auto columns = static_cast<std::size_t>(kWidth);
    const auto own = all.subspan(static_cast<std::size_t>(borders.begin(world_.rank())) * columns,
                                 static_cast<std::size_t>(borders.count(world_.rank())) * columns);
    double largest = 0;
    for (const double g : all) largest = std::max(largest, std::abs(g));
    ASSERT_GT(largest, 1e-6) << what << ": nothing to compare";
    expect_near(what, gradient(shard), own, largest);
  }

  Communicator& world_ = test_world();
  // The first token of the last rank.
  const std::int64_t tail_ = ShardBorders::even(kTokens, test_world().size(), "tokens").begin(test_world().size() - 1);
  Allocator allocator_;
  Stream stream_;
};

TEST_P(ShardedLayers, EqualTheLayersOnOneRank) {
  const auto self = create_self();
  const Model whole = run(*self);
  const Model shard = run(world_);
  EXPECT_NEAR(shard.loss, whole.loss, kBound * std::abs(whole.loss));
  double largest = 0;
  for (const double y : whole.logits_input) largest = std::max(largest, std::abs(y));
  expect_near("outputs", shard.logits_input, whole.logits_input, largest);
  expect_shard("table", shard.table, whole.table, kWords);
  for (std::size_t g = 0; g < 3; ++g) {
    const std::string name(1, "qkv"[g]);
    expect_shard(name + ".keys", shard.qkv[g].first, whole.qkv[g].first, kTokens);
    expect_shard(name + ".values", shard.qkv[g].second, whole.qkv[g].second, kTokens);
  }
  expect_shard("proj.keys", shard.proj.first, whole.proj.first, kTokens);
  expect_shard("proj.values", shard.proj.second, whole.proj.second, kTokens);
}

INSTANTIATE_TEST_SUITE_P(AllNorms, ShardedLayers,
                         testing::Combine(testing::Values(PattentionNorm::l2_norm_gelu, PattentionNorm::gelu_l2_norm,
                                                          PattentionNorm::softmax),
                                          testing::Values(Keys::random, Keys::zero_on_last_rank)),
                         [](const auto& c) {
                           return std::string(name_of(std::get<0>(c.param))) +
                                  (std::get<1>(c.param) == Keys::random ? "" : "_zero_keys_on_the_last_rank");
                         });

}  // namespace
}  // namespace tforge
