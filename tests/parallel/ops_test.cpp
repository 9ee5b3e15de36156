// The differentiable collectives: exact values forward and backward with different data on each rank, and the
// identity that makes a backward the transpose of its forward, <w, A x> = <A^T w, x>, summed over ranks.
#include <gtest/gtest.h>

#include <numeric>
#include <utility>
#include <vector>

#include "core/errors.h"
#include "parallel/ops/copy_to.h"
#include "parallel/ops/gather_columns.h"
#include "parallel/ops/reduce_from.h"
#include "parallel/ops/reduce_scatter_columns.h"
#include "support/mpi_world.h"

namespace tforge {
namespace {

using Values = std::vector<double>;

struct WeightedSumNode final : Node {
  WeightedSumNode(const Var& x, Values weights) : dx(use(x)), w(std::move(weights)) {}
  void backward(Tape& tape) override {
    dx.adopt(tape,
             Tensor::of<double>(tape.allocator(), Shape{static_cast<std::int64_t>(w.size())}, w, Purpose::activations));
  }
  Grad dx;
  Values w;
};

/// sum_i w_i x_i: the loss whose gradient is w.
Var weighted_sum(Tape& tape, const Var& x, const Values& w) {
  Node* node = tape.record<WeightedSumNode>(x, w);
  const auto values = x.value().span<double>();
  const Values sum{std::inner_product(values.begin(), values.end(), w.begin(), 0.0)};
  return tape.output(Tensor::of<double>(tape.allocator(), Shape{1}, sum, Purpose::activations), node);
}

double dot(const Values& a, const Values& b) { return std::inner_product(a.begin(), a.end(), b.begin(), 0.0); }

class DifferentiableCollective : public testing::Test {
 protected:
  static constexpr std::int64_t kRows = 3;

  /// Element (t, c) of rank r, an integer, so that sums are exact in any order.
  static double element(int r, std::int64_t t, std::int64_t c) {
    return static_cast<double>((r + 1) * (r + 1) * 1000 + t * 100 + c * (r + 1));
  }
  static Values matrix(int r, std::int64_t columns) {
    Values values;
    for (std::int64_t t = 0; t < kRows; ++t) {
      for (std::int64_t c = 0; c < columns; ++c) values.push_back(element(r, t, c));
    }
    return values;
  }
  static double weight(int r, std::int64_t t, std::int64_t c) { return element(r + 2, c, t) - 500; }
  static Values weights(int r, std::int64_t columns) {
    Values values;
    for (std::int64_t t = 0; t < kRows; ++t) {
      for (std::int64_t c = 0; c < columns; ++c) values.push_back(weight(r, t, c));
    }
    return values;
  }
  Var parameter(const Values& values, std::int64_t columns) {
    const Shape shape{kRows, columns};
    return Var::parameter(Tensor::of<double>(allocator_, shape, values, Purpose::weights),
                          Tensor::zeros(allocator_, shape, DType::f64, Purpose::gradients), nullptr, 0);
  }
  static Values values(const Var& x) { return {x.value().span<double>().begin(), x.value().span<double>().end()}; }
  static Values gradient(const Var& x) {
    const ConstTensorView view = x.grad().read();
    return {view.as<double>(), view.as<double>() + view.elements()};
  }
  double over_ranks(double value) {
    world_.all_reduce(stream_, TensorView{&value, DType::f64, Device::cpu, Shape{1}, 1}, ReduceOp::sum);
    return value;
  }
  /// Two runs of columns a rank, uneven: rank r has 2 p - r of the first and r + 1 of the second.
  ColumnPlan uneven(std::int64_t common) const {
    ColumnPlan plan;
    plan.groups.resize(2);
    for (int r = 0; r < size_; ++r) {
      plan.groups[0].push_back(2 * size_ - r);
      plan.groups[1].push_back(r + 1);
    }
    plan.common = common;
    return plan;
  }
  /// Columns of the whole that rank r holds, in its order.
  static std::vector<std::int64_t> columns_of(const ColumnPlan& plan, int r) {
    std::vector<std::int64_t> result;
    std::int64_t first = 0;
    for (const auto& group : plan.groups) {
      for (int s = 0; s < static_cast<int>(group.size()); ++s) {
        for (std::int64_t c = 0; c < group[static_cast<std::size_t>(s)]; ++c, ++first) {
          if (s == r) result.push_back(first);
        }
      }
    }
    for (std::int64_t c = 0; c < plan.common; ++c) result.push_back(first + c);
    return result;
  }

  Communicator& world_ = test_world();
  const int rank_ = world_.rank();
  const int size_ = world_.size();
  Allocator allocator_;
  Stream stream_;
  Tape tape_{allocator_, stream_, TapeMode::training};
};

TEST_F(DifferentiableCollective, CopyToSharesForwardAndSumsBackward) {
  const Var x = parameter(matrix(0, 4), 4);
  const Var y = copy_to(tape_, x, world_);
  EXPECT_EQ(y.view().data, x.view().data);
  tape_.backward(weighted_sum(tape_, y, weights(rank_, 4)));
  Values expected(kRows * 4, 0.0);
  double left = 0;
  for (int r = 0; r < size_; ++r) {
    const Values w = weights(r, 4);
    for (std::size_t i = 0; i < w.size(); ++i) expected[i] += w[i];
    left += dot(w, values(y));
  }
  EXPECT_EQ(gradient(x), expected);
  EXPECT_EQ(left, dot(gradient(x), values(x)));
}

TEST_F(DifferentiableCollective, CopyToLeavesASharedGradientAlone) {
  // The gradient of y is also that of z: the sum over ranks must not reach z.
  const Var x = parameter(matrix(0, 4), 4);
  const Var z = parameter(matrix(1, 4), 4);
  // Recorded before copy_to, so run backwards after it.
  const Var also_z = reduce_from(tape_, z, world_);
  const Var y = copy_to(tape_, x, world_);
  struct BothNode final : Node {
    BothNode(const Var& a, const Var& b) : da(use(a)), db(use(b)) {}
    void backward(Tape& tape) override {
      da.adopt(tape, dy().share());
      db.adopt(tape, dy().share());
    }
    Grad da, db;
  };
  Node* node = tape_.record<BothNode>(y, also_z);
  const Var both = tape_.output(y.value().clone(allocator_), node);
  tape_.backward(weighted_sum(tape_, both, weights(rank_, 4)));
  EXPECT_EQ(gradient(z), weights(rank_, 4));
  EXPECT_EQ(gradient(x).front(), over_ranks(weights(rank_, 4).front()));
}

TEST_F(DifferentiableCollective, ReduceFromSumsForwardAndPassesBackward) {
  const Var x = parameter(matrix(rank_, 4), 4);
  const Var y = reduce_from(tape_, x, world_);
  Values expected(kRows * 4, 0.0);
  for (int r = 0; r < size_; ++r) {
    for (std::size_t i = 0; i < expected.size(); ++i) expected[i] += matrix(r, 4)[i];
  }
  EXPECT_EQ(values(y), expected);
  EXPECT_EQ(values(x), matrix(rank_, 4)) << "x is held here as well, so it must not change";
  const Values w = weights(0, 4);  // replicated
  tape_.backward(weighted_sum(tape_, y, w));
  EXPECT_EQ(gradient(x), w);
  EXPECT_EQ(dot(w, values(y)), over_ranks(dot(gradient(x), values(x))));
}

TEST_F(DifferentiableCollective, ReduceFromWritesOverWhatIsMovedIn) {
  Var x(Tensor::of<double>(allocator_, Shape{kRows, 4}, matrix(rank_, 4), Purpose::activations));
  const void* memory = x.view().data;
  const Var y = reduce_from(tape_, std::move(x), world_);
  EXPECT_EQ(y.view().data, memory);
  EXPECT_FALSE(y.requires_grad());
}

TEST_F(DifferentiableCollective, GatherColumnsPutsColumnsTogetherAndSumsBackward) {
  const ColumnPlan plan = uneven(0);
  const std::int64_t mine = plan.columns_of(rank_);
  const std::int64_t all = plan.columns();
  const Var x = parameter(matrix(rank_, mine), mine);
  const Var y = gather_columns(tape_, x, plan, world_);
  ASSERT_EQ(y.shape(), (Shape{kRows, all}));

  Values expected(static_cast<std::size_t>(kRows * all));
  Values expected_gradient;
  for (std::int64_t t = 0; t < kRows; ++t) {
    for (int r = 0; r < size_; ++r) {
      const auto columns = columns_of(plan, r);
      for (std::size_t c = 0; c < columns.size(); ++c) {
        expected[static_cast<std::size_t>(t * all + columns[c])] = element(r, t, static_cast<std::int64_t>(c));
      }
    }
    for (const std::int64_t c : columns_of(plan, rank_)) {
      double sum = 0;
      for (int r = 0; r < size_; ++r) sum += weight(r, t, c);
      expected_gradient.push_back(sum);
    }
  }
  EXPECT_EQ(values(y), expected);
  const Values w = weights(rank_, all);  // partial: another one on each rank
  tape_.backward(weighted_sum(tape_, y, w));
  EXPECT_EQ(gradient(x), expected_gradient);
  EXPECT_EQ(over_ranks(dot(w, values(y))), over_ranks(dot(gradient(x), values(x))));
}

TEST_F(DifferentiableCollective, ReduceScatterColumnsKeepsOwnAndCommonColumns) {
  for (const std::int64_t common : {0, 3}) {
    const ColumnPlan plan = uneven(common);
    const std::int64_t mine = plan.columns_of(rank_);
    const std::int64_t all = plan.columns();
    const Var x = parameter(matrix(rank_, all), all);
    const Var y = reduce_scatter_columns(tape_, x, plan, world_);
    ASSERT_EQ(y.shape(), (Shape{kRows, mine}));

    Values expected;
    Values expected_gradient(static_cast<std::size_t>(kRows * all), 0.0);
    for (std::int64_t t = 0; t < kRows; ++t) {
      for (const std::int64_t c : columns_of(plan, rank_)) {
        double sum = 0;
        for (int r = 0; r < size_; ++r) sum += element(r, t, c);
        expected.push_back(sum);
      }
      // Group columns have one owner; common ones are everyone's, and their gradients add up.
      for (int r = 0; r < size_; ++r) {
        const auto columns = columns_of(plan, r);
        for (std::size_t c = 0; c < columns.size(); ++c) {
          expected_gradient[static_cast<std::size_t>(t * all + columns[c])] +=
              weight(r, t, static_cast<std::int64_t>(c));
        }
      }
    }
    EXPECT_EQ(values(y), expected);
    const Values w = weights(rank_, mine);
    tape_.backward(weighted_sum(tape_, y, w));
    EXPECT_EQ(gradient(x), expected_gradient);
    EXPECT_EQ(over_ranks(dot(w, values(y))), over_ranks(dot(gradient(x), values(x))));
  }
}

TEST_F(DifferentiableCollective, ThreeGroupsOfFourHeads) {
  // q, k and v of 4 heads of 2 columns on the ranks: the plan of attention.
  ColumnPlan plan;
  std::vector<std::int64_t> heads;
  for (int r = 0; r < size_; ++r) heads.push_back(2 * (4 / size_ + (r < 4 % size_ ? 1 : 0)));
  plan.groups = {heads, heads, heads};
  EXPECT_EQ(plan.columns(), 24);
  const Var x = parameter(matrix(rank_, 24), 24);
  const Var y = reduce_scatter_columns(tape_, x, plan, world_);
  const std::int64_t mine = heads[static_cast<std::size_t>(rank_)];
  const std::int64_t first = std::accumulate(heads.begin(), heads.begin() + rank_, std::int64_t{0});
  ASSERT_EQ(y.shape().columns(), 3 * mine);
  for (std::int64_t t = 0; t < kRows; ++t) {
    for (std::int64_t c = 0; c < 3 * mine; ++c) {
      const std::int64_t column = c / mine * 8 + first + c % mine;
      double sum = 0;
      for (int r = 0; r < size_; ++r) sum += element(r, t, column);
      EXPECT_EQ(y.value().span<double>()[static_cast<std::size_t>(t * 3 * mine + c)], sum);
    }
  }
  tape_.clear();
}

TEST_F(DifferentiableCollective, OfOneRankIsItsOperand) {
  const auto self = create_self();
  const ColumnPlan plan{{{3}, {1}}, 0};
  const Var x = parameter(matrix(rank_, 4), 4);
  for (const Var& y : {copy_to(tape_, x, *self), reduce_from(tape_, x, *self), gather_columns(tape_, x, plan, *self),
                       reduce_scatter_columns(tape_, x, plan, *self)}) {
    EXPECT_EQ(y.view().data, x.view().data);
  }
}

TEST_F(DifferentiableCollective, InferenceRecordsNothing) {
  Tape inference(allocator_, stream_, TapeMode::inference);
  const ColumnPlan plan = uneven(2);
  const Var x = parameter(matrix(rank_, plan.columns()), plan.columns());
  const Var y = reduce_scatter_columns(inference, x, plan, world_);
  EXPECT_FALSE(y.requires_grad());
  EXPECT_EQ(y.shape().columns(), plan.columns_of(rank_));
}

TEST_F(DifferentiableCollective, ARepeatedStepAsksForNoMemory) {
  const ColumnPlan scatter = uneven(3);
  const ColumnPlan gather = uneven(0);
  const Var x = parameter(matrix(rank_, scatter.columns()), scatter.columns());
  const Var z = parameter(matrix(rank_, gather.columns_of(rank_)), gather.columns_of(rank_));
  std::uint64_t requests = 0;
  for (int step = 0; step < 4; ++step) {
    Var(x).clear_grad();
    Var(z).clear_grad();
    const Var y = reduce_scatter_columns(tape_, copy_to(tape_, x, world_), scatter, world_);
    tape_.backward(weighted_sum(tape_, y, weights(rank_, scatter.columns_of(rank_))));
    const Var g = reduce_from(tape_, gather_columns(tape_, z, gather, world_), world_);
    tape_.backward(weighted_sum(tape_, g, weights(0, gather.columns())));
    if (step == 1) requests = allocator_.report().system_requests;
  }
  EXPECT_EQ(allocator_.report().system_requests, requests);
}

TEST_F(DifferentiableCollective, RefusesAPlanThatDoesNotFit) {
  const ColumnPlan plan = uneven(1);
  const Var x = parameter(matrix(rank_, 2), 2);
  EXPECT_THROW(reduce_scatter_columns(tape_, x, plan, world_), ShapeError);
  EXPECT_THROW(gather_columns(tape_, x, plan, world_), ShapeError);
  EXPECT_THROW(reduce_scatter_columns(tape_, x, ColumnPlan{{{2}}, 0}, world_), ShapeError);
  tape_.clear();
}

}  // namespace
}  // namespace tforge
