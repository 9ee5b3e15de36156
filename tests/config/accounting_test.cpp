// Parameters and multiply-adds against the published counts.
#include "model/accounting.h"

#include <gtest/gtest.h>

#include <tuple>

namespace tforge {
namespace {

ModelConfig tokenformer(std::int64_t attention, std::int64_t ffn) {
  ModelConfig c;
  c.layers = 12;
  c.dim = 768;
  c.heads = 12;
  c.vocab = 50304;
  c.max_seq = 1024;
  c.tokens = {attention, attention, attention, attention, ffn};
  return c;
}

/// Millions, two digits behind the point.
std::string millions(const ModelConfig& config) {
  return fmt::format("{:.2f}", static_cast<double>(config.parameters()) / 1e6);
}

TEST(Accounting, PublishedParameters) {
  // TokenFormer (arXiv 2410.23168), the four sizes that are grown into one another; and the size trained on the Pile.
  EXPECT_EQ(millions(tokenformer(576, 2304)), "123.57");
  EXPECT_EQ(millions(tokenformer(2140, 8560)), "354.19");
  EXPECT_EQ(millions(tokenformer(4850, 19400)), "753.80");
  EXPECT_EQ(millions(tokenformer(8620, 34480)), "1309.71");
  EXPECT_EQ(tokenformer(768, 3072).parameters(), 151881216);
}

TEST(Accounting, PublishedOperations) {
  // Table 3: 4 L d = 36,864 for every size; the rest is 2 N, N = 2 L d (4 n + n_ffn).
  const ModelConfig c = tokenformer(576, 2304);
  const double n = 2.0 * 12 * 768 * (4 * 576 + 2304);
  EXPECT_EQ(published_flops_per_token(c, 1024), 2 * n + 36864.0 * 1024);
}

TEST(Accounting, PublishedTransformers) {
  // Pythia (arXiv 2304.01373, table 1, and the model cards): GPT-NeoX models without and with both ends, which are
  // untied. Their blocks add attention and MLP side by side, ours one after the other; both have two LayerNorms, and
  // biases everywhere. The vocabulary is the padded one of their checkpoints.
  for (const auto& [layers, dim, heads, vocab, inner, all] :
       {std::tuple{6, 512, 8, 50304, 18'915'328L, 70'426'624L},
        std::tuple{12, 768, 12, 50304, 85'056'000L, 162'322'944L},
        std::tuple{24, 1024, 16, 50304, 302'311'424L, 405'334'016L},
        std::tuple{16, 2048, 8, 50304, 805'736'448L, 1'011'781'632L},
        std::tuple{24, 2048, 16, 50304, 1'208'602'624L, 1'414'647'808L},
        std::tuple{32, 2560, 32, 50304, 2'517'652'480L, 2'775'208'960L},
        std::tuple{32, 4096, 32, 50432, 6'444'163'072L, 6'857'302'016L},
        std::tuple{36, 5120, 40, 50688, 11'327'027'200L, 11'846'072'320L}}) {
    ModelConfig c;
    c.kind = "transformer";
    c.layers = layers;
    c.dim = dim;
    c.heads = heads;
    c.vocab = vocab;
    c.head = Head::untied;
    EXPECT_EQ(sum_of(model_parts(c, 2048), Ends::left_out).parameters, inner);
    EXPECT_EQ(c.parameters(), all);
  }
}

ModelConfig memoryformer(std::int64_t layers, std::int64_t dim) {
  ModelConfig c;
  c.kind = "memoryformer";
  c.layers = layers;
  c.dim = dim;
  c.heads = dim / 64;
  c.vocab = 50304;
  c.head = Head::untied;
  return c;
}

TEST(Accounting, PublishedTables) {
  // MemoryFormer (arXiv 2411.12992): tiny, small and base at 8 bits, two more in the Memory Block. The paper gives the
  // sizes of the layers; the sums are 0.415, 1.87 and 6.64 billion.
  for (const auto& [layers, dim, want] :
       {std::tuple{6, 512, "0.415"}, std::tuple{12, 768, "1.869"}, std::tuple{24, 1024, "6.644"}}) {
    const ModelConfig c = memoryformer(layers, dim);
    const ModelPart inner = sum_of(model_parts(c, 2048), Ends::left_out);
    const std::int64_t rest = layers * (3 * dim + dim + 4 * dim + 3 * (dim / 8 * 10)) + 2 * dim;  // biases and norms
    EXPECT_EQ(fmt::format("{:.3f}", static_cast<double>(inner.parameters - rest) / 1e9), want);
  }
  // Figure 1: 19 % of the dense block's multiply-adds at s = d = 2048, attention not halved for causality.
  const ModelConfig c = memoryformer(1, 2048);
  double block = 0;
  for (const ModelPart& part : kind_of(c).block_parts(c)) block += part.multiply_adds;
  const double d = 2048, attention = 2 * d * d;
  EXPECT_EQ(fmt::format("{:.2f}", (block + attention) / (12 * d * d + attention)), "0.19");
  EXPECT_EQ(block, 5.25 * d / 8 * d);
  EXPECT_EQ(published_block_multiply_adds(c, 2048), 6 * d / 8 * d + attention);
}

TEST(Accounting, PartsAddUp) {
  ModelConfig c = tokenformer(576, 2304);
  const std::vector<ModelPart> parts = model_parts(c, 1024);
  const ModelPart all = sum_of(parts, Ends::counted), inner = sum_of(parts, Ends::left_out);
  EXPECT_EQ(all.parameters - inner.parameters, 50304 * 768);
  EXPECT_EQ(all.multiply_adds - inner.multiply_adds, 50304.0 * 768);
  EXPECT_EQ(inner.multiply_adds, 12.0 * (2 * 768 * (4 * 576 + 2304) + 1025 * 768));
  c.kind = "transformer";
  c.head = Head::untied;
  // 12 d^2 + 13 d a block.
  EXPECT_EQ(c.parameters(), 2 * 50304 * 768 + 12 * (12 * 768 * 768 + 13 * 768) + 2 * 768);
  EXPECT_EQ(c.forward_flops_per_token(1024), 2 * (12.0 * (12 * 768 * 768 + 1025 * 768) + 50304.0 * 768));
}

}  // namespace
}  // namespace tforge
