#include "model/memoryformer_growth.h"

#include <algorithm>
#include <array>

#include "core/errors.h"
#include "kernels/elementwise.h"
#include "model/memoryformer.h"

namespace tforge {

namespace {

class MemoryFormerGrowth final : public Growth {
 public:
  MemoryFormerGrowth(const ModelConfig& before, const GrowthRequest& request) : grown_(before) {
    if (request.noise > 0)
      throw UsageError("a memoryformer grows without noise, so --noise {} is not for it", request.noise);
    const std::string rule = request.rule.empty() ? "keep-weight" : request.rule;
    if (rule != "keep-weight" && rule != "extend-weight") {
      throw UsageError("'{}' is no rule of a memoryformer's growth; there are keep-weight and extend-weight", rule);
    }
    for (const MemoryGroup group : kMemoryGroups) {
      groups_.push_back({fmt::format("{}.tables", name_of(group)), "tables a layer", memory_shape(before, group).tables,
                         0, "zero-tables"});
    }
    for (const MemoryGroup group : kMemoryGroups) {
      groups_.push_back(
          {fmt::format("{}.bits", name_of(group)), "bits a table", memory_shape(before, group).bits, 0, rule});
    }
    set_wanted(request, before.kind, groups_);

    // Nothing of the shape is left to defaults, which would follow the bits.
    grown_.memory_width = memory_shape(before, MemoryGroup::ffn_in).d_out;
    bool has_added_tables = false;
    for (std::size_t g = 0; g < kMemoryGroups.size(); ++g) {
      const MemoryShape s = memory_shape(before, kMemoryGroups[g]);
      const std::int64_t bits = groups_[kMemoryGroups.size() + g].after;
      has_added_tables = has_added_tables || s.tables > s.chunks;
      new_bits_[g] = bits - s.bits;
      exact_ = exact_ && (new_bits_[g] == 0 || rule == "keep-weight");
      grown_.tables[g] = groups_[g].after;
      grown_.hash_bits[g] = bits;
      grown_.chunk_bits[g] = s.chunk_bits;
      grown_.weight_bits[g] = new_bits_[g] > 0 && rule == "extend-weight" ? bits : s.weight_bits;
    }
    if (!has_added_tables) grown_.table_seed = static_cast<std::int64_t>(request.seed);
    grown_.validate();
  }

  const ModelConfig& grown() const override { return grown_; }
  const std::vector<GrowthGroup>& groups() const override { return groups_; }
  bool exact() const override { return exact_; }

  std::int64_t rows_of_one(const ParameterSpec& spec) const override {
    return spec.axis ? std::int64_t{1} << new_bits_[*spec.axis] : 1;
  }

  void fill(Stream& stream, const ParameterSpec& spec, ConstTensorView old, std::int64_t first,
            TensorView out) const override {
    const std::int64_t copies = rows_of_one(spec);
    const std::int64_t there = std::clamp<std::int64_t>(old.rows() * copies - first, 0, out.rows());
    repeat(stream, old.row_range(std::min(first / copies, old.rows()), there / copies), copies,
           out.row_range(0, there));
    kernels::fill(stream, out.row_range(there, out.rows() - there), 0);
  }

  void fill_moment(Moment, const ParameterSpec& spec, ConstTensorView old, std::int64_t,
                   TensorView out) const override {
    Stream stream;
    repeat(stream, old, rows_of_one(spec), out);
  }

 private:
  /// Each row of `old` `copies` times, one below the other.
  static void repeat(Stream& stream, const ConstTensorView& old, std::int64_t copies, const TensorView& out) {
    if (old.rows() == 0) return;
    for (std::int64_t i = 0; i < copies; ++i) {
      TensorView every = out.row_range(i, 1);
      every.shape = old.shape;
      every.row_stride = out.row_stride * copies;
      kernels::add_to(stream, old, GradMode::overwrite, every);
    }
  }

  ModelConfig grown_;
  std::vector<GrowthGroup> groups_;
  std::array<std::int64_t, 3> new_bits_{};  // by MemoryGroup
  bool exact_ = true;
};

}  // namespace

std::unique_ptr<Growth> memoryformer_growth(const ModelConfig& before, const GrowthRequest& request) {
  return std::make_unique<MemoryFormerGrowth>(before, request);
}

}  // namespace tforge
