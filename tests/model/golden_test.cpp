// Our models against tensors computed by the published layer code, and by PyTorch, on every small layout of the ranks
// at hand.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "autograd/ops/memory_layer.h"
#include "checkpoint/published_file.h"
#include "core/errors.h"
#include "model/memoryformer.h"
#include "support/mpi_world.h"
#include "support/source_file.h"
#include "train/compare.h"

namespace tforge {
namespace {

class Golden : public ::testing::TestWithParam<std::string> {};

void expect_close(const std::string& name, std::size_t tensors, DType dtype, double tolerance,
                  Device device = Device::cpu) {
  Communicator& world = test_world();
  Workplace place(world, device);
  const std::string path = source_file("tests/golden/" + name + ".h5");
  for (int dp = 1; dp <= world.size(); ++dp) {
    if (world.size() % dp != 0) continue;
    Mesh mesh = Mesh::create(world, dp, world.size() / dp);
    const std::vector<TensorError> errors = compare_with_published(path, dtype, mesh, place);
    EXPECT_EQ(errors.size(), tensors);
    for (const TensorError& e : errors) {
      EXPECT_LT(e.error, tolerance) << e.name << " at " << dp << "x" << world.size() / dp;
    }
  }
}

/// Two hidden states, logits, loss; the gradients of embedding, final norm, and of the parameters of two blocks.
constexpr std::size_t tensors_of(std::size_t parameters_of_a_block) {
  return 2 + 1 + 1 + 1 + 2 + 2 * parameters_of_a_block;
}

TEST_P(Golden, F64) { expect_close("tokenformer_" + GetParam(), tensors_of(10), DType::f64, 1e-6); }
TEST_P(Golden, F32) { expect_close("tokenformer_" + GetParam(), tensors_of(10), DType::f32, 2e-5); }

TEST(GoldenTransformer, FromPyTorch) {
  expect_close("transformer", tensors_of(16), DType::f64, 1e-12);
  expect_close("transformer", tensors_of(16), DType::f32, 2e-5);
}

/// Calls f where there is a device for one rank.
template <class F>
void on_cuda(const F& f) {
  const Devices found = devices_of(Device::cuda);
  if (found.count == 0) GTEST_SKIP() << "no CUDA device: " << found.why_none;
  if (test_world().size() > 1) GTEST_SKIP() << "a device is used by one rank";
  f();
}
TEST_P(Golden, CudaF32) {
  on_cuda([] { expect_close("tokenformer_" + GetParam(), tensors_of(10), DType::f32, 1e-4, Device::cuda); });
}
TEST(GoldenTransformer, Cuda) {
  on_cuda([] { expect_close("transformer", tensors_of(16), DType::f32, 1e-4, Device::cuda); });
}

INSTANTIATE_TEST_SUITE_P(Norms, Golden, ::testing::Values("l2_norm_gelu", "gelu_l2_norm", "softmax"),
                         [](const auto& test) { return test.param; });

std::string memoryformer_file(const std::string& norm) {
  return source_file("tests/golden/memoryformer_" + norm + ".h5");
}

class MemoryFormerGolden : public ::testing::TestWithParam<std::string> {};

/// Hidden states, logits, loss, embedding, final norm and two blocks.
std::size_t memoryformer_tensors(const std::string& norm) {
  const std::size_t norms = norm == "rmsnorm" ? 1 : 2;  // tensors of one
  return 2U + 1 + 1 + 2 + norms + 2 * (2 * norms + 2 + 2 * 5);
}

// In f64 alone: in f32 a sum in another order may flip a bit of a hash.
TEST_P(MemoryFormerGolden, WholeModel) {
  expect_close("memoryformer_" + GetParam(), memoryformer_tensors(GetParam()), DType::f64, 1e-6);
}
TEST_P(MemoryFormerGolden, CudaWholeModel) {
  on_cuda([] {
    expect_close("memoryformer_" + GetParam(), memoryformer_tensors(GetParam()), DType::f64, 1e-6, Device::cuda);
  });
}

TEST_P(MemoryFormerGolden, OneLayer) {
  const PublishedFile file(memoryformer_file(GetParam()));
  constexpr std::int64_t kRows = 11, kIn = 32, kOut = 20, kBits = 4, kTables = 8;
  Allocator allocator;
  Stream stream;
  const auto tensor = [&](const char* name, const Shape& shape) {
    const std::vector<double> values = file.tensor(std::string("layer/") + name, shape.elements());
    return Tensor::of(allocator, shape, std::span<const double>(values), Purpose::activations);
  };
  ModelConfig config;
  config.dim = kIn;
  config.hash_bits = {kBits, kBits, kBits};
  const std::vector<std::int32_t> coordinates = memory_coordinates(config, MemoryGroup::attention, {}, 0, kTables);
  const MemoryHashing hash{
      file.hash_weight, 1.0, kBits,
      Tensor::of(allocator, Shape{kBits, kTables}, std::span<const std::int32_t>(coordinates), Purpose::weights)};
  Tensor dtables = Tensor::zeros(allocator, Shape{kTables << kBits, kOut}, DType::f64, Purpose::gradients);
  Tensor dbias = Tensor::zeros(allocator, Shape{kOut}, DType::f64, Purpose::gradients);
  const MemoryTables layer{Var::parameter(tensor("tables", dtables.shape()), dtables, nullptr, 0),
                           Var::parameter(tensor("bias", dbias.shape()), dbias, nullptr, 1)};
  Tape tape(allocator, stream, TapeMode::training);
  const Var x = tape.leaf(tensor("x", Shape{kRows, kIn}));
  const Grad& dx = x.grad();
  const Var y = memory_layer(tape, x, hash, {&layer, 1}, identity_reducer());
  const auto expect_near = [&](const char* name, const Tensor& ours) {
    const std::vector<double> theirs = file.tensor(std::string("layer/") + name, ours.elements());
    double largest = 0, difference = 0;
    for (std::size_t i = 0; i < theirs.size(); ++i) {
      largest = std::max(largest, std::abs(theirs[i]));
      difference = std::max(difference, std::abs(theirs[i] - ours.span<double>()[i]));
    }
    EXPECT_GT(largest, 1e-3) << name;
    EXPECT_LT(difference, 1e-6 * largest) << name;
  };
  expect_near("y", y.value());
  tape.backward(y, tensor("dy", Shape{kRows, kOut}));
  expect_near("dx", dx.share());
  expect_near("dtables", dtables);
  expect_near("dbias", dbias);
}

INSTANTIATE_TEST_SUITE_P(Norms, MemoryFormerGolden, ::testing::Values("layernorm", "rmsnorm"),
                         [](const auto& test) { return test.param; });

TEST(PublishedFile, NamesOfAllParameters) {
  EXPECT_EQ(published_name("embedding", 12), "sequential.0.word_embeddings.weight");
  EXPECT_EQ(published_name("layers.0.attention.query.keys", 12), "sequential.2.attention.query.key_param_tokens");
  EXPECT_EQ(published_name("layers.11.ffn.values", 12), "sequential.13.mlp.value_param_tokens");
  EXPECT_EQ(published_name("final_norm.bias", 12), "sequential.15.norm.bias");
  EXPECT_THROW(published_name("layers.x.ffn.keys", 12), InternalError);
  EXPECT_EQ(published_memory_name("layers.1.attention.query.tables", PublishedNorm::rmsnorm), "block.1.q.tables");
  EXPECT_EQ(published_memory_name("layers.1.ffn.norm.weight", PublishedNorm::rmsnorm), "block.1.norm2.scale");
  EXPECT_EQ(published_memory_name("layers.1.ffn.inner_norm.weight", PublishedNorm::rmsnorm), "block.1.inner.weight");
  EXPECT_EQ(published_memory_name("final_norm.weight", PublishedNorm::layernorm), "final_norm.weight");
  EXPECT_THROW(published_memory_name("layers.1.proj.weight", PublishedNorm::layernorm), InternalError);
}

TEST(PublishedFile, RefusesAnotherFile) { EXPECT_THROW(PublishedFile(source_file("README.md")), DataError); }

}  // namespace
}  // namespace tforge
