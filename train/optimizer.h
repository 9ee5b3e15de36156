#pragma once
// AdamW whose rows have ages of their own: a parameter that grew holds one segment of rows for each growth.
#include <cstdint>
#include <vector>

#include "core/allocator.h"
#include "core/tensor.h"
#include "model/parameter.h"
#include "parallel/communicator.h"
#include "train/config.h"

namespace tforge {

/// Rows [first_row, next segment's first_row) of the whole parameter, born at growth number `stage` (0: with the
/// model), after `age` updates. Bias correction and warm-up count from the segment's own birth.
struct AgeSegment {
  std::int64_t first_row = 0;
  std::int64_t age = 0;
  std::int64_t stage = 0;
  bool operator==(const AgeSegment&) const = default;
};

class AdamW {
 public:
  /// Moments of the parameters that are held here, zero; one segment a parameter. `parameters` must outlive it.
  AdamW(Allocator& allocator, ParameterSet& parameters);

  struct State {
    Tensor m, v;                       // like the parameter's value
    std::vector<AgeSegment> segments;  // of the whole parameter, by first_row, the first at 0
  };
  State& state(std::size_t parameter) { return states_[parameter]; }
  const State& state(std::size_t parameter) const { return states_[parameter]; }

  /// Zeroes moments and ages of all rows born before `stage`.
  void reset_older_than(std::int64_t stage);

  /// Norm of the gradients that an update would use (frozen rows have no share), every logical element once; in f64,
  /// the same on every rank of `tp`. Non-finite when a gradient is. Collective over tp.
  double gradient_norm(Stream& stream, const TrainConfig& config, std::int64_t stage, Communicator& tp) const;

  /// One update; `grad_scale` is the clip factor. Rows born before `stage` follow config.growth.old_rows; rows born in
  /// a stage > 0 warm up linearly over their own first config.growth.new_rows_warmup_steps updates.
  void update(Stream& stream, const TrainConfig& config, std::int64_t stage, double lr, double grad_scale);

 private:
  struct Span {          // the part of a segment that is held here
    std::int64_t first;  // local row
    std::int64_t rows;
    std::size_t segment;
  };
  /// Calls f(parameter, state, span, rate) for every span that an update touches, rate being its factor of lr.
  template <class F>
  void for_each_trained_span(const TrainConfig& config, std::int64_t stage, F&& f) const;

  ParameterSet& parameters_;
  Tensor m_, v_;
  std::vector<State> states_;
};

}  // namespace tforge
