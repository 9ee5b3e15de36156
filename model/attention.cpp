#include "model/attention.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "autograd/ops/attention.h"
#include "autograd/ops/block_attention.h"
#include "autograd/ops/linear_attention.h"
#include "core/copy.h"
#include "core/errors.h"
#include "kernels/attention.h"
#include "kernels/elementwise.h"
#include "kernels/linear_attention.h"
#include "model/models.h"

namespace tforge {

namespace {

using kernels::Features;
using kernels::kLinearChunk;

/// What all of them know.
struct Place {
  std::int64_t heads, head_dim;  // here
  DType dtype;
  std::int64_t columns() const { return heads * head_dim; }
};

/// Columns of q, k or v of [q | k | v].
ConstTensorView part(const Tensor& qkv, std::int64_t i) {
  const std::int64_t c = qkv.shape().columns() / 3;
  return qkv.view().column_range(i * c, c);
}

constexpr const char* kKeySlots = "key_slots";
constexpr const char* kValueSlots = "value_slots";
std::string slots_path(std::int64_t layer, const char* name) {
  return fmt::format("layers.{}.attention.{}", layer, name);
}

class SoftmaxAttention final : public Attention {
 public:
  explicit SoftmaxAttention(const Place& place) : place_(place) {}

  Var forward(Tape& tape, const Var& qkv, std::int64_t batch, std::int64_t) const override {
    return causal_attention(tape, qkv, batch, place_.heads);
  }

  AttentionMemory make_memory(Allocator& allocator, std::int64_t batch, std::int64_t capacity) const override {
    const auto zeros = [&] {
      return Tensor::zeros(allocator, Shape{batch * capacity, place_.columns()}, place_.dtype, Purpose::activations);
    };
    return {.keys = zeros(), .values = zeros(), .sums = {}};
  }

  Tensor extend(Tape& tape, const Tensor& qkv, std::int64_t batch, std::int64_t, std::int64_t first,
                std::int64_t capacity, AttentionMemory& memory) const override {
    Stream& stream = tape.stream();
    const std::int64_t n = qkv.shape().rows() / batch;
    for (std::int64_t b = 0; b < batch; ++b) {
      const std::int64_t at = b * capacity + first;
      kernels::add_to(stream, part(qkv, 1).row_range(b * n, n), GradMode::overwrite,
                      memory.keys.view().row_range(at, n));
      kernels::add_to(stream, part(qkv, 2).row_range(b * n, n), GradMode::overwrite,
                      memory.values.view().row_range(at, n));
    }
    const kernels::AttentionShape shape{batch, place_.heads, n, first + n, capacity};
    Tensor workspace = tape.empty(Shape{kernels::attention_workspace(shape, place_.head_dim, stream.device())},
                                  compute_dtype(place_.dtype), Purpose::workspace);
    Tensor out = tape.empty(Shape{batch * n, place_.columns()}, place_.dtype);
    kernels::causal_attention_forward(stream, shape, part(qkv, 0), std::as_const(memory.keys).view(),
                                      std::as_const(memory.values).view(), out.view(), {}, workspace.view());
    return out;
  }

 private:
  Place place_;
};

/// linformer's causal substitute (autograd/ops/block_attention.h)
class BlockAttention final : public Attention {
 public:
  BlockAttention(const ModelConfig& config, const Place& place, ParameterSet& parameters) : place_(place) {
    for (std::int64_t layer = 0; layer < config.layers; ++layer) {
      const auto at = [&](const char* name) { return parameters.find(slots_path(layer, name)).var; };
      layers_.push_back({at(kKeySlots), at(kValueSlots)});
    }
  }

  Var forward(Tape& tape, const Var& qkv, std::int64_t batch, std::int64_t layer) const override {
    return block_attention(tape, qkv, batch, place_.heads, of(layer));
  }

  AttentionMemory make_memory(Allocator& allocator, std::int64_t batch, std::int64_t capacity) const override {
    const std::int64_t rows = block_attention_rows(capacity, of(0).block(), of(0).slots(place_.heads));
    const auto zeros = [&] {
      return Tensor::zeros(allocator, Shape{batch * rows, place_.columns()}, place_.dtype, Purpose::activations);
    };
    return {.keys = zeros(), .values = zeros(), .sums = {}};
  }

  Tensor extend(Tape& tape, const Tensor& qkv, std::int64_t batch, std::int64_t layer, std::int64_t first, std::int64_t,
                AttentionMemory& memory) const override {
    return block_attention_extend(tape, qkv.view(), batch, place_.heads, of(layer), first, memory.keys, memory.values,
                                  {});
  }

 private:
  const BlockSlots& of(std::int64_t layer) const { return layers_[static_cast<std::size_t>(layer)]; }

  Place place_;
  std::vector<BlockSlots> layers_;
};

/// A table of numbers that a model is born with, computed on the host by make(stream, view).
template <class Make>
Tensor host_made(Allocator& allocator, Stream& stream, const Shape& shape, DType dtype, const Make& make) {
  Tensor table = Tensor::empty(allocator, shape, dtype, Purpose::weights);
  if (stream.device() == Device::cpu) {
    make(stream, table.view());
  } else if (!stream.rehearses()) {
    Allocator host;
    Stream cpu;
    Tensor made = Tensor::empty(host, shape, dtype, Purpose::weights);
    make(cpu, made.view());
    copy(stream, std::as_const(made).view(), table.view());
  }
  return table;
}

/// performer, cosformer
class LinearAttention final : public Attention {
 public:
  LinearAttention(Allocator& allocator, Stream& stream, const ModelConfig& config, const Place& place) : place_(place) {
    const std::int64_t m = attention_features(config);
    if (config.attention.kind == AttentionKind::cosformer) {
      const Tensor table = host_made(allocator, stream, Shape{config.max_seq, 2}, compute_dtype(place.dtype),
                                     [](Stream& cpu, TensorView view) { kernels::cosine_features(cpu, view); });
      layers_.assign(static_cast<std::size_t>(config.layers), {Features::relu_cosine, m, table});
      return;
    }
    const Shape shape{place.head_dim, kernels::feature_columns(m)};
    for (std::int64_t layer = 0; layer < config.layers; ++layer) {
      Tensor table = host_made(allocator, stream, shape, compute_dtype(place.dtype), [&](Stream& cpu, TensorView view) {
        kernels::orthogonal_features(cpu, static_cast<std::uint64_t>(config.attention.feature_seed),
                                     fmt::format("layers.{}.attention.features", layer), m, view);
      });
      layers_.push_back({Features::random_exponential, m, std::move(table)});
    }
  }

  Var forward(Tape& tape, const Var& qkv, std::int64_t batch, std::int64_t layer) const override {
    return linear_attention(tape, qkv, batch, place_.heads, of(layer));
  }

  AttentionMemory make_memory(Allocator& allocator, std::int64_t batch, std::int64_t) const override {
    const Shape shape{batch * place_.heads, kernels::linear_attention_state(place_.head_dim, of(0).count)};
    return {.keys = {},
            .values = {},
            .sums = Tensor::zeros(allocator, shape, compute_dtype(place_.dtype), Purpose::activations)};
  }

  Tensor extend(Tape& tape, const Tensor& qkv, std::int64_t batch, std::int64_t layer, std::int64_t first, std::int64_t,
                AttentionMemory& memory) const override {
    const std::int64_t n = qkv.shape().rows() / batch;
    const kernels::LinearShape shape{batch, place_.heads, n, first};
    const std::int64_t size = kernels::linear_attention_workspace(shape, place_.head_dim, of(layer).count,
                                                                  kernels::LinearPass::forward, tape.stream().device());
    Tensor workspace = tape.empty(Shape{size}, compute_dtype(place_.dtype), Purpose::workspace);
    Tensor out = tape.empty(Shape{batch * n, place_.columns()}, place_.dtype);
    kernels::linear_attention_forward(tape.stream(), shape, of(layer).map(), part(qkv, 0), part(qkv, 1), part(qkv, 2),
                                      out.view(), {}, memory.sums.view(), workspace.view());
    return out;
  }

 private:
  const AttentionFeatures& of(std::int64_t layer) const { return layers_[static_cast<std::size_t>(layer)]; }

  Place place_;
  std::vector<AttentionFeatures> layers_;
};

/// The mean of a sum over the keys that a row sees of its own group of `size` positions, over `seq` rows.
double mean_seen(std::int64_t seq, std::int64_t size) {
  const std::int64_t groups = seq / size;
  const auto whole = static_cast<double>(groups), s = static_cast<double>(size), rest = static_cast<double>(seq % size);
  return (whole * s * (s + 1) / 2 + rest * (rest + 1) / 2) / static_cast<double>(seq);
}

}  // namespace

std::unique_ptr<Attention> make_attention(Allocator& allocator, Stream& stream, const ModelConfig& config, DType dtype,
                                          std::int64_t heads_here, ParameterSet& parameters) {
  const Place place{heads_here, config.head_dim(), dtype};
  switch (config.attention.kind) {
    case AttentionKind::softmax: return std::make_unique<SoftmaxAttention>(place);
    case AttentionKind::linformer: return std::make_unique<BlockAttention>(config, place, parameters);
    case AttentionKind::performer:
    case AttentionKind::cosformer: return std::make_unique<LinearAttention>(allocator, stream, config, place);
  }
  throw InternalError("model.attention.kind {}", static_cast<int>(config.attention.kind));
}

std::vector<ParameterSpec> attention_specs(const ModelConfig& config, const ShardPlan& plan, std::int64_t layer) {
  if (config.attention.kind != AttentionKind::linformer) return {};
  const auto in_rows = [&](ShardBorders borders) {
    for (std::int64_t& border : borders.borders) border *= config.attention.slots;
    return borders;
  };
  const Shape shape{config.heads * config.attention.slots, config.attention.block};
  std::vector<ParameterSpec> specs;
  for (const char* name : {kKeySlots, kValueSlots}) {
    specs.push_back({slots_path(layer, name), shape, Placement::sharded, in_rows(plan.heads), Decay::yes});
    if (plan.shards) specs.back().shards = in_rows(plan.shards->heads.value());
  }
  return specs;
}

bool is_attention_slots(std::string_view path) { return path.ends_with(kKeySlots) || path.ends_with(kValueSlots); }

double attention_slots_deviation(const ModelConfig& config) {
  return 1 / std::sqrt(static_cast<double>(config.attention.block));
}

std::int64_t attention_parameters(const ModelConfig& config) {
  if (config.attention.kind != AttentionKind::linformer) return 0;
  return 2 * config.heads * config.attention.slots * config.attention.block;
}

void check_attention(const ModelConfig& config) {
  const AttentionConfig& attention = config.attention;
  if (attention.kind == AttentionKind::linformer) {
    const std::int64_t most = std::min(kMostBlock, config.max_seq);
    if (attention.block < 1 || attention.block > most) {
      throw ConfigError("model.attention.block = {}: want 1 to {}, the smaller of model.max_seq and {}",
                        attention.block, most, kMostBlock);
    }
    if (attention.slots < 1 || attention.slots > attention.block) {
      throw ConfigError("model.attention.slots = {}: want 1 to the {} positions of model.attention.block",
                        attention.slots, attention.block);
    }
    check_size(config, 2 * static_cast<double>(config.heads) * static_cast<double>(attention.slots * attention.block));
  }
  if (attention.features < 0 || attention.features > kMostFeatures) {
    throw ConfigError("model.attention.features = {}: want 0 (head_dim * ln(head_dim)) to {}", attention.features,
                      kMostFeatures);
  }
  if (attention.kind == AttentionKind::cosformer && config.rotary_fraction != 0) {
    throw ConfigError(
        "model.rotary_fraction = {}: model.attention.kind = \"cosformer\" weighs positions itself and is defined on "
        "keys that are not rotated; set it to 0",
        config.rotary_fraction);
  }
}

std::int64_t attention_features(const ModelConfig& config) {
  if (config.attention.kind == AttentionKind::cosformer) return 2 * config.head_dim();
  if (config.attention.features > 0) return config.attention.features;
  const auto d = static_cast<double>(config.head_dim());
  return std::max<std::int64_t>(1, static_cast<std::int64_t>(d * std::log(d)));
}

double attention_multiply_adds(const ModelConfig& config, std::int64_t seq) {
  const auto d = static_cast<double>(config.dim);
  if (config.attention.kind == AttentionKind::softmax) return static_cast<double>(seq + 1) * d;
  if (config.attention.kind == AttentionKind::linformer) {
    const std::int64_t block = config.attention.block, blocks = (seq - 1) / block;  // those before the last
    const auto slots = static_cast<double>(config.attention.slots), n = static_cast<double>(seq);
    const auto whole = static_cast<double>(blocks), size = static_cast<double>(block);
    // Rows of block b see b slots: all rows of the blocks before the last, and those of the last.
    const double of_slots = slots * (whole * (whole - 1) / 2 * size + whole * (n - whole * size)) / n;
    return 2 * d * (mean_seen(seq, block) + of_slots) + 2 * d * slots * whole * size / n;
  }
  const auto heads = static_cast<double>(config.heads), m = static_cast<double>(attention_features(config));
  // Features of q and k; weights within a chunk; queries with the sums; keys and values into them.
  const double map = config.attention.kind == AttentionKind::performer ? 2 * d * m : 0;
  const auto with_sums = static_cast<double>(std::max<std::int64_t>(0, seq - kLinearChunk));
  const std::int64_t chunks_before = (seq - 1) / kLinearChunk;
  const auto into_sums = static_cast<double>(chunks_before * kLinearChunk);
  return map + mean_seen(seq, kLinearChunk) * (heads * m + d) +
         m * d * (with_sums + into_sums) / static_cast<double>(seq);
}

std::string attention_text(const ModelConfig& config) {
  const std::int64_t m = attention_features(config), d = config.dim;
  switch (config.attention.kind) {
    case AttentionKind::softmax: return "softmax, exact";
    case AttentionKind::linformer:
      return fmt::format(
          "linformer, a causal substitute and not the published form, which is not causal: {} projections of each "
          "complete block of {} positions, and the own block exactly",
          config.attention.slots, config.attention.block);
    case AttentionKind::performer:
      return fmt::format(
          "performer, {} orthogonal random features a head of seed {}; its paper's prefix sums: {} multiply-adds a "
          "token and block",
          m, config.attention.feature_seed, 4 * m * d);
    case AttentionKind::cosformer:
      return fmt::format("cosformer over {} positions; its paper's prefix sums: {} multiply-adds a token and block",
                         config.max_seq, 2 * m * d);
  }
  return "?";
}

}  // namespace tforge
