#include "model/tokenformer_growth.h"

#include "core/errors.h"
#include "kernels/elementwise.h"
#include "model/token_growth.h"
#include "model/tokenformer.h"

namespace tforge {

namespace {

class TokenFormerGrowth final : public Growth {
 public:
  TokenFormerGrowth(const ModelConfig& before, const GrowthRequest& request) : before_(before), grown_(before) {
    plan_.rule = request.rule.empty() ? GrowthRule::zero_key : growth_rule_from_name(request.rule);
    for (const TokenGroup group : kTokenGroups) {
      groups_.push_back({std::string(name_of(group)), "tokens a layer", before.num_tokens(group), 0,
                         std::string(name_of(plan_.rule)),
                         TokenFormer::layer_path(before.layers - 1, group) + ".keys"});
    }
    set_wanted(request, before.kind, groups_);
    for (std::size_t g = 0; g < groups_.size(); ++g) grown_.tokens[g] = groups_[g].after;
    plan_.seed = request.seed;
    plan_.noise = request.noise;
    plan_.norm = before.norm;
    plan_.key_deviation = TokenFormer::key_deviation();
    plan_.value_deviation = TokenFormer::value_deviation(before);
    check_growth(plan_);
  }

  const ModelConfig& grown() const override { return grown_; }
  const std::vector<GrowthGroup>& groups() const override { return groups_; }
  bool exact() const override { return plan_.rule == GrowthRule::zero_key && plan_.noise == 0; }

  void fill(Stream& stream, const ParameterSpec& spec, ConstTensorView old, std::int64_t first,
            TensorView out) const override {
    const std::string& path = spec.path;
    if (!spec.axis || old.rows() == spec.shape[0]) {
      return kernels::add_to(stream, old.row_range(first, out.rows()), GradMode::overwrite, out);
    }
    const bool is_keys = path.ends_with(".keys");
    const std::string layer = path.substr(0, path.rfind('.'));
    (is_keys ? grown_keys : grown_values)(stream, plan_, layer, old, first, out);
  }

  double state_number(const StateNumber& before) const override {
    for (std::int64_t layer = 0; layer < before_.layers; ++layer) {
      for (const TokenGroup group : kTokenGroups) {
        const GrowthGroup& g = groups_[static_cast<std::size_t>(group)];
        if (g.after == g.before || before.parameter != TokenFormer::layer_path(layer, group) + ".keys") continue;
        return grown_scale(plan_, before.value, g.before, g.after);
      }
    }
    return before.value;
  }

 private:
  ModelConfig before_, grown_;
  GrowthPlan plan_;
  std::vector<GrowthGroup> groups_;
};

}  // namespace

std::unique_ptr<Growth> tokenformer_growth(const ModelConfig& before, const GrowthRequest& request) {
  return std::make_unique<TokenFormerGrowth>(before, request);
}

}  // namespace tforge
