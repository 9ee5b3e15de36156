#pragma once
// AdamW whose rows have ages of their own: a parameter that grew holds one segment of rows for each growth.
#include <cstdint>
#include <vector>

#include "autograd/reducer.h"
#include "core/allocator.h"
#include "core/tensor.h"
#include "model/parameter.h"
#include "parallel/mesh.h"
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

/// Which of the rows that it holds a rank owns: all, or those that the other ranks of dp do not.
enum class Ownership : std::uint8_t { all_rows, by_dp_rank };

/// A rank owns some rows of each parameter that it holds: it keeps their moments and updates them. Either every rank of
/// the dp axis owns all of them and does the same work on the same numbers, or (ZeRO-1, arXiv 1910.02054) each row
/// belongs to one of them, and the others take its new values from there. Weights are their own masters: f32 or f64.
class AdamW {
 public:
  /// Owns every row that is held here. Moments are zero; one segment a parameter. `parameters` must outlive it.
  AdamW(Allocator& allocator, ParameterSet& parameters);
  /// ZeRO-1: owns one range of rows of each parameter. Over the ranks of dp the ranges of a parameter cover it once; a
  /// vector is owned whole or not at all. Throws InternalError for ranges that do not fit the parameters.
  AdamW(Allocator& allocator, ParameterSet& parameters, const std::vector<RowRange>& owned);

  struct State {
    RowRange owned;                    // of the rows held here
    std::int64_t offset = 0;           // element of the flat moments at which they begin
    Tensor m, v;                       // [owned.rows, columns]
    std::vector<AgeSegment> segments;  // of the whole parameter, by first_row, the first at 0; the same on every rank
  };
  State& state(std::size_t parameter) { return states_[parameter]; }
  const State& state(std::size_t parameter) const { return states_[parameter]; }

  /// Whether the ranks of dp own different rows.
  Ownership ownership() const { return ownership_; }

  /// Zeroes moments and ages of all rows born before `stage`.
  void reset_older_than(std::int64_t stage);

  /// Norm of the gradients that an update would use (frozen rows have no share), every logical element once; in f64,
  /// the same bits on every rank of the mesh. Reads the gradients of the rows owned here. Non-finite when a gradient
  /// is. Collective over tp, and over dp where each of its ranks owns other rows.
  /// With a reducer by_shard(), that of the model, the squares of each virtual shard are added apart, and those of the
  /// shards in order. It reads the gradients of all rows held here, and is collective over tp alone.
  double gradient_norm(Stream& stream, const TrainConfig& config, std::int64_t stage, const Mesh& mesh,
                       Reducer& shards = identity_reducer()) const;

  /// One update of the rows owned here; `grad_scale` is the clip factor. Rows born before `stage` follow
  /// config.growth.old_rows; rows born in a stage > 0 warm up linearly over their own first
  /// config.growth.new_rows_warmup_steps updates.
  void update(Stream& stream, const TrainConfig& config, std::int64_t stage, double lr, double grad_scale);

 private:
  struct Span {          // the part of a segment within some of the rows held here
    std::int64_t first;  // among those rows
    std::int64_t rows;
    std::size_t segment;
  };
  static Span part_of_segment(const Parameter& p, const State& s, const RowRange& rows, std::size_t segment);
  /// for_each_part(f) calls f(double& to, const Tensor& part) for parts of the gradients, in one order: adds the
  /// squares of each part to where they belong.
  template <class ForEachPart>
  void add_squares(Stream& stream, const ForEachPart& for_each_part) const;
  double norm_by_shard(Stream& stream, const TrainConfig& config, std::int64_t stage, Reducer& shards) const;
  /// Calls f(parameter, state, span, rate) for every span of owned rows that an update touches, rate being its factor
  /// of lr.
  template <class F>
  void for_each_trained_span(const TrainConfig& config, std::int64_t stage, F&& f) const;

  Allocator& allocator_;
  ParameterSet& parameters_;
  Ownership ownership_ = Ownership::all_rows;
  Tensor m_, v_;
  std::vector<State> states_;
};

/// As config.parallel.zero asks: owns everything, or what rank mesh.dp_index owns of `buckets` of the parameters.
AdamW make_optimizer(const RunConfig& config, Allocator& allocator, ParameterSet& parameters,
                     const std::vector<Bucket>& buckets, const Mesh& mesh);

}  // namespace tforge
