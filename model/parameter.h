#pragma once
// The parameters of a model: stable paths, shards, and one contiguous tensor for all values and one for all gradients.
#include <deque>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "autograd/var.h"
#include "core/allocator.h"
#include "core/tensor.h"
#include "parallel/buckets.h"
#include "parallel/shard.h"

namespace tforge {

/// sharded: each tensor-parallel rank holds the rows of its borders. replicated: every rank holds the whole.
enum class Placement : std::uint8_t { sharded, replicated };
/// Whether decoupled weight decay applies.
enum class Decay : std::uint8_t { yes, no };

/// Whether every row takes part in every pass, or those that the text hits: rows of tables, which train.idle_rows is
/// about.
enum class RowsUsed : std::uint8_t { all, some };

/// Rows [first, first + rows) of those that a rank holds of a parameter.
struct RowRange {
  std::int64_t first = 0;
  std::int64_t rows = 0;
  bool operator==(const RowRange&) const = default;
};

struct ParameterSpec {
  std::string path;  // "layers.0.attention.query.keys"; stable, used in checkpoints
  Shape shape;       // of the whole, rows x columns (or a vector)
  Placement placement = Placement::sharded;
  ShardBorders borders;  // rows of each tensor-parallel rank; unused when replicated
  Decay decay = Decay::yes;
  Bucketing bucketing = Bucketing::shared;
  ShardBorders shards = {};  // the virtual shards that the borders follow, if they do
  RowsUsed rows_used = RowsUsed::all;
  std::optional<std::size_t> axis = {};  // of its model's kind, if its rows are those of one (ShardAxis)
};

struct Parameter {
  ParameterSpec spec;
  std::int64_t first_row = 0;  // of the rows held here
  std::int64_t rows = 0;       // held here
  std::int64_t offset = 0;     // element of the flat tensors at which they begin
  bool zeroed = false;         // since clear_gradients: no op wrote a gradient, so it was set to 0
  Tensor stored, gradient;     // [rows, columns], parts of ParameterSet::values() and gradients()
  Var var;                     // what ops read, and the gradient slot

  const std::string& path() const { return spec.path; }
  Tensor value() const { return stored; }
  std::int64_t columns() const { return spec.shape.rank() == 1 ? 1 : spec.shape.columns(); }
};

/// Where the parameters of a rank lie in its flat tensors, and how long these are.
struct FlatLayout {
  std::vector<FlatBlock> blocks;
  std::int64_t elements = 0;

  /// Buckets of about `bytes`, with the parts of `ranks` data-parallel ranks.
  std::vector<Bucket> buckets(DType dtype, std::int64_t bytes, int ranks) const;
};

/// Of what tensor-parallel rank `tp_rank` holds. Each parameter starts at a multiple of 16 elements.
FlatLayout flat_layout(const std::vector<ParameterSpec>& specs, int tp_rank);

class ParameterSet final : private GradHook {
 public:
  /// Allocates values (zero) and gradients (zero) of what tensor-parallel rank `tp_rank` holds, in flat_layout(); the
  /// gaps stay zero. With dtype bf16 both are f32, and ops read copies of the matrices that round() makes; what has
  /// one column (norms, biases) they read as it is.
  ParameterSet(Allocator& allocator, const std::vector<ParameterSpec>& specs, DType dtype, int tp_rank);

  ParameterSet(const ParameterSet&) = delete;
  ParameterSet& operator=(const ParameterSet&) = delete;

  /// `hook` (may be null) hears of every gradient that is final in a pass, by index into all(). One that nothing was
  /// written to is zero by then.
  void set_hook(GradHook* hook) { hook_ = hook; }

  std::deque<Parameter>& all() { return parameters_; }
  const std::deque<Parameter>& all() const { return parameters_; }
  /// Throws InternalError when there is none of that path.
  Parameter& find(std::string_view path);
  const Parameter& find(std::string_view path) const;
  /// All values, and all gradients, as one vector each: what data parallelism reduces in one call.
  Tensor& values() { return values_; }
  Tensor& gradients() { return gradients_; }
  /// Of values() and gradients().
  DType dtype() const { return values_.dtype(); }
  /// Of what ops compute with.
  DType compute() const { return copies_ ? copies_.dtype() : dtype(); }
  /// Makes the copies that ops read, where there are such: to be called when values have changed.
  void round(Stream& stream);
  /// FlatLayout::buckets() of the flat tensors.
  std::vector<Bucket> buckets(std::int64_t bytes, int ranks) const { return layout_.buckets(dtype(), bytes, ranks); }
  /// The rows of each parameter that data-parallel rank `dp_rank` owns of `buckets`: one range, which may be empty.
  std::vector<RowRange> owned_rows(const std::vector<Bucket>& buckets, int dp_rank) const;

  /// Forgets all gradients without touching memory: the next contribution overwrites.
  void clear_gradients();
  /// Zeroes the gradient of every parameter that received none since clear_gradients() and of which no hook heard.
  void finish_gradients();

 private:
  void gradient_ready(int parameter_id) override;

  GradHook* hook_ = nullptr;
  FlatLayout layout_;
  Tensor values_, gradients_, copies_;
  std::deque<Parameter> parameters_;
};

}  // namespace tforge
