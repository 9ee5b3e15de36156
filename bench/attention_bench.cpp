// Causal attention. `GFLOP/s` counts the products of the causal half alone: 4 head_dim S (S + 1) / 2 operations a head
// forward, 10 backward (scores again, dP, dQ, dK, dV), so it is below what the processor does by the softmax and by the
// part of the diagonal blocks that is thrown away. Sgemm is what a large product reaches.
#include "kernels/attention.h"

#include <benchmark/benchmark.h>

#include <vector>

#include "autograd/ops/attention.h"
#include "autograd/ops/block_attention.h"
#include "autograd/ops/linear_attention.h"
#include "kernels/gemm.h"
#include "kernels/random.h"

namespace tforge {
namespace {

using kernels::AttentionShape;

struct Operands {
  Allocator allocator;
  AttentionShape shape;
  std::int64_t head_dim, columns;
  Tensor qkv, out, lse, dqkv, workspace;

  explicit Operands(const benchmark::State& state)
      : shape{state.range(0), state.range(1), state.range(2), state.range(3), state.range(3)},
        head_dim(state.range(4)),
        columns(shape.heads * head_dim) {
    kernels::start_cpu_runtime(1);
    const auto make = [&](std::int64_t rows, std::int64_t width) {
      Tensor t = Tensor::empty(allocator, {rows, width}, DType::f32, Purpose::activations);
      float x = 0.1F;
      for (float& value : t.span<float>()) value = x = 3.7F * x * (1 - x);  // chaotic in (0, 1)
      return t;
    };
    qkv = make(shape.batch * shape.kv_seq, 3 * columns);
    dqkv = make(shape.batch * shape.kv_seq, 3 * columns);
    out = make(shape.batch * shape.q_seq, columns);
    lse = make(shape.batch * shape.q_seq, shape.heads);
    workspace = make(1, kernels::attention_workspace(shape, head_dim));
  }
  TensorView part(Tensor& t, int i) const { return t.view().column_range(i * columns, columns); }
  TensorView queries() {
    TensorView q = part(qkv, 0);
    return q.row_range(0, shape.batch * shape.q_seq);
  }
  void forward(Stream& stream) {
    kernels::causal_attention_forward(stream, shape, queries(), part(qkv, 1), part(qkv, 2), out.view(), lse.view(),
                                      workspace.view());
  }
  void rate(benchmark::State& state, double operations) const {
    const auto q = static_cast<double>(shape.q_seq), kv = static_cast<double>(shape.kv_seq);
    const double scores = q * (kv - q) + q * (q + 1) / 2;
    const auto heads = static_cast<double>(shape.batch * shape.heads);
    state.counters["GFLOP/s"] = benchmark::Counter(operations * heads * scores * static_cast<double>(head_dim) * 1e-9,
                                                   benchmark::Counter::kIsIterationInvariantRate);
  }
};

void forward(benchmark::State& state) {
  Operands x(state);
  Stream stream;
  for (auto _ : state) x.forward(stream);
  x.rate(state, 4);
}

void backward(benchmark::State& state) {
  Operands x(state);
  Stream stream;
  x.forward(stream);
  for (auto _ : state) {
    kernels::causal_attention_backward(stream, x.shape, x.queries(), x.part(x.qkv, 1), x.part(x.qkv, 2), x.out.view(),
                                       x.lse.view(), x.out.view(), x.part(x.dqkv, 0), x.part(x.dqkv, 1),
                                       x.part(x.dqkv, 2), x.workspace.view());
  }
  x.rate(state, 10);
}

/// What a large product reaches.
void sgemm(benchmark::State& state) {
  kernels::start_cpu_runtime(1);
  Allocator allocator;
  Stream stream;
  constexpr std::int64_t kSide = 1024;
  const auto zeros = [&] { return Tensor::zeros(allocator, {kSide, kSide}, DType::f32, Purpose::activations); };
  Tensor a = zeros(), b = zeros(), c = zeros();
  for (auto _ : state) {
    kernels::gemm(stream, kernels::Transpose::no, kernels::Transpose::no, 1, a.view(), b.view(), GradMode::overwrite,
                  c.view());
  }
  state.counters["GFLOP/s"] =
      benchmark::Counter(2e-9 * kSide * kSide * kSide, benchmark::Counter::kIsIterationInvariantRate);
}

/// One layer of 8 heads of 64 through the op of each kind, one sequence: `m` features, or blocks of 64 and 16 slots. No
/// operations are counted: the kinds do not do the same ones.
enum class Kind { softmax, linformer, performer, cosformer };

struct Layer {
  static constexpr std::int64_t kHeads = 8, kHeadDim = 64, kFeatures = 256, kBlock = 64, kSlots = 16;
  Allocator allocator;
  Stream stream;
  Kind kind;
  std::int64_t seq;
  Tensor qkv, dout;
  AttentionFeatures features;
  BlockSlots slots;

  explicit Layer(const benchmark::State& state) : kind(static_cast<Kind>(state.range(0))), seq(state.range(1)) {
    kernels::start_cpu_runtime(1);
    const auto random = [&](const char* name, const Shape& shape, double size) {
      Tensor t = Tensor::empty(allocator, shape, DType::f32, Purpose::activations);
      kernels::fill_normal(stream, 1, name, 0, size, GradMode::overwrite, t.view());
      return t;
    };
    qkv = random("qkv", {seq, 3 * kHeads * kHeadDim}, 1);
    dout = random("dout", {seq, kHeads * kHeadDim}, 1);
    if (kind == Kind::performer) {
      Tensor table =
          Tensor::empty(allocator, {kHeadDim, kernels::feature_columns(kFeatures)}, DType::f32, Purpose::weights);
      kernels::orthogonal_features(stream, 1, "bench", kFeatures, table.view());
      features = {kernels::Features::random_exponential, kFeatures, table};
    } else if (kind == Kind::cosformer) {
      Tensor table = Tensor::empty(allocator, {seq, 2}, DType::f32, Purpose::weights);
      kernels::cosine_features(stream, table.view());
      features = {kernels::Features::relu_cosine, 2 * kHeadDim, table};
    }
    slots = {Var(random("keys", {kHeads * kSlots, kBlock}, 0.125)),
             Var(random("values", {kHeads * kSlots, kBlock}, 0.125))};
  }
  Var run(Tape& tape, const Var& x) const {
    switch (kind) {
      case Kind::softmax: return causal_attention(tape, x, 1, kHeads);
      case Kind::linformer: return block_attention(tape, x, 1, kHeads, slots);
      default: return linear_attention(tape, x, 1, kHeads, features);
    }
  }
};

const char* name_of(Kind kind) {
  constexpr const char* kNames[] = {"softmax", "linformer", "performer", "cosformer"};
  return kNames[static_cast<int>(kind)];
}

void layer_forward(benchmark::State& state) {
  Layer x(state);
  Tape tape(x.allocator, x.stream, TapeMode::inference);
  for (auto _ : state) benchmark::DoNotOptimize(x.run(tape, Var(x.qkv)).view().data);
  state.SetLabel(name_of(x.kind));
}

void layer_both(benchmark::State& state) {
  Layer x(state);
  Tape tape(x.allocator, x.stream, TapeMode::training);
  for (auto _ : state) tape.backward(x.run(tape, tape.leaf(x.qkv)), x.dout);
  state.SetLabel(name_of(x.kind));
}

void lengths(benchmark::internal::Benchmark* b) {
  b->ArgNames({"kind", "seq"})->ArgsProduct({{0, 1, 2, 3}, {256, 512, 1024, 2048, 4096}});
  b->Unit(benchmark::kMillisecond);
}

void shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"batch", "heads", "q_seq", "kv_seq", "head_dim"});
  b->Args({8, 8, 256, 256, 32})->Args({16, 4, 256, 256, 32})->Args({1, 12, 512, 512, 64});
  b->Unit(benchmark::kMillisecond);
}
BENCHMARK(sgemm)->Name("Sgemm")->Unit(benchmark::kMillisecond);
BENCHMARK(forward)->Name("AttentionForward")->Apply(shapes);
BENCHMARK(backward)->Name("AttentionBackward")->Apply(shapes);
BENCHMARK(layer_forward)->Name("LayerForward")->Apply(lengths);
BENCHMARK(layer_both)->Name("LayerBoth")->Apply(lengths);
BENCHMARK(forward)
    ->Name("AttentionOneQuery")
    ->ArgNames({"batch", "heads", "q_seq", "kv_seq", "head_dim"})
    ->Args({1, 12, 1, 512, 64})
    ->Args({1, 8, 1, 256, 32})
    ->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace tforge

BENCHMARK_MAIN();
