// Every differentiable op on a device beside the same op on the CPU: its value, and the gradients of a random linear
// loss of it.
#include <array>
#include <functional>
#include <numeric>
#include <string>

#include "autograd/ops/attention.h"
#include "autograd/ops/block_attention.h"
#include "autograd/ops/embedding.h"
#include "autograd/ops/gelu.h"
#include "autograd/ops/head_cross_entropy.h"
#include "autograd/ops/layer_norm.h"
#include "autograd/ops/linear.h"
#include "autograd/ops/linear_attention.h"
#include "autograd/ops/memory_layer.h"
#include "autograd/ops/pattention.h"
#include "autograd/ops/recompute.h"
#include "autograd/ops/residual.h"
#include "autograd/ops/rms_norm.h"
#include "kernels/device_libraries.h"
#include "kernels/gemm.h"
#include "kernels/rotary.h"
#include "support/cuda_device.h"
#include "values.h"

namespace tforge {
namespace {

using Inputs = std::vector<Tensor>;  // f64 of the host
using Op = std::function<Var(Tape&, std::span<const Var>)>;

/// Numbers of the host, in f64, as T in the memory of `allocator`.
template <class T>
Tensor placed(Allocator& allocator, const Tensor& host) {
  const auto from = host.span<double>();
  return Tensor::of<T>(allocator, host.shape(), std::vector<T>(from.begin(), from.end()), Purpose::activations);
}

template <class T>
test::Values numbers(const Tensor& x) {
  Allocator host;
  const Tensor here = x.clone(host);
  const auto span = here.span<T>();
  return {span.begin(), span.end()};
}

/// The value, and the gradient of each input.
template <class T>
std::vector<test::Values> results_of(Allocator& allocator, Stream& stream, const Op& op, const Inputs& inputs) {
  Allocator host;
  std::vector<Tensor> gradients;
  std::vector<Var> vars;
  for (const Tensor& input : inputs) {
    const auto count = static_cast<std::size_t>(input.elements());
    gradients.push_back(Tensor::of<T>(allocator, input.shape(),
                                      std::vector<T>(count, std::numeric_limits<T>::quiet_NaN()), Purpose::gradients));
    vars.push_back(Var::parameter(placed<T>(allocator, input), gradients.back(), nullptr, 0));
  }
  Tape tape(allocator, stream, TapeMode::training);
  Var y = op(tape, vars);
  std::vector<test::Values> results;
  results.push_back(y.dtype() == DType::f64 ? numbers<double>(y.value()) : numbers<T>(y.value()));
  if (y.shape().elements() == 1) {
    tape.backward(y);
  } else {
    Tensor dy = placed<T>(allocator, test::random(host, y.shape(), "loss"));
    tape.backward(std::move(y), std::move(dy));
  }
  for (const Tensor& gradient : gradients) results.push_back(numbers<T>(gradient));
  return results;
}

/// In f32 and f64, within 100 roundings of the largest number of a result: sums here have up to 257 terms, whose errors
/// cancel for the most part.
void expect_the_cpus(test::CudaDevice& device, const char* what, const Inputs& inputs, const Op& op) {
  kernels::DeviceLibraries libraries(device.stream, device.memory);
  const auto compare = [&]<class T>(T) {
    Allocator allocator;
    Stream stream;
    const auto got = results_of<T>(device.memory, device.stream, op, inputs);
    const auto want = results_of<T>(allocator, stream, op, inputs);
    for (std::size_t r = 0; r < want.size(); ++r) {
      double largest = 0, apart = 0;
      for (std::size_t i = 0; i < want[r].size(); ++i) {
        largest = std::max(largest, std::abs(want[r][i]));
        apart = std::max(apart, std::abs(got[r][i] - want[r][i]));
        ASSERT_FALSE(std::isnan(got[r][i])) << what << ", result " << r << ", element " << i;
      }
      EXPECT_GT(largest, 1e-4) << what << ", result " << r << " shows nothing";
      EXPECT_LE(apart, 100 * std::numeric_limits<T>::epsilon() * largest) << what << ", result " << r;
    }
  };
  compare(float());
  compare(double());
}

class CudaOps : public testing::Test {
 protected:
  static void SetUpTestSuite() { kernels::start_cpu_runtime(1); }
  Tensor random(const Shape& shape, const char* name, double size = 1) {
    return test::random(host_, shape, name, size);
  }
  Allocator host_;
};

/// Numbers from 0 to below `limit`, in the tape's memory.
Tensor some_of(Tape& tape, std::int64_t count, std::int32_t limit, std::int32_t first = 0) {
  std::vector<std::int32_t> numbers;
  const Rng rng(5, "some");
  for (std::int64_t i = 0; i < count; ++i) {
    numbers.push_back(
        first + static_cast<std::int32_t>(rng.below(static_cast<std::uint64_t>(i), static_cast<std::uint64_t>(limit))));
  }
  return test::integers(tape.allocator(), numbers);
}

/// A table that is made on the host, in the dtype of `like` and the tape's memory.
Tensor table_of(Tape& tape, const Var& like, const Shape& shape, const std::function<void(Stream&, TensorView)>& fill) {
  Allocator host;
  Stream stream;
  Tensor table = Tensor::empty(host, shape, like.dtype(), Purpose::weights);
  fill(stream, table.view());
  return table.clone(tape.allocator());
}

TEST_F(CudaOps, OfElementsAndRows) {
  test::on_cuda([&](test::CudaDevice& device) {
    for (const auto& [rows, columns] : {std::pair{1, 31}, {33, 257}, {31, 32}, {257, 33}, {5, 1}}) {
      const Tensor x = random(Shape{rows, columns}, "x"), y = random(Shape{rows, columns}, "y"),
                   weight = random(Shape{columns}, "weight"), bias = random(Shape{columns}, "bias");
      expect_the_cpus(device, "gelu", {x}, [](Tape& tape, auto in) { return gelu(tape, in[0]); });
      expect_the_cpus(device, "residual", {x, y},
                      [](Tape& tape, auto in) { return residual(tape, in[0], gelu(tape, in[1])); });
      expect_the_cpus(device, "add_bias", {x, bias},
                      [](Tape& tape, auto in) { return add_bias(tape, gelu(tape, in[0]), in[1]); });
      if (columns == 1) continue;  // whose norm says nothing
      expect_the_cpus(device, "layer_norm", {x, weight, bias},
                      [](Tape& tape, auto in) { return layer_norm(tape, in[0], in[1], in[2], 1e-5); });
      expect_the_cpus(device, "rms_norm", {x, weight},
                      [](Tape& tape, auto in) { return rms_norm(tape, in[0], in[1], 1e-5); });
    }
  });
}

TEST_F(CudaOps, Linear) {
  test::on_cuda([&](test::CudaDevice& device) {
    for (const std::int64_t rows : {1, 33}) {
      const Tensor x = random(Shape{rows, 31}, "x");
      expect_the_cpus(device, "linear",
                      {x, random(Shape{33, 31}, "q"), random(Shape{33, 1}, "q bias"), random(Shape{2, 31}, "k"),
                       random(Shape{257, 31}, "v"), random(Shape{257, 1}, "v bias")},
                      [](Tape& tape, auto in) {
                        return linear(tape, in[0],
                                      std::array{LinearWeights{in[1], in[2]}, LinearWeights{in[3], {}},
                                                 LinearWeights{in[4], in[5]}},
                                      identity_reducer());
                      });
      expect_the_cpus(device, "linear_of_shard", {x, random(Shape{31, 33}, "weight")},
                      [](Tape& tape, auto in) { return linear_of_shard(tape, in[0], in[1], identity_reducer()); });
      expect_the_cpus(device, "gelu_mlp",
                      {x, random(Shape{65, 31}, "in", 0.2), random(Shape{65, 1}, "bias"), random(Shape{65, 33}, "out")},
                      [](Tape& tape, auto in) {
                        return gelu_mlp(tape, in[0], {in[1], in[2]}, in[3], identity_reducer());
                      });
    }
  });
}

TEST_F(CudaOps, Embedding) {
  test::on_cuda([&](test::CudaDevice& device) {
    for (const std::int64_t columns : {31, 64}) {
      expect_the_cpus(device, "embedding", {random(Shape{33, columns}, "table")},
                      [](Tape& tape, auto in) { return embedding(tape, some_of(tape, 257, 40, 3), in[0], 5); });
    }
  });
}

TEST_F(CudaOps, HeadCrossEntropy) {
  test::on_cuda([&](test::CudaDevice& device) {
    for (const std::int64_t rows : {1, 31, 257}) {
      expect_the_cpus(device, "head_cross_entropy", {random(Shape{rows, 16}, "h"), random(Shape{33, 16}, "table")},
                      [rows](Tape& tape, auto in) {
                        const Tensor targets = some_of(tape, rows, 33);
                        return head_cross_entropy(tape, in[0], in[1], targets, 0, 0.7, identity_reducer()).loss;
                      });
    }
  });
}

TEST_F(CudaOps, RotaryAndAttention) {
  test::on_cuda([&](test::CudaDevice& device) {
    constexpr std::int64_t kBatch = 2, kHeads = 3, kHeadDim = 10;
    for (const std::int64_t seq : {1, 31, 33}) {
      const Tensor qkv = random(Shape{kBatch * seq, 3 * kHeads * kHeadDim}, "qkv");
      expect_the_cpus(device, "rotary", {qkv}, [seq](Tape& tape, auto in) {
        Allocator host;
        Stream stream;
        Tensor cosine = Tensor::empty(host, Shape{seq, 2}, in[0].dtype(), Purpose::weights), sine = cosine.clone(host);
        kernels::rotary_tables(stream, 10.0, cosine.view(), sine.view());
        return rotary(tape, gelu(tape, in[0]), cosine.clone(tape.allocator()), sine.clone(tape.allocator()), kHeads,
                      seq);
      });
      const Tensor slots[] = {random(Shape{kHeads * 2, 8}, "keys", 0.5), random(Shape{kHeads * 2, 8}, "values", 0.5)};
      if (seq == 1) continue;  // whose queries and keys decide about nothing
      expect_the_cpus(device, "causal_attention", {qkv},
                      [](Tape& tape, auto in) { return causal_attention(tape, in[0], kBatch, kHeads); });
      expect_the_cpus(device, "block_attention", {qkv, slots[0], slots[1]}, [](Tape& tape, auto in) {
        return block_attention(tape, in[0], kBatch, kHeads, {in[1], in[2]});
      });
      expect_the_cpus(device, "performer", {qkv}, [](Tape& tape, auto in) {
        const Tensor table =
            table_of(tape, in[0], Shape{kHeadDim, kernels::feature_columns(9)},
                     [](Stream& s, TensorView t) { kernels::orthogonal_features(s, 1, "test", 9, t); });
        return linear_attention(tape, in[0], kBatch, kHeads, {kernels::Features::random_exponential, 9, table});
      });
      expect_the_cpus(device, "cosformer", {qkv}, [](Tape& tape, auto in) {
        const Tensor table =
            table_of(tape, in[0], Shape{64, 2}, [](Stream& s, TensorView t) { kernels::cosine_features(s, t); });
        return linear_attention(tape, in[0], kBatch, kHeads, {kernels::Features::relu_cosine, 2 * kHeadDim, table});
      });
    }
  });
}

/// Says that there are other ranks, so that an op takes its steps one by one; there are none.
class LonelyReducer final : public Reducer {
 public:
  bool is_identity() const override { return false; }
  void sum(Stream&, ConstTensorView, TensorView) override {}
  void max(Stream&, ConstTensorView, TensorView) override {}
};

TEST_F(CudaOps, Pattention) {
  test::on_cuda([&](test::CudaDevice& device) {
    LonelyReducer lonely;
    for (const PattentionNorm norm :
         {PattentionNorm::l2_norm_gelu, PattentionNorm::gelu_l2_norm, PattentionNorm::softmax}) {
      for (Reducer* reducer : {&identity_reducer(), static_cast<Reducer*>(&lonely)}) {
        const Inputs inputs = {random(Shape{33, 32}, "x"),  random(Shape{31, 32}, "k0"), random(Shape{31, 16}, "v0"),
                               random(Shape{64, 32}, "k1"), random(Shape{64, 16}, "v1"), random(Shape{257, 32}, "k2"),
                               random(Shape{257, 16}, "v2")};
        const std::vector<double> scales = {initial_scale(norm, 31), initial_scale(norm, 64), initial_scale(norm, 257)};
        const auto layers = [&](std::span<const Var> in) {
          return std::array{PattentionTokens{in[1], in[2], scales[0]}, PattentionTokens{in[3], in[4], scales[1]},
                            PattentionTokens{in[5], in[6], scales[2]}};
        };
        expect_the_cpus(device, "pattention", inputs, [&](Tape& tape, auto in) {
          return row_normalize(tape, pattention(tape, in[0], layers(in), norm, *reducer), scales, norm);
        });
        expect_the_cpus(device, "recomputed pattention", inputs, [&](Tape& tape, auto in) {
          const auto again = [&scales, norm, reducer, tokens = layers(in)](Tape& t, const Var& x) {
            return row_normalize(t, pattention(t, x, tokens, norm, *reducer), scales, norm);
          };
          return recomputed(tape, gelu(tape, in[0]), again);
        });
      }
    }
  });
}

TEST_F(CudaOps, MemoryLayer) {
  test::on_cuda([&](test::CudaDevice& device) {
    constexpr std::int64_t kBits = 3, kTables = 5;
    for (const HashWeight weight : {HashWeight::p, HashWeight::l1_times_p}) {
      Tensor x = random(Shape{33, kBits * kTables}, "x");
      for (double& v : x.span<double>()) v += v < 0 ? -0.01 : 0.01;  // none where a sign could flip
      expect_the_cpus(
          device, "memory_layer",
          {x, random(Shape{kTables << kBits, 31}, "q"), random(Shape{kTables << kBits, 32}, "k")},
          [weight](Tape& tape, auto in) {
            std::vector<std::int32_t> coordinates(kBits * kTables);
            std::iota(coordinates.begin(), coordinates.end(), 0);
            const MemoryHashing hash{weight, 1.0, kBits - 1,
                                     test::integers(tape.allocator(), coordinates).reshaped(Shape{kBits, kTables})};
            return memory_layer(tape, in[0], hash, std::vector<MemoryTables>{{in[1]}, {in[2]}}, identity_reducer());
          });
    }
  });
}

}  // namespace
}  // namespace tforge
