#include "train/device_profile.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "train/toml_table.h"

namespace tforge {

namespace {

using Three = std::array<double, 3>;

/// Seconds that a call can cost by itself. Samples of much the same size would have all of their work in it.
constexpr double kMostCall = 50e-6;

/// The least squares of rows . x = 1 * targets over the features of `chosen`, the others 0; nothing when they do not
/// determine it.
std::optional<Three> least_squares(std::span<const Three> rows, std::span<const double> targets, unsigned chosen) {
  std::array<std::array<double, 4>, 3> m{};  // normal equations; a feature that is not chosen has x = 0
  for (std::size_t i = 0; i < 3; ++i) {
    if ((chosen >> i & 1U) == 0) {
      m[i][i] = 1;
      continue;
    }
    for (std::size_t r = 0; r < rows.size(); ++r) {
      for (std::size_t j = 0; j < 3; ++j) {
        if ((chosen >> j & 1U) != 0) m[i][j] += rows[r][i] * rows[r][j];
      }
      m[i][3] += rows[r][i] * targets[r];
    }
  }
  for (std::size_t i = 0; i < 3; ++i) {
    if (!(m[i][i] > 1e-12)) return {};
    for (std::size_t k = 0; k < 3; ++k) {
      if (k == i) continue;
      const double f = m[k][i] / m[i][i];
      for (std::size_t j = 0; j < 4; ++j) m[k][j] -= f * m[i][j];
    }
  }
  return Three{m[0][3] / m[0][0], m[1][3] / m[1][1], m[2][3] / m[2][2]};
}

}  // namespace

double DeviceProfile::seconds(const Profile::Entry& kernel) const {
  const auto known = kernels.find(std::string(kernel.name));
  if (known != kernels.end()) return known->second.seconds(kernel.calls, kernel.work);
  return std::max(kernel.work.flops / flops_per_second, kernel.work.bytes / bytes_per_second);
}

KernelCost fit(std::span<const KernelSample> samples) {
  if (samples.empty()) throw InternalError("a fit to no samples");
  // Features of about one size, so that the equations are well scaled.
  Three scale{};
  std::vector<Three> rows;
  std::vector<double> targets;
  for (const KernelSample& s : samples) {
    rows.push_back(
        {static_cast<double>(s.calls) / s.step_seconds, s.work.flops / s.step_seconds, s.work.bytes / s.step_seconds});
    targets.push_back(s.seconds / s.step_seconds);
    for (std::size_t i = 0; i < 3; ++i) scale[i] = std::max(scale[i], rows.back()[i]);
  }
  for (Three& row : rows) {
    for (std::size_t i = 0; i < 3; ++i) row[i] = scale[i] > 0 ? row[i] / scale[i] : 0;
  }
  Three best{};
  double least = INFINITY;
  for (unsigned chosen = 1; chosen < 8; ++chosen) {
    const std::optional<Three> x = least_squares(rows, targets, chosen);
    if (!x || std::ranges::min(*x) < 0) continue;
    if (scale[0] > 0 && (*x)[0] / scale[0] > kMostCall) continue;
    double squares = 0;
    for (std::size_t r = 0; r < rows.size(); ++r) {
      const double off = rows[r][0] * (*x)[0] + rows[r][1] * (*x)[1] + rows[r][2] * (*x)[2] - targets[r];
      squares += off * off;
    }
    if (squares >= least) continue;
    least = squares;
    best = *x;
  }
  const auto cost = [&](std::size_t i) { return scale[i] > 0 ? best[i] / scale[i] : 0; };
  return {cost(0), cost(1), cost(2)};
}

DeviceProfile parse_device_profile(std::string_view text, const std::string& source) {
  const toml::table document = parse_toml(text, source);
  const TomlTable file(document, source, {"device", "link", "kernels"});
  const toml::table* section = file.table("device");
  if (section == nullptr) throw ConfigError("{}: there is no [device]", source);
  const TomlTable device(*section, source + ": [device]",
                         {"name", "date", "device", "threads", "dtype", "gflops", "gbytes"});
  DeviceProfile profile;
  profile.name = device.need(device.text("name"), "name");
  profile.date = device.need(device.text("date"), "date");
  profile.threads = device.integer("threads").value_or(1);
  if (profile.threads < 1) throw ConfigError("{}: [device]: threads = {}: want 1 or more", source, profile.threads);
  const std::string kind = device.text("device").value_or("cpu");
  if (kind != name_of(Device::cpu) && kind != name_of(Device::cuda)) {
    throw ConfigError("{}: [device]: device = \"{}\": there are cpu and cuda", source, kind);
  }
  profile.device = kind == name_of(Device::cpu) ? Device::cpu : Device::cuda;
  std::string dtype = device.text("dtype").value_or("f32");
  if (dtype == "tf32") {
    profile.f32_products = F32Products::tf32;
    dtype = "f32";
  }
  try {
    profile.dtype = dtype_from_name(dtype);
  } catch (const Error& error) {
    throw ConfigError("{}: [device]: dtype: {}", source, error.what());
  }
  profile.flops_per_second = device.need(device.positive("gflops"), "gflops") * 1e9;
  profile.bytes_per_second = device.need(device.positive("gbytes"), "gbytes") * 1e9;
  if (const toml::table* part = file.table("link")) {
    const TomlTable link(*part, source + ": [link]", {"gbytes", "latency_us"});
    profile.link = {link.need(link.positive("gbytes"), "gbytes") * 1e9,
                    link.need(link.positive("latency_us"), "latency_us") / 1e6};
  }
  const toml::table* kernels = file.table("kernels");
  if (kernels == nullptr) return profile;
  for (auto&& [key, node] : *kernels) {
    const std::string name(key.str()), where = fmt::format("{}: kernels.{}", source, name);
    if (!node.is_table()) throw ConfigError("{}: want a table like {{ gflops = 100, gbytes = 20 }}", where);
    const TomlTable kernel(*node.as_table(), where, {"gflops", "gbytes", "call_us"});
    KernelCost& cost = profile.kernels[name];
    if (const auto rate = kernel.positive("gflops")) cost.flop = 1e-9 / *rate;
    if (const auto rate = kernel.positive("gbytes")) cost.byte = 1e-9 / *rate;
    if (const auto call = kernel.positive("call_us")) cost.call = *call / 1e6;
    if (node.as_table()->empty()) throw ConfigError("{}: want at least one of gflops, gbytes, call_us", where);
  }
  return profile;
}

DeviceProfile load_device_profile(const std::string& path) { return parse_device_profile(small_file(path), path); }

std::string to_toml(const DeviceProfile& profile) {
  std::string text = "# What tf_plan --device predicts with; docs/planning.md.\n[device]\n";
  text += fmt::format("name = {}\ndate = {}\ndevice = {}\nthreads = {}\ndtype = {}\n", quoted(profile.name),
                      quoted(profile.date), quoted(std::string(name_of(profile.device))), profile.threads,
                      quoted(profile.precision()));
  text += fmt::format("gflops = {:.1f}  # of a large product\ngbytes = {:.2f}  # of a sum of large vectors\n",
                      profile.flops_per_second / 1e9, profile.bytes_per_second / 1e9);
  if (profile.link) {
    text += fmt::format("\n[link]\ngbytes = {:.3f}\nlatency_us = {:.3f}\n", profile.link->bytes_per_second / 1e9,
                        profile.link->latency * 1e6);
  }
  if (!profile.kernels.empty()) text += "\n[kernels]\n";
  for (const auto& [name, cost] : profile.kernels) {
    std::string parts;
    const auto add = [&](const char* key, double value) {
      if (std::isfinite(value) && value > 0)
        parts += fmt::format("{}{} = {:.5g}", parts.empty() ? "" : ", ", key, value);
    };
    if (cost.flop > 0) add("gflops", 1e-9 / cost.flop);
    if (cost.byte > 0) add("gbytes", 1e-9 / cost.byte);
    if (cost.call > 0) add("call_us", cost.call * 1e6);
    if (!parts.empty()) text += fmt::format("{} = {{ {} }}\n", name, parts);
  }
  return text;
}

}  // namespace tforge
