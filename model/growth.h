#pragma once
// Growing a model: what is asked for, and what its kind makes of it (ModelKind::growth). Every kind has rules of its
// own; checkpoints, probe and history are the same for all (train/expand.h). What the rules are: docs/growth.md.
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "core/device.h"
#include "core/tensor.h"
#include "model/config.h"
#include "model/language_model.h"
#include "model/parameter.h"

namespace tforge {

struct GrowthRequest {
  std::string model;                           // its name in messages: the checkpoint's path
  std::map<std::string, std::int64_t> counts;  // wanted, by the kind's names: {"ffn", 768}, {"dim", 256}
  std::string rule;                            // the kind's default where it is empty
  std::uint64_t seed = 1;
  double noise = 0;  // relative, on old parameters; in which way is the kind's
};

/// A count of the configuration that a kind can grow.
struct GrowthGroup {
  std::string name;  // "ffn"
  std::string unit;  // "tokens a layer"
  std::int64_t before = 0, after = 0;
  std::string rule = {};       // for the growth history
  std::string parameter = {};  // whose state number "scale" goes there too, where there is one
};

/// Fills in what is wanted of `groups`, which have `before`. Throws UsageError for a name that is none of theirs, for
/// shrinking, and when nothing grows.
void set_wanted(const GrowthRequest& request, std::string_view kind, std::vector<GrowthGroup>& groups);

enum class Moment : std::uint8_t { first, second };

/// A vector as one column.
template <class View>
View as_matrix(View view) {
  if (view.shape.rank() == 1) {
    view.shape = Shape{view.elements(), 1};
    view.row_stride = 1;
  }
  return view;
}

/// One growth, as pure functions of old parameters, request and row: the same rows come out whatever the ranks. Row r
/// of an old parameter is row r of the grown one, whose further rows are new (where rows_of_one() is more than 1: rows
/// r rows_of_one() and so many from there). All views are matrices (as_matrix).
class Growth {
 public:
  virtual ~Growth() = default;
  virtual const ModelConfig& grown() const = 0;
  /// All that the kind can grow, grown or not.
  virtual const std::vector<GrowthGroup>& groups() const = 0;
  /// Whether the function stays the same but for rounding.
  virtual bool exact() const = 0;
  /// How many neighbouring rows one row of an old parameter becomes. Then rows are asked for by whole multiples.
  virtual std::int64_t rows_of_one(const ParameterSpec& /*spec*/) const { return 1; }
  /// Rows first .. first + out.rows() of a parameter of the grown model. `old` is the whole of it before; of a
  /// parameter that was not there it has no rows.
  virtual void fill(Stream& stream, const ParameterSpec& spec, ConstTensorView old, std::int64_t first,
                    TensorView out) const = 0;
  /// The moments of rows first .. of a parameter that were there before, from `old`, the rows that they were then.
  /// Those of new rows are zero.
  virtual void fill_moment(Moment moment, const ParameterSpec& spec, ConstTensorView old, std::int64_t first,
                           TensorView out) const;
  /// What a number of the model's state becomes.
  virtual double state_number(const StateNumber& before) const { return before.value; }
};

}  // namespace tforge
