// Growing trained models: what stays the same, to the bit, and what is recorded.
#include <gtest/gtest.h>

#include "model/token_growth.h"
#include "support/tiny_run.h"

namespace tforge::test {
namespace {

/// Token counts that are multiples of no block in sight.
constexpr std::array<std::int64_t, 5> kBefore = {37, 37, 40, 37, 300};
constexpr std::array<std::int64_t, 5> kAfter = {75, 80, 40, 75, 611};  // the values of attention stay

RunConfig odd_config(const Lab& lab, DType dtype, PattentionNorm norm) {
  RunConfig config = lab.config(dtype, norm);
  config.model.tokens = kBefore;
  return config;
}

ExpandRequest request_of(const std::string& from, const std::string& to, GrowthRule rule = GrowthRule::zero_key) {
  ExpandRequest request;
  request.checkpoint = from;
  request.output = to;
  request.growth.counts = counts_of(kAfter);
  request.growth.rule = name_of(rule);
  return request;
}

/// Logits of 5 sequences of real text, 23 tokens each, by the model of a checkpoint on `mesh`.
Tensor logits_of(const Lab& lab, const std::string& checkpoint, Mesh& mesh, Allocator& allocator) {
  const CheckpointReader reader = CheckpointReader::open(checkpoint);
  const RunConfig config = parse_config(reader.config(), checkpoint).config;
  Stream stream;
  const std::unique_ptr<LanguageModel> model = make_model(allocator, stream, config.model, config.train.dtype,
                                                          *mesh.tp_comm, ShardPlan::even(config.model, mesh.tp));
  load_parameters(reader, *model);
  Tensor tokens = Tensor::empty(allocator, Shape{5 * 23}, DType::i32, Purpose::activations);
  lab.dataset().split(Split::test).copy(11, 5 * 23, tokens.span<std::int32_t>().data());
  Tape tape(allocator, stream, TapeMode::inference);
  return model->logits(tape, tokens, 5);
}

/// max |a - b| / max |b|
double change(const Tensor& a, const Tensor& b) {
  const std::vector<double> x = values_of(a), y = values_of(b);
  double difference = 0, largest = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    difference = std::max(difference, std::abs(x[i] - y[i]));
    largest = std::max(largest, std::abs(y[i]));
  }
  return difference / largest;
}

class ZeroKey : public ::testing::TestWithParam<std::tuple<DType, PattentionNorm>> {};

TEST_P(ZeroKey, KeepsTheOutputOfATrainedModel) {
  const auto [dtype, norm] = GetParam();
  const Lab lab;
  train_and_save(lab, odd_config(lab, dtype, norm), 15, lab.path("old"));
  expand_alone(request_of(lab.path("old"), lab.path("grown")));
  expand_alone(request_of(lab.path("old"), lab.path("public"), GrowthRule::public_code));

  Allocator allocator;
  Mesh self = alone();
  const Tensor before = logits_of(lab, lab.path("old"), self, allocator);
  const Tensor after = logits_of(lab, lab.path("grown"), self, allocator);
  EXPECT_EQ(values_of(after), values_of(before));  // bit for bit on one rank
  const double public_change = change(logits_of(lab, lab.path("public"), self, allocator), before);
  EXPECT_GT(public_change, 1e-2);

  Mesh all = Mesh::create(test_world(), 1, test_world().size());
  const double sharded_change =
      change(logits_of(lab, lab.path("grown"), all, allocator), logits_of(lab, lab.path("old"), all, allocator));
  EXPECT_LE(sharded_change, dtype == DType::f64 ? 1e-12 : 1e-5);
  if (test_world().rank() == 0) {
    std::printf("change of logits: zero-key 0 on one rank, %.2g on 1x%d; public rule %.2g\n", sharded_change,
                test_world().size(), public_change);
  }
}

INSTANTIATE_TEST_SUITE_P(All, ZeroKey,
                         ::testing::Combine(::testing::Values(DType::f32, DType::f64),
                                            ::testing::Values(PattentionNorm::l2_norm_gelu,
                                                              PattentionNorm::gelu_l2_norm)),
                         [](const auto& test) {
                           return fmt::format("{}_{}", name_of(std::get<0>(test.param)),
                                              name_of(std::get<1>(test.param)));
                         });

TEST(Mirror, IsExactWhenTheCountDoubles) {
  const Lab lab;
  train_and_save(lab, odd_config(lab, DType::f64, PattentionNorm::l2_norm_gelu), 15, lab.path("old"));
  Allocator allocator;
  Mesh self = alone();
  const Tensor before = logits_of(lab, lab.path("old"), self, allocator);

  ExpandRequest request = request_of(lab.path("old"), lab.path("doubled"), GrowthRule::mirror);
  std::array<std::int64_t, 5> twice = kBefore;
  for (std::int64_t& n : twice) n *= 2;
  request.growth.counts = counts_of(twice);
  expand_alone(request);
  EXPECT_LE(change(logits_of(lab, lab.path("doubled"), self, allocator), before), 1e-12);

  expand_alone(request_of(lab.path("old"), lab.path("other"), GrowthRule::mirror));
  EXPECT_GT(change(logits_of(lab, lab.path("other"), self, allocator), before), 1e-6);
}

TEST(Expand, SameParametersOnAnyNumberOfRanks) {
  const Lab lab;
  train_and_save(lab, odd_config(lab, DType::f32, PattentionNorm::l2_norm_gelu), 5, lab.path("old"));
  for (const GrowthRule rule :
       {GrowthRule::zero_key, GrowthRule::public_code, GrowthRule::random_key_zero_value, GrowthRule::mirror}) {
    const std::string name(name_of(rule));
    ExpandRequest request = request_of(lab.path("old"), lab.path("one_" + name), rule);
    request.growth.noise = rule == GrowthRule::mirror ? 0.01 : 0;
    expand_alone(request);
    request.output = lab.path("all_" + name);
    const ExpandResult result = expand_checkpoint(test_world(), request);
    for (std::size_t g = 0; g < 5; ++g) EXPECT_EQ(result.groups[g].after, kAfter[g]);
    expect_same_content(lab.path("one_" + name), lab.path("all_" + name));
  }
}

TEST(Expand, KeepsOldRowsMomentsAndAges) {
  const Lab lab;
  const RunConfig config = odd_config(lab, DType::f32, PattentionNorm::l2_norm_gelu);
  train_and_save(lab, config, 5, lab.path("old"));
  expand_alone(request_of(lab.path("old"), lab.path("grown")));
  const CheckpointReader old = CheckpointReader::open(lab.path("old")),
                         grown = CheckpointReader::open(lab.path("grown"));
  ASSERT_EQ(old.tensors().size(), grown.tensors().size());
  int grew = 0;
  for (const CheckpointReader::Tensor& t : old.tensors()) {
    const CheckpointReader::Tensor& now = grown.tensor(t.path);
    const std::int64_t rows = t.shape.rank() == 1 ? 1 : t.shape.rows(), width = t.shape.elements() / rows;
    const std::int64_t rows_now = now.shape.rank() == 1 ? 1 : now.shape.rows();
    std::vector<float> before(static_cast<std::size_t>(rows * width)),
        after(static_cast<std::size_t>(rows_now * width));
    old.read_rows(t.path, 0, rows, DType::f32, before.data());
    grown.read_rows(t.path, 0, rows_now, DType::f32, after.data());
    EXPECT_EQ(std::memcmp(before.data(), after.data(), before.size() * sizeof(float)), 0) << t.path;
    const bool moment = t.path.starts_with("optim/");
    std::vector<std::int64_t> ages = {0, 5, 0};
    if (rows_now > rows) {
      ++grew;
      ages.insert(ages.end(), {rows, 0, 1});
      double largest = 0;
      for (std::size_t i = before.size(); i < after.size(); ++i) {
        largest = std::max(largest, static_cast<double>(std::abs(after[i])));
      }
      const bool born_zero = moment || t.path.ends_with(".keys");
      EXPECT_EQ(largest == 0.0, born_zero) << t.path;
    }
    if (moment) {
      EXPECT_TRUE(now.attributes.at("age_segments") == AttributeValue(ages)) << t.path;
    }
  }
  EXPECT_EQ(grew, 2 * 4 * 2 * 3);  // layers, groups that grow, keys and values, the parameter and two moments
  EXPECT_EQ(state_value<std::int64_t>(grown.state(), "step"), 5);
  EXPECT_EQ(state_value<std::int64_t>(grown.state(), "samples"), 30);
}

TEST(Expand, RecordsEachGrowth) {
  const Lab lab;
  const RunConfig config = odd_config(lab, DType::f64, PattentionNorm::l2_norm_gelu);
  train_and_save(lab, config, 5, lab.path("old"));
  expand_alone(request_of(lab.path("old"), lab.path("grown")));
  const CheckpointReader old = CheckpointReader::open(lab.path("old"));
  const CheckpointReader grown = CheckpointReader::open(lab.path("grown"));
  const std::vector<GrowthRecord>& records = grown.growth_history();
  ASSERT_EQ(records.size(), 4U);
  EXPECT_EQ(records[3].layer_group, "ffn");
  for (const GrowthRecord& r : records) {
    EXPECT_EQ(r.stage, 1);
    EXPECT_EQ(r.step, 5);
    EXPECT_EQ(r.tokens, 5 * 6 * 32);
    EXPECT_EQ(r.rule, "zero-key");
    EXPECT_EQ(r.seed, 1U);
    EXPECT_EQ(r.scale_before, initial_scale(config.model.norm, r.tokens_before));
    EXPECT_EQ(r.scale_after, r.scale_before);
    EXPECT_EQ(r.parent_uuid, old.info().uuid);
    EXPECT_EQ(r.parent_digest, old.info().digest);
    EXPECT_EQ(r.probe_error, 0.0);
    EXPECT_EQ(r.layout, "1x1");
    EXPECT_FALSE(r.code_version.empty());
  }
  EXPECT_EQ(records[3].tokens_before, 300);
  EXPECT_EQ(records[3].tokens_after, 611);
  EXPECT_EQ(grown.info().parent_uuid, old.info().uuid);
  EXPECT_EQ(grown.info().retention, Retention::stage_end);

  // A second growth by another rule, after some training.
  on_rank_0([&] {
    const auto self = create_self();
    TinyRun run(config, lab, alone(), lab.path("grown"));
    train(run.trainer, 2);
    run.trainer.save(*self, lab.path("later"), Retention::rolling);
  });
  ExpandRequest request = request_of(lab.path("later"), lab.path("twice"), GrowthRule::public_code);
  request.growth.counts = {{"ffn", 700}};
  request.growth.noise = 0.25;
  expand_alone(request);
  const CheckpointReader twice = CheckpointReader::open(lab.path("twice"));
  ASSERT_EQ(twice.growth_history().size(), 5U);
  for (std::size_t i = 0; i < 4; ++i) EXPECT_TRUE(twice.growth_history()[i] == records[i]) << i;
  const GrowthRecord& last = twice.growth_history()[4];
  EXPECT_EQ(last.stage, 2);
  EXPECT_EQ(last.step, 7);
  EXPECT_EQ(last.layer_group, "ffn");
  EXPECT_EQ(last.rule, "public");
  EXPECT_GT(last.probe_error, 1e-3);
  EXPECT_EQ(last.scale_after, initial_scale(config.model.norm, 700));
  EXPECT_TRUE(last.extra.at("noise") == AttributeValue(0.25));
  EXPECT_TRUE(twice.tensor("optim/layers.1.ffn.values/v").attributes.at("age_segments") ==
              AttributeValue(std::vector<std::int64_t>{0, 7, 0, 300, 2, 1, 611, 0, 2}));
  EXPECT_TRUE(twice.tensor("optim/layers.1.attention.query.keys/v").attributes.at("age_segments") ==
              AttributeValue(std::vector<std::int64_t>{0, 7, 0, 37, 2, 1}));
}

TEST(Expand, Refusals) {
  const Lab lab;
  const RunConfig config = odd_config(lab, DType::f32, PattentionNorm::l2_norm_gelu);
  train_and_save(lab, config, 3, lab.path("old"));
  train_and_save(lab, odd_config(lab, DType::f32, PattentionNorm::softmax), 3, lab.path("softmax"));
  const auto refused = [&](const ExpandRequest& request, const std::string& part) {
    expect_error<UsageError>([&] { expand_checkpoint(test_world(), request); }, part);
    EXPECT_FALSE(std::filesystem::exists(lab.path("no")));
    EXPECT_FALSE(std::filesystem::exists(lab.path("no.manifest")));
  };
  ExpandRequest request = request_of(lab.path("old"), lab.path("no"));
  request.growth.counts["ffn"] = 299;
  refused(request, "has 300 ffn tokens a layer and cannot shrink to 299");
  request.growth.counts = {{"ffn", 300}};
  refused(request, "nothing grows");
  refused(request_of(lab.path("softmax"), lab.path("no")), "softmax has no exact growth rule");
  // A bound that rounding cannot meet where the shards of the grown model begin at other rows.
  if (test_world().size() > 1) {
    request = request_of(lab.path("old"), lab.path("no"));
    request.max_change = 1e-30;
    refused(request, "more than the bound 1e-30; layer ");
  }
  // The other rules run when named, and say how much they changed.
  request = request_of(lab.path("softmax"), lab.path("named"), GrowthRule::public_code);
  EXPECT_GT(expand_checkpoint(test_world(), request).probe_change, 1e-4);
}

}  // namespace
}  // namespace tforge::test
