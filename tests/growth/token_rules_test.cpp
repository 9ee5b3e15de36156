// The growth rules as functions of (old tokens, rule, seed, layer path, row).
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "core/rng.h"
#include "model/token_growth.h"
#include "support/corpus.h"

namespace tforge::test {
namespace {

constexpr std::int64_t kOld = 37, kNew = 95, kColumns = 12;

class GrowthRules : public ::testing::Test {
 protected:
  GrowthRules() : old_(Tensor::empty(allocator_, Shape{kOld, kColumns}, DType::f64, Purpose::weights)) {
    const Rng rng(5, "old");
    std::uint64_t i = 0;
    for (double& x : old_.span<double>()) x = rng.normal(i++);
  }

  enum class Role : std::uint8_t { keys, values };
  std::vector<double> grown(const GrowthPlan& plan, Role role, std::int64_t first = 0, std::int64_t rows = kNew,
                            const std::string& path = "layers.0.ffn") {
    Tensor out = Tensor::zeros(allocator_, Shape{rows, kColumns}, DType::f64, Purpose::weights);
    const Tensor& old = old_;
    (role == Role::keys ? grown_keys : grown_values)(stream_, plan, path, old.view(), first, out.view());
    return {out.span<double>().begin(), out.span<double>().end()};
  }
  std::vector<double> old_rows() { return {old_.span<double>().begin(), old_.span<double>().end()}; }
  static std::vector<double> old_part(const std::vector<double>& all) {
    return {all.begin(), all.begin() + kOld * kColumns};
  }
  static std::vector<double> new_part(const std::vector<double>& all) {
    return {all.begin() + kOld * kColumns, all.end()};
  }
  static double deviation(const std::vector<double>& x) {
    double squares = 0;
    for (const double v : x) squares += v * v;
    return std::sqrt(squares / static_cast<double>(x.size()));
  }
  static GrowthPlan plan(GrowthRule rule) {
    GrowthPlan p;
    p.rule = rule;
    p.seed = 7;
    return p;
  }

  Allocator allocator_;
  Stream stream_;
  Tensor old_;
};

TEST_F(GrowthRules, OldRowsAreKeptByEveryRule) {
  for (const GrowthRule rule :
       {GrowthRule::zero_key, GrowthRule::public_code, GrowthRule::random_key_zero_value, GrowthRule::mirror}) {
    EXPECT_EQ(old_part(grown(plan(rule), Role::keys)), old_rows()) << name_of(rule);
    EXPECT_EQ(old_part(grown(plan(rule), Role::values)), old_rows()) << name_of(rule);
  }
}

TEST_F(GrowthRules, NewRows) {
  const std::vector<double> zeros(static_cast<std::size_t>((kNew - kOld) * kColumns), 0.0);
  const auto keys = [&](GrowthRule rule) { return new_part(grown(plan(rule), Role::keys)); };
  const auto values = [&](GrowthRule rule) { return new_part(grown(plan(rule), Role::values)); };
  EXPECT_EQ(keys(GrowthRule::zero_key), zeros);
  EXPECT_NEAR(deviation(values(GrowthRule::zero_key)), 0.01, 0.001);
  EXPECT_NEAR(deviation(keys(GrowthRule::public_code)), 0.02, 0.002);
  EXPECT_NEAR(deviation(values(GrowthRule::public_code)), 0.01, 0.001);
  EXPECT_NEAR(deviation(keys(GrowthRule::random_key_zero_value)), 0.02, 0.002);
  EXPECT_EQ(values(GrowthRule::random_key_zero_value), zeros);
  EXPECT_EQ(values(GrowthRule::mirror), zeros);
}

TEST_F(GrowthRules, MirrorNegatesThenMixes) {
  const std::vector<double> old = old_rows(), all = grown(plan(GrowthRule::mirror), Role::keys);
  for (std::size_t i = 0; i < old.size(); ++i) EXPECT_EQ(all[old.size() + i], -old[i]);
  // Further rows: N(0, 1 / n_old) mixtures have about the deviation of the old rows, and are none of them.
  const std::vector<double> mixed(all.begin() + 2 * kOld * kColumns, all.end());
  EXPECT_NEAR(deviation(mixed) / deviation(old), 1.0, 0.25);
  // Each is a combination of old rows, so a direction that no old row has stays empty.
  for (std::int64_t r = 0; r < kOld; ++r) old_.span<double>()[static_cast<std::size_t>(r * kColumns + 3)] = 0;
  const std::vector<double> again = grown(plan(GrowthRule::mirror), Role::keys);
  for (std::int64_t r = 2 * kOld; r < kNew; ++r) EXPECT_EQ(again[static_cast<std::size_t>(r * kColumns + 3)], 0.0);
}

TEST_F(GrowthRules, RowsDependOnSeedAndPathAndNotOnTheCut) {
  for (const GrowthRule rule : {GrowthRule::public_code, GrowthRule::mirror}) {
    GrowthPlan p = plan(rule);
    p.noise = 0.1;
    const std::vector<double> whole = grown(p, Role::keys);
    std::vector<double> pieces;
    for (const auto& [first, rows] : {std::pair<std::int64_t, std::int64_t>{0, 30}, {30, 20}, {50, 45}}) {
      const std::vector<double> piece = grown(p, Role::keys, first, rows);
      pieces.insert(pieces.end(), piece.begin(), piece.end());
    }
    EXPECT_EQ(whole, pieces) << name_of(rule);
    EXPECT_EQ(whole, grown(p, Role::keys));
    EXPECT_NE(whole, grown(p, Role::keys, 0, kNew, "layers.1.ffn"));
    p.seed = 8;
    EXPECT_NE(whole, grown(p, Role::keys));
  }
  EXPECT_NE(new_part(grown(plan(GrowthRule::public_code), Role::keys)),
            new_part(grown(plan(GrowthRule::public_code), Role::values)));
}

TEST_F(GrowthRules, NoiseOnOldRowsIsRelativeToEachRow) {
  for (std::int64_t c = 0; c < kColumns; ++c) old_.span<double>()[static_cast<std::size_t>(c)] *= 1000;
  GrowthPlan p = plan(GrowthRule::zero_key);
  p.noise = 0.05;
  const std::vector<double> old = old_rows(), noisy = grown(p, Role::keys);
  double total = 0;
  for (std::int64_t r = 0; r < kOld; ++r) {
    std::vector<double> row, difference;
    for (auto i = static_cast<std::size_t>(r * kColumns); i < static_cast<std::size_t>((r + 1) * kColumns); ++i) {
      row.push_back(old[i]);
      difference.push_back(noisy[i] - old[i]);
    }
    const double share = deviation(difference) / deviation(row);
    EXPECT_GT(share, 0.01) << r;
    EXPECT_LT(share, 0.12) << r;
    total += share;
  }
  EXPECT_NEAR(total / kOld, 0.05, 0.01);
  for (const double x : new_part(noisy)) EXPECT_EQ(x, 0.0);
}

TEST_F(GrowthRules, Scales) {
  GrowthPlan p = plan(GrowthRule::zero_key);
  EXPECT_EQ(grown_scale(p, 5.5, 30, 60), 5.5);
  p.rule = GrowthRule::public_code;
  EXPECT_EQ(grown_scale(p, 5.5, 30, 60), initial_scale(p.norm, 60));
  for (const GrowthRule rule : {GrowthRule::random_key_zero_value, GrowthRule::mirror}) {
    p.rule = rule;
    p.norm = PattentionNorm::gelu_l2_norm;
    EXPECT_DOUBLE_EQ(grown_scale(p, 5.5, 30, 60), 5.5 * std::sqrt(2.0));
    p.norm = PattentionNorm::softmax;
    EXPECT_DOUBLE_EQ(grown_scale(p, 5.5, 30, 60), 11.0);
  }
}

TEST_F(GrowthRules, Refusals) {
  GrowthPlan p = plan(GrowthRule::zero_key);
  check_growth(p);
  p.norm = PattentionNorm::softmax;
  expect_error<UsageError>([&] { check_growth(p); }, "softmax has no exact growth rule");
  p.rule = GrowthRule::public_code;
  check_growth(p);
  p = plan(GrowthRule::zero_key);
  p.value_deviation = 0;
  expect_error<UsageError>([&] { check_growth(p); }, "would never receive a gradient");
  p = plan(GrowthRule::mirror);
  p.noise = -1;
  expect_error<UsageError>([&] { check_growth(p); }, "noise on old rows is -1");
  expect_error<UsageError>([] { growth_rule_from_name("zero_key"); }, "'zero_key' is no growth rule");
  EXPECT_EQ(growth_rule_from_name("random-key-zero-value"), GrowthRule::random_key_zero_value);
}

}  // namespace
}  // namespace tforge::test
