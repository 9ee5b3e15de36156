#include "train/optimizer.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "core/copy.h"
#include "core/errors.h"
#include "kernels/adamw.h"
#include "parallel/grad_sync.h"
#include "parallel/ordered_sum.h"

namespace tforge {

namespace {

/// The sums of squares of several tensors: all are queued before the first is read.
class SquareSums {
 public:
  SquareSums(Allocator& allocator, Stream& stream, std::int64_t most)
      : stream_(stream),
        sums_(Tensor::empty(allocator, Shape{most}, DType::f64, Purpose::workspace)),
        workspace_(Tensor::empty(allocator, Shape{kernels::sum_of_squares_workspace(stream.device())}, DType::f64,
                                 Purpose::workspace)) {}
  void add(const Tensor& x) {
    kernels::sum_of_squares(stream_, x.view(), sums_.rows(count_++, 1).view(), workspace_.view());
  }
  /// The next sum, in the order of add().
  double next() {
    const std::size_t at = static_cast<std::size_t>(read_++) % here_.size();
    if (at == 0) {
      const std::int64_t more = std::min<std::int64_t>(count_ - read_ + 1, std::ssize(here_));
      copy(stream_, sums_.rows(read_ - 1, more).view(), {here_.data(), DType::f64, Device::cpu, Shape{more}, more});
    }
    return here_[at];
  }

 private:
  Stream& stream_;
  Tensor sums_, workspace_;
  std::int64_t count_ = 0, read_ = 0;
  std::array<double, 256> here_{};
};

std::vector<RowRange> all_rows(const ParameterSet& parameters) {
  std::vector<RowRange> all;
  for (const Parameter& p : parameters.all()) all.push_back({0, p.rows});
  return all;
}

}  // namespace

AdamW::AdamW(Allocator& allocator, ParameterSet& parameters) : AdamW(allocator, parameters, all_rows(parameters)) {
  ownership_ = Ownership::all_rows;
}

AdamW::AdamW(Allocator& allocator, ParameterSet& parameters, const std::vector<RowRange>& owned)
    : allocator_(allocator), parameters_(parameters), ownership_(Ownership::by_dp_rank) {
  if (owned.size() != parameters.all().size()) {
    throw InternalError("AdamW: rows of {} parameters, the model has {}", owned.size(), parameters.all().size());
  }
  std::int64_t total = 0;
  std::size_t i = 0;
  for (const Parameter& p : parameters.all()) {
    const RowRange& range = owned[i++];
    const bool whole = range.rows == 0 || range == RowRange{0, p.rows};
    if (range.first < 0 || range.rows < 0 || range.first > p.rows - range.rows ||
        (p.spec.shape.rank() == 1 && !whole)) {
      throw InternalError("AdamW: rows {} to {} of {}, of which {} are here", range.first, range.first + range.rows,
                          p.path(), p.rows);
    }
    total += range.rows * p.columns();
  }
  m_ = Tensor::zeros(allocator, Shape{total}, parameters.dtype(), Purpose::moments);
  v_ = Tensor::zeros(allocator, Shape{total}, parameters.dtype(), Purpose::moments);
  std::int64_t offset = 0;
  i = 0;
  for (const Parameter& p : parameters.all()) {
    const RowRange& range = owned[i++];
    const std::int64_t n = range.rows * p.columns();
    const Shape shape = p.spec.shape.rank() == 1 ? Shape{range.rows} : Shape{range.rows, p.columns()};
    states_.push_back(
        {range, offset, m_.rows(offset, n).reshaped(shape), v_.rows(offset, n).reshaped(shape), {AgeSegment{}}});
    offset += n;
  }
}

AdamW::Span AdamW::part_of_segment(const Parameter& p, const State& s, const RowRange& rows, std::size_t segment) {
  const std::int64_t begin = p.first_row + rows.first;
  const std::int64_t segment_end =
      segment + 1 < s.segments.size() ? s.segments[segment + 1].first_row : p.spec.shape[0];
  const std::int64_t first = std::max(s.segments[segment].first_row, begin);
  const std::int64_t end = std::min(segment_end, begin + rows.rows);
  return {first - begin, std::max<std::int64_t>(end - first, 0), segment};
}

void AdamW::reset_older_than(std::int64_t stage) {
  std::size_t i = 0;
  for (const Parameter& p : parameters_.all()) {
    State& s = states_[i++];
    for (std::size_t k = 0; k < s.segments.size(); ++k) {
      if (s.segments[k].stage >= stage) continue;
      s.segments[k].age = 0;
      const Span span = part_of_segment(p, s, s.owned, k);
      if (span.rows == 0) continue;
      s.m.rows(span.first, span.rows).fill_zero();
      s.v.rows(span.first, span.rows).fill_zero();
    }
  }
}

template <class F>
void AdamW::for_each_trained_span(const TrainConfig& config, std::int64_t stage, F&& f) const {
  std::size_t i = 0;
  for (const Parameter& p : parameters_.all()) {
    const State& s = states_[i++];
    for (std::size_t k = 0; k < s.segments.size(); ++k) {
      const AgeSegment& segment = s.segments[k];
      double rate = 1;
      if (segment.stage < stage) {
        if (config.growth.old_rows == OldRows::freeze) continue;
        if (config.growth.old_rows == OldRows::rate) rate = config.growth.old_rows_rate;
      }
      const std::int64_t warmup = config.growth.new_rows_warmup_steps;
      if (segment.stage > 0 && segment.age < warmup) {
        rate *= static_cast<double>(segment.age + 1) / static_cast<double>(warmup);
      }
      f(i - 1, p, s, part_of_segment(p, s, s.owned, k), rate);
    }
  }
}

template <class ForEachPart>
void AdamW::add_squares(Stream& stream, const ForEachPart& for_each_part) const {
  std::int64_t parts = 0;
  for_each_part([&](double&, const Tensor&) { ++parts; });
  SquareSums sums(allocator_, stream, parts);
  for_each_part([&](double&, const Tensor& part) { sums.add(part); });
  for_each_part([&](double& to, const Tensor&) { to += sums.next(); });
}

double AdamW::norm_by_shard(Stream& stream, const TrainConfig& config, std::int64_t stage, Reducer& shards) const {
  std::array<double, kMaxShards> squares{};
  double replicated = 0;
  std::int64_t here = 0;
  // Calls f(number of the shard among those held here, its rows of p).
  const auto for_each_shard = [](const Parameter& p, auto&& f) {
    std::int64_t number = 0;
    for (int i = 0; i < p.spec.shards.ranks(); ++i) {
      const RowRange rows{p.spec.shards.begin(i) - p.first_row, p.spec.shards.count(i)};
      if (rows.first >= 0 && rows.first + rows.rows <= p.rows) f(number++, rows);
    }
  };
  for (const Parameter& p : parameters_.all()) {
    if (p.spec.placement != Placement::sharded) continue;
    for_each_shard(p, [&](std::int64_t number, const RowRange&) { here = std::max(here, number + 1); });
  }
  // Calls f(where its squares are added, part of a gradient).
  const auto for_each_part = [&](auto&& f) {
    for_each_trained_span(config, stage,
                          [&](std::size_t, const Parameter& p, const State& s, const Span& owned, double) {
                            const auto part = [&](const RowRange& rows, double& to) {
                              const Span span = part_of_segment(p, s, rows, owned.segment);
                              if (span.rows > 0) f(to, p.gradient.rows(rows.first + span.first, span.rows));
                            };
                            if (p.spec.placement == Placement::replicated) {
                              part({0, p.rows}, replicated);
                            } else {
                              for_each_shard(p, [&](std::int64_t number, const RowRange& rows) {
                                part(rows, squares[static_cast<std::size_t>(number)]);
                              });
                            }
                          });
  };
  add_squares(stream, for_each_part);
  double total = 0;
  shards.sum(stream, ConstTensorView{squares.data(), DType::f64, Device::cpu, Shape{here, 1}, 1},
             TensorView{&total, DType::f64, Device::cpu, Shape{1, 1}, 1});
  return std::sqrt(total + replicated);
}

double AdamW::gradient_norm(Stream& stream, const TrainConfig& config, std::int64_t stage, const Mesh& mesh,
                            Reducer& shards) const {
  if (shards.by_shard()) return norm_by_shard(stream, config, stage, shards);
  std::array<double, 2> squares{};  // sharded over tp, replicated
  add_squares(stream, [&](auto&& f) {
    // Neighbours in the flat gradients are one part.
    std::size_t kind = 0;
    std::int64_t first = 0, elements = 0;
    const auto end_part = [&] {
      if (elements > 0) f(squares[kind], parameters_.gradients().rows(first, elements));
    };
    for_each_trained_span(config, stage,
                          [&](std::size_t, const Parameter& p, const State& s, const Span& span, double) {
                            if (span.rows == 0) return;
                            const std::size_t of = p.spec.placement == Placement::sharded ? 0 : 1;
                            const std::int64_t begin = p.offset + (s.owned.first + span.first) * p.columns();
                            if (of != kind || begin != first + elements) {
                              end_part();
                              kind = of;
                              first = begin;
                              elements = 0;
                            }
                            elements += span.rows * p.columns();
                          });
    end_part();
  });
  if (ownership_ == Ownership::by_dp_rank) {
    mesh.dp_comm->all_reduce(stream, TensorView{squares.data(), DType::f64, Device::cpu, Shape{2}, 2}, ReduceOp::sum);
  }
  return global_norm(stream, *mesh.tp_comm, squares[0], squares[1]);
}

void AdamW::update(Stream& stream, const TrainConfig& config, std::int64_t stage, double lr, double grad_scale) {
  // Neighbours in the flat tensors that take the same step are one call of the kernel.
  struct Run {
    kernels::AdamWStep step;
    std::int64_t columns = 1;  // 1 where rows do not count
    std::int64_t value = 0, moment = 0, elements = 0;
  } run;
  const auto end_run = [&] {
    if (run.elements == 0) return;
    const auto part = [&](const Tensor& flat, std::int64_t first) {
      return flat.rows(first, run.elements).reshaped(Shape{run.elements / run.columns, run.columns});
    };
    Tensor value = part(parameters_.values(), run.value);
    const Tensor gradient = part(parameters_.gradients(), run.value);
    Tensor m = part(m_, run.moment), v = part(v_, run.moment);
    kernels::adamw_update(stream, run.step, value.view(), gradient.view(), m.view(), v.view());
  };
  for_each_trained_span(config, stage,
                        [&](std::size_t i, const Parameter& p, const State& s, const Span& span, double rate) {
                          AgeSegment& segment = states_[i].segments[span.segment];
                          ++segment.age;
                          if (span.rows == 0) return;
                          const auto age = static_cast<double>(segment.age);
                          Run next;
                          next.step.lr = lr * rate;
                          next.step.beta1 = config.beta1;
                          next.step.beta2 = config.beta2;
                          next.step.eps = config.eps;
                          next.step.weight_decay = p.spec.decay == Decay::yes ? config.weight_decay : 0;
                          next.step.bias1 = 1 - std::pow(config.beta1, age);
                          next.step.bias2 = 1 - std::pow(config.beta2, age);
                          next.step.grad_scale = grad_scale;
                          if (p.spec.rows_used == RowsUsed::some && config.idle_rows == IdleRows::skip) {
                            next.step.idle_rows = kernels::IdleRows::skip;
                            next.columns = p.columns();
                          }
                          next.value = p.offset + (s.owned.first + span.first) * p.columns();
                          next.moment = s.offset + span.first * p.columns();
                          next.elements = span.rows * p.columns();
                          if (next.step == run.step && next.columns == run.columns &&
                              next.value == run.value + run.elements && next.moment == run.moment + run.elements) {
                            run.elements += next.elements;
                          } else {
                            end_run();
                            run = next;
                          }
                        });
  end_run();
}

AdamW make_optimizer(const RunConfig& config, Allocator& allocator, ParameterSet& parameters,
                     const std::vector<Bucket>& buckets, const Mesh& mesh) {
  if (config.parallel.zero == 0) return {allocator, parameters};
  return {allocator, parameters, parameters.owned_rows(buckets, mesh.dp_index)};
}

}  // namespace tforge
