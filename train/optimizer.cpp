#include "train/optimizer.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "kernels/adamw.h"
#include "parallel/grad_sync.h"

namespace tforge {

AdamW::AdamW(Allocator& allocator, ParameterSet& parameters) : parameters_(parameters) {
  std::int64_t total = 0;
  for (const Parameter& p : parameters.all()) total += p.value().elements();
  m_ = Tensor::zeros(allocator, Shape{total}, parameters.dtype(), Purpose::moments);
  v_ = Tensor::zeros(allocator, Shape{total}, parameters.dtype(), Purpose::moments);
  std::int64_t offset = 0;
  for (const Parameter& p : parameters.all()) {
    const std::int64_t n = p.value().elements();
    states_.push_back({m_.rows(offset, n).reshaped(p.value().shape()),
                       v_.rows(offset, n).reshaped(p.value().shape()),
                       {AgeSegment{}}});
    offset += n;
  }
}

void AdamW::reset_older_than(std::int64_t stage) {
  std::size_t i = 0;
  for (const Parameter& p : parameters_.all()) {
    State& s = states_[i++];
    for (std::size_t k = 0; k < s.segments.size(); ++k) {
      if (s.segments[k].stage >= stage) continue;
      s.segments[k].age = 0;
      const std::int64_t end = k + 1 < s.segments.size() ? s.segments[k + 1].first_row : p.spec.shape[0];
      const std::int64_t first = std::max(s.segments[k].first_row, p.first_row);
      const std::int64_t rows = std::min(end, p.first_row + p.rows) - first;
      if (rows <= 0) continue;
      s.m.rows(first - p.first_row, rows).fill_zero();
      s.v.rows(first - p.first_row, rows).fill_zero();
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
      const std::int64_t end = k + 1 < s.segments.size() ? s.segments[k + 1].first_row : p.spec.shape[0];
      const std::int64_t first = std::max(segment.first_row, p.first_row);
      const std::int64_t rows = std::max<std::int64_t>(std::min(end, p.first_row + p.rows) - first, 0);
      f(i - 1, p, s, Span{first - p.first_row, rows, k}, rate);
    }
  }
}

double AdamW::gradient_norm(Stream& stream, const TrainConfig& config, std::int64_t stage, Communicator& tp) const {
  double sharded = 0, replicated = 0;
  for_each_trained_span(config, stage, [&](std::size_t, const Parameter& p, const State&, const Span& span, double) {
    if (span.rows == 0) return;
    const Tensor part = p.gradient.rows(span.first, span.rows);
    const double squares = kernels::sum_of_squares(stream, part.view());
    (p.spec.placement == Placement::sharded ? sharded : replicated) += squares;
  });
  return global_norm(stream, tp, sharded, replicated);
}

void AdamW::update(Stream& stream, const TrainConfig& config, std::int64_t stage, double lr, double grad_scale) {
  for_each_trained_span(
      config, stage, [&](std::size_t i, const Parameter& p, const State&, const Span& span, double rate) {
        AgeSegment& segment = states_[i].segments[span.segment];
        ++segment.age;
        if (span.rows == 0) return;
        const auto age = static_cast<double>(segment.age);
        kernels::AdamWStep step;
        step.lr = lr * rate;
        step.beta1 = config.beta1;
        step.beta2 = config.beta2;
        step.eps = config.eps;
        step.weight_decay = p.spec.decay == Decay::yes ? config.weight_decay : 0;
        step.bias1 = 1 - std::pow(config.beta1, age);
        step.bias2 = 1 - std::pow(config.beta2, age);
        step.grad_scale = grad_scale;
        Tensor value = p.value().rows(span.first, span.rows);
        Tensor m = states_[i].m.rows(span.first, span.rows), v = states_[i].v.rows(span.first, span.rows);
        const Tensor gradient = p.gradient.rows(span.first, span.rows);
        kernels::adamw_update(stream, step, value.view(), gradient.view(), m.view(), v.view());
      });
}

}  // namespace tforge
