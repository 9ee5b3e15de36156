#include "train/evaluate.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <span>
#include <utility>
#include <vector>

#include "core/copy.h"
#include "core/errors.h"
#include "kernels/elementwise.h"

namespace tforge {

namespace {

struct Window {
  std::uint64_t first;  // input
  std::int64_t inputs;
  std::int64_t skipped;  // leading targets that an earlier window has scored
};

struct Plan {
  std::vector<Window> windows;
  EvalResult totals;
};

Plan plan_windows(const TokenSplit& split, std::int64_t context, std::int64_t stride, std::int64_t max_tokens) {
  Plan plan;
  for (std::uint64_t d = 0; d < split.documents(); ++d) {
    if (max_tokens > 0 && plan.totals.tokens >= max_tokens) break;
    const DocumentInfo document = split.document(d);
    ++plan.totals.documents;
    plan.totals.bytes += static_cast<std::int64_t>(document.bytes);
    plan.totals.words += static_cast<std::int64_t>(document.words);
    const std::int64_t last = static_cast<std::int64_t>(document.tokens) - 1;  // target of the last window
    for (std::int64_t scored = 0; scored < last;) {
      const std::int64_t end = std::min(last, scored == 0 ? context : scored + stride);
      const std::int64_t begin = std::max<std::int64_t>(0, end - context);
      plan.windows.push_back({document.first_token + static_cast<std::uint64_t>(begin), end - begin, scored - begin});
      plan.totals.tokens += end - scored;
      scored = end;
    }
  }
  return plan;
}

}  // namespace

double EvalResult::token_perplexity() const { return std::exp(nll()); }
double EvalResult::word_perplexity() const { return std::exp(nll_sum / static_cast<double>(words)); }
double EvalResult::bits_per_byte() const { return nll_sum / std::numbers::ln2 / static_cast<double>(bytes); }

EvalResult evaluate(LanguageModel& model, const TokenSplit& split, const EvalOptions& options, Mesh& mesh,
                    Allocator& allocator, Stream& stream) {
  const std::int64_t context = options.context > 0 ? options.context : model.config().max_seq;
  const std::int64_t stride = options.stride > 0 ? options.stride : std::max<std::int64_t>(context / 2, 1);
  if (context > model.config().max_seq) {
    throw ConfigError("a context of {} tokens for a model trained on {}; choose at most {}", context,
                      model.config().max_seq, model.config().max_seq);
  }
  if (stride > context) throw ConfigError("a stride of {} tokens skips some in a context of {}", stride, context);
  if (options.batch < 1) throw ConfigError("a batch of {} windows: at least 1 is needed", options.batch);
  Plan plan = plan_windows(split, context, stride, options.max_tokens);
  if (plan.totals.tokens == 0)
    throw DataError("{}: no document has two tokens, so nothing can be scored", split.name());

  // Windows of like length go together, so that little is computed for padding.
  std::ranges::stable_sort(plan.windows, std::greater<>(), &Window::inputs);
  const bool by_batch = model.plan().shards.has_value();
  const auto batch = static_cast<std::size_t>(options.batch), ranks = static_cast<std::size_t>(mesh.dp);
  const std::size_t dealt_at_once = by_batch ? batch : 1;
  std::vector<Window> mine;
  for (std::size_t i = 0; i < plan.windows.size(); ++i) {
    if (i / dealt_at_once % ranks == static_cast<std::size_t>(mesh.dp_index)) mine.push_back(plan.windows[i]);
  }
  // One sum a batch where whole batches are dealt, 0 for those of other ranks; otherwise one in all.
  std::vector<double> sums(by_batch ? (plan.windows.size() + batch - 1) / batch : 1);
  // Between the batches that every rank has.
  const std::size_t fewest = by_batch ? sums.size() / ranks : (plan.windows.size() / ranks + batch - 1) / batch;
  const std::size_t polls = std::max<std::size_t>(fewest, 1) - 1;
  Tape tape(allocator, stream, TapeMode::inference);
  Tensor batch_sums = Tensor::zeros(allocator, Shape{std::ssize(sums)}, DType::f64, Purpose::workspace);
  std::vector<std::int32_t> buffer(static_cast<std::size_t>(context) + 1), tokens, targets;
  for (std::size_t first = 0; first < mine.size(); first += batch) {
    const std::size_t number = first / batch;
    if (options.poll && number >= 1 && number <= polls) options.poll();
    const std::size_t count = std::min(mine.size() - first, batch);
    const std::int64_t seq = mine[first].inputs;  // the longest
    const Shape shape{static_cast<std::int64_t>(count) * seq};
    tokens.assign(count * static_cast<std::size_t>(seq), 0);
    targets.assign(tokens.size(), -1);
    for (std::size_t w = 0; w < count; ++w) {
      const Window& window = mine[first + w];
      split.copy(window.first, static_cast<std::uint64_t>(window.inputs) + 1, buffer.data());
      const std::int64_t at = static_cast<std::int64_t>(w) * seq;
      std::copy_n(buffer.begin(), window.inputs, tokens.begin() + at);
      std::copy(buffer.begin() + window.skipped + 1, buffer.begin() + window.inputs + 1,
                targets.begin() + at + window.skipped);
    }
    const auto there = [&](std::span<const std::int32_t> values) {
      return Tensor::of<std::int32_t>(allocator, shape, values, Purpose::activations);
    };
    const Tensor nll = model.nll(tape, there(tokens), there(targets), static_cast<std::int64_t>(count));
    const std::size_t at = by_batch ? number * ranks + static_cast<std::size_t>(mesh.dp_index) : 0;
    kernels::sum_to(stream, nll.view(), GradMode::accumulate, batch_sums.rows(static_cast<std::int64_t>(at), 1).view());
  }
  copy(stream, std::as_const(batch_sums).view(),
       {sums.data(), DType::f64, Device::cpu, batch_sums.shape(), batch_sums.shape()[0]});
  const Shape all{static_cast<std::int64_t>(sums.size())};
  mesh.dp_comm->all_reduce(stream, TensorView{sums.data(), DType::f64, Device::cpu, all, all[0]}, ReduceOp::sum);
  for (const double sum : sums) plan.totals.nll_sum += sum;
  return plan.totals;
}

EvalResult evaluate_unigram(const TokenSplit& train, const TokenSplit& split, std::int32_t vocab) {
  std::vector<double> counts(static_cast<std::size_t>(vocab), 1.0);
  std::vector<std::int32_t> buffer;
  const auto for_tokens = [&](const TokenSplit& source, std::uint64_t first, std::uint64_t end, auto&& f) {
    constexpr std::uint64_t kBlock = 1 << 16;
    for (; first < end; first += kBlock) {
      buffer.resize(std::min(kBlock, end - first));
      source.copy(first, buffer.size(), buffer.data());
      for (const std::int32_t token : buffer) f(static_cast<std::size_t>(token));
    }
  };
  for_tokens(train, 0, train.tokens(), [&](std::size_t token) { counts[token] += 1; });
  double total = 0;
  for (const double count : counts) total += count;
  EvalResult result;
  for (std::uint64_t d = 0; d < split.documents(); ++d) {
    const DocumentInfo document = split.document(d);
    ++result.documents;
    result.bytes += static_cast<std::int64_t>(document.bytes);
    result.words += static_cast<std::int64_t>(document.words);
    if (document.tokens < 2) continue;
    for_tokens(split, document.first_token + 1, document.first_token + document.tokens, [&](std::size_t token) {
      result.nll_sum -= std::log(counts[token] / total);
      ++result.tokens;
    });
  }
  return result;
}

}  // namespace tforge
