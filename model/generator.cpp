#include "model/generator.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/errors.h"
#include "core/rng.h"

namespace tforge {

namespace {

void check(const SamplingOptions& options) {
  if (!(options.temperature >= 0)) throw ConfigError("temperature {}: want 0 or more", options.temperature);
  if (options.top_k < 0) throw ConfigError("top-k {}: want 0 (all) or more", options.top_k);
  if (!(options.top_p > 0 && options.top_p <= 1))
    throw ConfigError("top-p {}: want more than 0, at most 1", options.top_p);
}

std::vector<double> as_doubles(ConstTensorView logits) {
  std::vector<double> z(static_cast<std::size_t>(logits.elements()));
  with_compute_type("sample_token", logits.dtype, [&](auto zero) {
    const auto* p = logits.as<decltype(zero)>();
    for (std::size_t i = 0; i < z.size(); ++i) z[i] = static_cast<double>(p[i]);
  });
  return z;
}

}  // namespace

std::int32_t sample_token(ConstTensorView logits, const SamplingOptions& options, std::uint64_t position) {
  check(options);
  const std::vector<double> z = as_doubles(logits);
  if (options.temperature == 0) return static_cast<std::int32_t>(std::ranges::max_element(z) - z.begin());

  std::vector<std::size_t> order(z.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::stable_sort(order, [&](std::size_t a, std::size_t b) { return z[a] > z[b]; });
  if (options.top_k > 0) order.resize(std::min(order.size(), static_cast<std::size_t>(options.top_k)));
  std::vector<double> weight(order.size());
  for (std::size_t i = 0; i < order.size(); ++i) {
    weight[i] = std::exp((z[order[i]] - z[order[0]]) / options.temperature);
  }
  double total = std::accumulate(weight.begin(), weight.end(), 0.0);
  if (options.top_p < 1) {
    double held = 0;
    std::size_t kept = 0;
    while (kept < weight.size() && held < options.top_p * total) held += weight[kept++];
    weight.resize(kept);
    total = held;
  }
  double left = Rng(options.seed, "generate").uniform(position) * total;
  for (std::size_t i = 0; i + 1 < weight.size(); ++i) {
    left -= weight[i];
    if (left < 0) return static_cast<std::int32_t>(order[i]);
  }
  return static_cast<std::int32_t>(order[weight.size() - 1]);
}

std::vector<std::int32_t> generate(TokenFormer& model, Allocator& allocator, Stream& stream,
                                   std::span<const std::int32_t> prompt, const GenerateOptions& options,
                                   const std::function<void(std::int32_t)>& on_token) {
  check(options.sampling);
  const std::int64_t limit = model.config().max_seq;
  if (prompt.empty()) throw ConfigError("generation needs a prompt of at least one token");
  if (static_cast<std::int64_t>(prompt.size()) > limit) {
    throw ConfigError("the prompt has {} tokens, the model was trained on {}; shorten the prompt", prompt.size(),
                      limit);
  }
  Tape tape(allocator, stream, TapeMode::inference);
  KvCache cache = model.make_cache(1, limit);
  std::vector<std::int32_t> window(prompt.begin(), prompt.end()), added;
  std::size_t seen = 0;  // tokens of the window that the cache holds
  while (static_cast<std::int64_t>(added.size()) < options.tokens) {
    if (static_cast<std::int64_t>(window.size()) > limit) {
      if (options.past_end == PastEnd::stop) break;
      window.erase(window.begin(), window.end() - (limit + 1) / 2);
      cache.truncate(0);
      seen = 0;
    }
    if (options.cache == CacheUse::recomputed) {
      cache.truncate(0);
      seen = 0;
    }
    const std::span<const std::int32_t> fresh = std::span<const std::int32_t>(window).subspan(seen);
    const Tensor tokens =
        Tensor::of(allocator, Shape{static_cast<std::int64_t>(fresh.size())}, fresh, Purpose::activations);
    const Tensor logits = model.extend(tape, tokens, cache);
    seen = window.size();
    const std::int32_t next = sample_token(logits.view(), options.sampling, added.size());
    added.push_back(next);
    window.push_back(next);
    if (on_token) on_token(next);
  }
  return added;
}

}  // namespace tforge
