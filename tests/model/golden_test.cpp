// Our models against tensors computed by the published layer code, and by PyTorch, on every small layout of the ranks
// at hand.
#include <gtest/gtest.h>

#include <string>

#include "checkpoint/published_file.h"
#include "core/errors.h"
#include "support/mpi_world.h"
#include "train/compare.h"

namespace tforge {
namespace {

class Golden : public ::testing::TestWithParam<std::string> {};

void expect_close(const std::string& name, std::size_t tensors, DType dtype, double tolerance) {
  Communicator& world = test_world();
  const std::string path = std::string(TFORGE_GOLDEN_DIR) + "/" + name + ".h5";
  for (int dp = 1; dp <= world.size(); ++dp) {
    if (world.size() % dp != 0) continue;
    Mesh mesh = Mesh::create(world, dp, world.size() / dp);
    const std::vector<TensorError> errors = compare_with_published(path, dtype, mesh);
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

INSTANTIATE_TEST_SUITE_P(Norms, Golden, ::testing::Values("l2_norm_gelu", "gelu_l2_norm", "softmax"),
                         [](const auto& test) { return test.param; });

TEST(PublishedFile, NamesOfAllParameters) {
  EXPECT_EQ(published_name("embedding", 12), "sequential.0.word_embeddings.weight");
  EXPECT_EQ(published_name("layers.0.attention.query.keys", 12), "sequential.2.attention.query.key_param_tokens");
  EXPECT_EQ(published_name("layers.11.ffn.values", 12), "sequential.13.mlp.value_param_tokens");
  EXPECT_EQ(published_name("final_norm.bias", 12), "sequential.15.norm.bias");
  EXPECT_THROW(published_name("layers.x.ffn.keys", 12), InternalError);
}

TEST(PublishedFile, RefusesAnotherFile) {
  EXPECT_THROW(PublishedFile(std::string(TFORGE_SOURCE_DIR) + "/README.md"), DataError);
}

}  // namespace
}  // namespace tforge
