#include "model/transformer_growth.h"

#include <cmath>

#include "core/errors.h"
#include "core/rng.h"
#include "kernels/elementwise.h"
#include "kernels/random.h"
#include "model/attention.h"
#include "model/transformer.h"

namespace tforge {

namespace {

constexpr const char* kRule = "net2net";

/// Unit i of `after` is a copy of unit i mod before.
struct Axis {
  std::int64_t before = 0, after = 0;
  std::int64_t source(std::int64_t unit) const { return unit % before; }
  /// How many units of the grown axis are copies of the same one as `unit`.
  std::int64_t copies(std::int64_t unit) const { return (after - source(unit) + before - 1) / before; }
};

/// Which axis of a parameter is consumed: its weights are divided among the copies of a unit.
enum class Consumed : std::uint8_t { none, rows, columns };

struct Layout {
  Axis rows, columns;
  Consumed consumed = Consumed::none;
  /// The axis of the units that it produces, of which each copy gets its part of the gradient; none: each gets all.
  enum class Produced : std::uint8_t { none, rows, columns } produced = Produced::none;
};

class TransformerGrowth final : public Growth {
 public:
  TransformerGrowth(const ModelConfig& before, const GrowthRequest& request)
      : before_(before), grown_(before), seed_(request.seed), noise_(request.noise) {
    if (!request.rule.empty() && request.rule != kRule) {
      throw UsageError("'{}' is no growth rule of a {}; there is {}", request.rule, before.kind, kRule);
    }
    if (!(noise_ >= 0)) throw UsageError("noise on old weights is {}, want 0 or more", noise_);
    groups_ = {{"dim", "columns", before.dim, 0, kRule},
               {"ffn_dim", "neurons a layer", before.neurons(), 0, kRule},
               {"layers", "blocks", before.layers, 0, "identity"}};
    set_wanted(request, before.kind, groups_);
    const std::int64_t head = before.head_dim();
    grown_.dim = groups_[0].after;
    if (grown_.dim % head != 0) {
      throw UsageError("dim = {} is no multiple of the {} dimensions of a head, which stay; ask for {} or {}",
                       grown_.dim, head, grown_.dim / head * head, (grown_.dim / head + 1) * head);
    }
    grown_.heads = grown_.dim / head;
    grown_.ffn_dim = groups_[1].after;
    grown_.layers = groups_[2].after;
    stream_ = {before.dim, grown_.dim};
    neurons_ = {before.neurons(), grown_.ffn_dim};
    words_ = {before.vocab, before.vocab};
    slots_ = {before.heads * before.attention.slots, grown_.heads * before.attention.slots};
    block_ = {before.attention.block, before.attention.block};
  }

  const ModelConfig& grown() const override { return grown_; }
  const std::vector<GrowthGroup>& groups() const override { return groups_; }
  bool exact() const override { return grown_.dim % before_.dim == 0; }

  void fill(Stream& stream, const ParameterSpec& spec, ConstTensorView old, std::int64_t first,
            TensorView out) const override {
    if (old.rows() == 0) return fill_new_block(stream, spec, first, out);
    const Layout l = layout_of(spec);
    const Rng shares(seed_, spec.path + " shares");
    with_compute_type("growth", out.dtype, [&](auto zero) {
      using T = decltype(zero);
      for (std::int64_t i = 0; i < out.rows(); ++i) {
        const std::int64_t r = first + i;
        const T* from = old.as<T>() + l.rows.source(r) * old.row_stride;
        T* to = out.as<T>() + i * out.row_stride;
        for (std::int64_t c = 0; c < out.columns(); ++c) {
          to[c] = static_cast<T>(static_cast<double>(from[l.columns.source(c)]) * share(l, shares, r, c));
        }
      }
    });
  }

  void fill_moment(Moment moment, const ParameterSpec& spec, ConstTensorView old, std::int64_t first,
                   TensorView out) const override {
    const Layout l = layout_of(spec);
    with_compute_type("growth", out.dtype, [&](auto zero) {
      using T = decltype(zero);
      for (std::int64_t i = 0; i < out.rows(); ++i) {
        const T* from = old.as<T>() + i * old.row_stride;
        T* to = out.as<T>() + i * out.row_stride;
        for (std::int64_t c = 0; c < out.columns(); ++c) {
          std::int64_t k = 1;
          if (l.produced == Layout::Produced::rows) k = l.rows.copies(first + i);
          if (l.produced == Layout::Produced::columns) k = l.columns.copies(c);
          to[c] = from[l.columns.source(c)] / static_cast<T>(moment == Moment::first ? k : k * k);
        }
      }
    });
  }

 private:
  Layout layout_of(const ParameterSpec& spec) const {
    using Produced = Layout::Produced;
    const Axis one{1, 1};
    const std::string_view path = spec.path;
    const auto is = [path](std::string_view end) { return path.ends_with(end); };
    if (path == "embedding") return {words_, stream_, Consumed::none, Produced::columns};
    if (path == "head") return {words_, stream_, Consumed::columns, Produced::none};
    // Of a tied head the table, which is copied, gives each copy all of the gradient.
    if (path.starts_with("final_norm.") && before_.head == Head::tied) {
      return {stream_, one, Consumed::rows, Produced::none};
    }
    if (is("query.weight") || is("key.weight") || is("value.weight")) {
      return {stream_, stream_, Consumed::columns, Produced::rows};
    }
    if (is_attention_slots(path)) return {slots_, block_, Consumed::none, Produced::rows};
    if (is("proj.weight")) return {stream_, stream_, Consumed::rows, Produced::columns};
    if (is("ffn.in.weight")) return {neurons_, stream_, Consumed::columns, Produced::rows};
    if (is("ffn.in.bias")) return {neurons_, one, Consumed::none, Produced::rows};
    if (is("ffn.out.weight")) return {neurons_, stream_, Consumed::rows, Produced::columns};
    return {stream_, one, Consumed::none, Produced::rows};  // LayerNorm and the other biases
  }

  /// Of a weight in the weights of its consumed unit's copies.
  double share(const Layout& l, const Rng& shares, std::int64_t r, std::int64_t c) const {
    if (l.consumed == Consumed::none) return 1;
    const bool by_rows = l.consumed == Consumed::rows;
    const Axis& axis = by_rows ? l.rows : l.columns;
    const std::int64_t unit = by_rows ? r : c, k = axis.copies(unit);
    if (k == 1 || noise_ == 0) return 1 / static_cast<double>(k);
    const auto normal = [&](std::int64_t copy) {
      return shares.normal(
          static_cast<std::uint64_t>(by_rows ? copy * l.columns.after + c : r * l.columns.after + copy));
    };
    double mean = 0;
    for (std::int64_t copy = axis.source(unit); copy < axis.after; copy += axis.before) mean += normal(copy);
    mean /= static_cast<double>(k);
    return (1 + noise_ * (normal(unit) - mean)) / static_cast<double>(k);
  }

  void fill_new_block(Stream& stream, const ParameterSpec& spec, std::int64_t first, TensorView out) const {
    const std::string_view path = spec.path;
    if (path.ends_with("norm.weight")) return kernels::fill(stream, out, 1);
    if (is_attention_slots(path)) {
      return kernels::fill_normal(stream, seed_, spec.path, first, attention_slots_deviation(grown_),
                                  GradMode::overwrite, out);
    }
    if (path.ends_with(".bias") || Transformer::ends_on_stream(path)) return kernels::fill(stream, out, 0);
    kernels::fill_normal(stream, seed_, spec.path, first, Transformer::kDeviation, GradMode::overwrite, out);
  }

  ModelConfig before_, grown_;
  std::uint64_t seed_;
  double noise_;
  std::vector<GrowthGroup> groups_;
  Axis stream_, neurons_, words_;
  Axis slots_, block_;  // of linformer
};

}  // namespace

std::unique_ptr<Growth> transformer_growth(const ModelConfig& before, const GrowthRequest& request) {
  return std::make_unique<TransformerGrowth>(before, request);
}

}  // namespace tforge
