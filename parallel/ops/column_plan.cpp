#include "parallel/ops/column_plan.h"

#include <array>
#include <cstddef>
#include <memory_resource>
#include <numeric>

#include "core/errors.h"
#include "kernels/elementwise.h"

namespace tforge {

namespace {

enum class Run : std::uint8_t { of_one_rank, common };

/// Calls f(columns of the whole, columns of what rank r has) for each run of columns of rank r; common ones come last.
template <class View, class F>
void for_each_run(const ColumnPlan& plan, const View& whole, const TensorView& of_rank, int rank, F&& f) {
  const auto r = static_cast<std::size_t>(rank);
  std::int64_t from = 0;
  std::int64_t to = 0;
  for (const auto& group : plan.groups) {
    const std::int64_t before = std::accumulate(group.begin(), group.begin() + rank, std::int64_t{0});
    f(whole.column_range(from + before, group[r]), of_rank.column_range(to, group[r]), Run::of_one_rank);
    from += std::accumulate(group.begin(), group.end(), std::int64_t{0});
    to += group[r];
  }
  if (plan.common > 0) f(whole.column_range(from, plan.common), of_rank.column_range(to, plan.common), Run::common);
}

/// The buffer of a collective: one contiguous [T, columns_of(r)] block a rank, in rank order.
class Blocks {
 public:
  Blocks(Tape& tape, const ColumnPlan& plan, std::int64_t rows, DType dtype, int ranks)
      : plan_(plan), rows_(rows), counts_(&pool_) {
    for (int r = 0; r < ranks; ++r) counts_.push_back(rows * plan.columns_of(r));
    const std::int64_t elements = std::accumulate(counts_.begin(), counts_.end(), std::int64_t{0});
    buffer_ = tape.empty(Shape{elements}, dtype, Purpose::communication);
  }

  std::span<const std::int64_t> counts() const { return counts_; }
  Tensor& buffer() { return buffer_; }

  /// for_each_run() of the block of rank r.
  template <class View, class F>
  void for_each_run(const View& whole, int rank, F&& f) {
    const std::int64_t first = std::accumulate(counts_.begin(), counts_.begin() + rank, std::int64_t{0});
    Tensor shared =
        buffer_.rows(first, counts_[static_cast<std::size_t>(rank)]).reshaped(Shape{rows_, plan_.columns_of(rank)});
    tforge::for_each_run(plan_, whole, shared.view(), rank, f);
  }

 private:
  const ColumnPlan& plan_;
  std::int64_t rows_;
  // A training step asks for no memory: the counts of up to 64 ranks lie here.
  std::array<std::byte, 64 * sizeof(std::int64_t) * 2> memory_;
  std::pmr::monotonic_buffer_resource pool_{memory_.data(), memory_.size()};
  std::pmr::vector<std::int64_t> counts_;
  Tensor buffer_;
};

void require_fit(const char* op, const ColumnPlan& plan, std::int64_t have, std::int64_t want, int ranks) {
  for (const auto& group : plan.groups) {
    if (group.size() != static_cast<std::size_t>(ranks)) {
      throw ShapeError("{}: a group of columns is cut for {} ranks, there are {}", op, group.size(), ranks);
    }
  }
  if (have != want) throw ShapeError("{}: the plan wants {} columns, the operand has {}", op, want, have);
}

}  // namespace

std::int64_t ColumnPlan::columns() const {
  std::int64_t sum = common;
  for (const auto& group : groups) sum = std::accumulate(group.begin(), group.end(), sum);
  return sum;
}

std::int64_t ColumnPlan::columns_of(int rank) const {
  std::int64_t sum = common;
  for (const auto& group : groups) sum += group.at(static_cast<std::size_t>(rank));
  return sum;
}

Tensor columns_to_owners(Tape& tape, const ConstTensorView& x, const ColumnPlan& plan, Communicator& tp) {
  require_fit("columns_to_owners", plan, x.columns(), plan.columns(), tp.size());
  Blocks blocks(tape, plan, x.rows(), x.dtype, tp.size());
  for (int r = 0; r < tp.size(); ++r) {
    blocks.for_each_run(x, r, [&](const ConstTensorView& from, const TensorView& to, Run) {
      kernels::add_to(tape.stream(), from, GradMode::overwrite, to);
    });
  }
  Tensor y = tape.empty(Shape{x.rows(), plan.columns_of(tp.rank())}, x.dtype);
  tp.reduce_scatter(tape.stream(), blocks.buffer().view(), y.view(), blocks.counts());
  return y;
}

Tensor columns_from_owners(Tape& tape, const ConstTensorView& y, const ColumnPlan& plan, Communicator& tp) {
  require_fit("columns_from_owners", plan, y.columns(), plan.columns_of(tp.rank()), tp.size());
  Blocks blocks(tape, plan, y.rows(), y.dtype, tp.size());
  tp.all_gather(tape.stream(), y, blocks.buffer().view(), blocks.counts());
  Tensor x = tape.empty(Shape{y.rows(), plan.columns()}, y.dtype);
  for (int r = 0; r < tp.size(); ++r) {
    blocks.for_each_run(x.view(), r, [&](const TensorView& to, const ConstTensorView& from, Run run) {
      const bool add = run == Run::common && r > 0;
      kernels::add_to(tape.stream(), from, add ? GradMode::accumulate : GradMode::overwrite, to);
    });
  }
  return x;
}

Tensor own_columns(Tape& tape, const ConstTensorView& x, const ColumnPlan& plan, Communicator& tp) {
  require_fit("own_columns", plan, x.columns(), plan.columns(), tp.size());
  Tensor y = tape.empty(Shape{x.rows(), plan.columns_of(tp.rank())}, x.dtype);
  for_each_run(plan, x, y.view(), tp.rank(), [&](const ConstTensorView& from, const TensorView& to, Run) {
    kernels::add_to(tape.stream(), from, GradMode::overwrite, to);
  });
  return y;
}

}  // namespace tforge
