#include "model/token_growth.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "core/errors.h"
#include "core/rng.h"
#include "kernels/elementwise.h"
#include "kernels/random.h"

namespace tforge {

namespace {

constexpr std::array<GrowthRule, 4> kRules = {GrowthRule::zero_key, GrowthRule::public_code,
                                              GrowthRule::random_key_zero_value, GrowthRule::mirror};

std::string stream_name(std::string_view path, std::string_view role, std::string_view use) {
  return fmt::format("{}.{} {}", path, role, use);
}

/// out row = old row, plus noise relative to the row's root mean square.
template <class T>
void copy_old_row(const GrowthPlan& plan, const Rng& rng, ConstTensorView old, std::int64_t row, T* out) {
  const std::int64_t columns = old.columns();
  const T* from = old.as<T>() + row * old.row_stride;
  std::copy(from, from + columns, out);
  if (plan.noise == 0) return;
  double squares = 0;
  for (std::int64_t c = 0; c < columns; ++c) squares += static_cast<double>(from[c]) * static_cast<double>(from[c]);
  const double deviation = plan.noise * std::sqrt(squares / static_cast<double>(columns));
  for (std::int64_t c = 0; c < columns; ++c) {
    out[c] += static_cast<T>(deviation * rng.normal(static_cast<std::uint64_t>(row * columns + c)));
  }
}

/// out row = sum over old rows of N(0, 1 / n_old) times the row, in row order.
template <class T>
void mix_old_rows(const Rng& rng, ConstTensorView old, std::int64_t row, T* out) {
  const std::int64_t n = old.rows(), columns = old.columns();
  std::vector<double> sum(static_cast<std::size_t>(columns), 0.0);
  const double deviation = 1 / std::sqrt(static_cast<double>(n));
  for (std::int64_t j = 0; j < n; ++j) {
    const double weight = deviation * rng.normal(static_cast<std::uint64_t>(row * n + j));
    const T* from = old.as<T>() + j * old.row_stride;
    for (std::int64_t c = 0; c < columns; ++c) {
      sum[static_cast<std::size_t>(c)] += weight * static_cast<double>(from[c]);
    }
  }
  for (std::int64_t c = 0; c < columns; ++c) out[c] = static_cast<T>(sum[static_cast<std::size_t>(c)]);
}

enum class Birth { zero, random, mirrored };

void grow_rows(Stream& stream, const GrowthPlan& plan, std::string_view path, std::string_view role, Birth birth,
               double deviation, ConstTensorView old, std::int64_t first, TensorView out) {
  if (out.columns() != old.columns()) {
    throw ShapeError("{}.{}: grown rows of {} columns from {}", path, role, out.columns(), old.columns());
  }
  const Rng noise(plan.seed, stream_name(path, role, "noise")), mixture(plan.seed, stream_name(path, role, "mixture"));
  const std::string birth_name = stream_name(path, role, "growth");
  const std::int64_t n_old = old.rows();
  with_compute_type("growth", out.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (std::int64_t i = 0; i < out.rows(); ++i) {
      const std::int64_t row = first + i;
      T* to = out.as<T>() + i * out.row_stride;
      if (row < n_old) copy_old_row<T>(plan, noise, old, row, to);
      else if (birth == Birth::zero) std::fill(to, to + out.columns(), T{0});
      else if (birth == Birth::random) {
        kernels::fill_normal(stream, plan.seed, birth_name, row, deviation, GradMode::overwrite, out.row_range(i, 1));
      } else if (row < 2 * n_old) {
        const T* from = old.as<T>() + (row - n_old) * old.row_stride;
        std::transform(from, from + out.columns(), to, [](T x) { return -x; });
      } else {
        mix_old_rows<T>(mixture, old, row, to);
      }
    }
  });
}

}  // namespace

std::string_view name_of(GrowthRule rule) {
  switch (rule) {
    case GrowthRule::zero_key: return "zero-key";
    case GrowthRule::public_code: return "public";
    case GrowthRule::random_key_zero_value: return "random-key-zero-value";
    case GrowthRule::mirror: return "mirror";
  }
  return "?";
}

GrowthRule growth_rule_from_name(std::string_view name) {
  for (const GrowthRule rule : kRules) {
    if (name == name_of(rule)) return rule;
  }
  throw UsageError("'{}' is no growth rule; there are zero-key, public, random-key-zero-value and mirror", name);
}

void check_growth(const GrowthPlan& plan) {
  if (plan.rule == GrowthRule::zero_key && plan.norm == PattentionNorm::softmax) {
    throw UsageError(
        "softmax has no exact growth rule: a zero key takes exp(0) = 1 of every row's weight from the old tokens; name "
        "another rule, and its change will be measured and recorded");
  }
  if (plan.rule == GrowthRule::zero_key && !(plan.value_deviation > 0)) {
    throw UsageError("zero keys with zero values would never receive a gradient; use values of more than zero");
  }
  if (!(plan.noise >= 0)) throw UsageError("noise on old rows is {}, want 0 or more", plan.noise);
}

double grown_scale(const GrowthPlan& plan, double old_scale, std::int64_t n_old, std::int64_t n_new) {
  const double ratio = static_cast<double>(n_new) / static_cast<double>(n_old);
  switch (plan.rule) {
    case GrowthRule::zero_key: return old_scale;
    case GrowthRule::public_code: return initial_scale(plan.norm, n_new);
    case GrowthRule::random_key_zero_value:
    case GrowthRule::mirror: return old_scale * (plan.norm == PattentionNorm::softmax ? ratio : std::sqrt(ratio));
  }
  return old_scale;
}

void grown_keys(Stream& stream, const GrowthPlan& plan, std::string_view path, ConstTensorView old_keys,
                std::int64_t first, TensorView out) {
  const Birth birth = plan.rule == GrowthRule::zero_key ? Birth::zero
                      : plan.rule == GrowthRule::mirror ? Birth::mirrored
                                                        : Birth::random;
  grow_rows(stream, plan, path, "keys", birth, plan.key_deviation, old_keys, first, out);
}

void grown_values(Stream& stream, const GrowthPlan& plan, std::string_view path, ConstTensorView old_values,
                  std::int64_t first, TensorView out) {
  const bool random = plan.rule == GrowthRule::zero_key || plan.rule == GrowthRule::public_code;
  grow_rows(stream, plan, path, "values", random ? Birth::random : Birth::zero, plan.value_deviation, old_values, first,
            out);
}

}  // namespace tforge
