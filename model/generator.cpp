#include "model/generator.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "core/copy.h"
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

/// The indices of `z` by falling value (of equals the lowest first), sorted only as far as they are asked for.
class Falling {
 public:
  explicit Falling(const std::vector<double>& z) : z_(z), order_(z.size()) {
    std::iota(order_.begin(), order_.end(), std::size_t{0});
  }
  std::size_t operator[](std::size_t i) {
    while (i >= sorted_) sort_more();
    return order_[i];
  }

 private:
  void sort_more() {
    const auto at = [&](std::size_t i) { return order_.begin() + static_cast<std::ptrdiff_t>(i); };
    const auto before = [&](std::size_t a, std::size_t b) { return z_[a] != z_[b] ? z_[a] > z_[b] : a < b; };
    const std::size_t last = std::min(order_.size(), std::max<std::size_t>(64, 8 * sorted_));
    if (last < order_.size()) std::nth_element(at(sorted_), at(last), order_.end(), before);
    std::sort(at(sorted_), at(last), before);
    sorted_ = last;
  }

  const std::vector<double>& z_;
  std::vector<std::size_t> order_;
  std::size_t sorted_ = 0;
};

template <class T>
std::int32_t sample(std::span<const T> logits, const SamplingOptions& options, std::uint64_t draw) {
  const auto most_likely = std::ranges::max_element(logits);
  if (options.temperature == 0) return static_cast<std::int32_t>(most_likely - logits.begin());

  std::vector<double> weight(logits.size());
  for (std::size_t i = 0; i < weight.size(); ++i) {
    weight[i] = std::exp((static_cast<double>(logits[i]) - static_cast<double>(*most_likely)) / options.temperature);
  }
  Falling order(weight);
  std::size_t kept = weight.size();
  double total = 0;
  if (options.top_k > 0 && static_cast<std::size_t>(options.top_k) < kept) {
    kept = static_cast<std::size_t>(options.top_k);
    for (std::size_t i = 0; i < kept; ++i) total += weight[order[i]];
  } else {
    total = std::accumulate(weight.begin(), weight.end(), 0.0);
  }
  if (options.top_p < 1) {
    double held = 0;
    std::size_t i = 0;
    while (i < kept && held < options.top_p * total) held += weight[order[i++]];
    kept = i;
    total = held;
  }
  double left = Rng(options.seed, "generate").uniform(draw) * total;
  for (std::size_t i = 0; i + 1 < kept; ++i) {
    left -= weight[order[i]];
    if (left < 0) return static_cast<std::int32_t>(order[i]);
  }
  return static_cast<std::int32_t>(order[kept - 1]);
}

/// `x`, or a copy of it where the processor reads it.
Tensor in_host_memory(Allocator& host, const Stream& stream, Tensor x) {
  if (x.device() == Device::cpu) return x;
  Tensor here = Tensor::empty(host, x.shape(), x.dtype(), Purpose::staging);
  copy(stream, std::as_const(x).view(), here.view());
  return here;
}

}  // namespace

std::int32_t sample_token(ConstTensorView logits, const SamplingOptions& options, std::uint64_t draw) {
  check(options);
  std::int32_t token = 0;
  with_compute_type("sample_token", logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    token = sample(std::span<const T>(logits.as<T>(), static_cast<std::size_t>(logits.elements())), options, draw);
  });
  return token;
}

std::vector<std::vector<std::int32_t>> generate(LanguageModel& model, Allocator& allocator, Stream& stream,
                                                std::span<const std::int32_t> prompt, const GenerateOptions& options,
                                                const std::function<void(std::int64_t, std::int32_t)>& on_token) {
  check(options.sampling);
  if (options.samples < 1) throw ConfigError("samples {}: want 1 or more", options.samples);
  const std::int64_t limit = model.config().max_seq;
  if (prompt.empty()) throw ConfigError("generation needs a prompt of at least one token");
  if (static_cast<std::int64_t>(prompt.size()) > limit) {
    throw ConfigError("the prompt has {} tokens, the model was trained on {}; shorten the prompt", prompt.size(),
                      limit);
  }
  Tape tape(allocator, stream, TapeMode::inference);
  Allocator host;
  std::vector<std::int32_t> unseen;
  const auto samples = static_cast<std::size_t>(options.samples);
  KvCache cache = model.make_cache(options.samples, limit);
  std::vector<std::vector<std::int32_t>> windows(samples, {prompt.begin(), prompt.end()}), added(samples);
  std::int64_t length = static_cast<std::int64_t>(prompt.size());  // of each window
  for (std::int64_t position = 0; position < options.tokens; ++position) {
    if (length > limit) {
      if (options.past_end == PastEnd::stop) break;
      length = (limit + 1) / 2;
      for (auto& window : windows) window.erase(window.begin(), window.end() - length);
      cache.clear();
    }
    if (options.cache == CacheUse::recomputed) cache.clear();
    const std::int64_t fresh = length - cache.length();  // tokens of a window that the cache does not hold
    unseen.clear();
    for (const auto& window : windows) unseen.insert(unseen.end(), window.end() - fresh, window.end());
    const Tensor tokens = Tensor::of<std::int32_t>(allocator, Shape{std::ssize(unseen)}, unseen, Purpose::activations);
    const Tensor logits = in_host_memory(host, stream, model.extend(tape, tokens, cache));
    for (std::size_t s = 0; s < samples; ++s) {
      const std::int32_t next = sample_token(logits.view().row_range(static_cast<std::int64_t>(s), 1), options.sampling,
                                             draw_of(s, static_cast<std::uint64_t>(position)));
      added[s].push_back(next);
      windows[s].push_back(next);
      if (on_token) on_token(static_cast<std::int64_t>(s), next);
    }
    ++length;
  }
  return added;
}

}  // namespace tforge
