// Growing trained Transformers: what stays the same, what does not, what is recorded.
#include <gtest/gtest.h>

#include "model/transformer_growth.h"
#include "support/tiny_run.h"

namespace tforge::test {
namespace {

using Counts = std::map<std::string, std::int64_t>;

RunConfig transformer(const Lab& lab, DType dtype, Head head = Head::tied, Biases biases = Biases::all) {
  RunConfig config = lab.config(dtype);
  config.model.kind = "transformer";
  config.model.ffn_dim = 97;
  config.model.head = head;
  config.model.biases = biases;
  return config;
}

ExpandRequest request_of(const Lab& lab, const std::string& to, const Counts& counts, double noise = 0) {
  ExpandRequest request;
  request.checkpoint = lab.path("old");
  request.output = lab.path(to);
  request.growth.counts = counts;
  request.growth.noise = noise;
  return request;
}

/// Logits of 5 sequences of real text, 23 tokens each, by the model of a checkpoint on this rank alone.
std::vector<double> logits_of(const Lab& lab, const std::string& name) {
  const CheckpointReader reader = CheckpointReader::open(lab.path(name));
  const RunConfig config = parse_config(reader.config(), name).config;
  Allocator allocator;
  Stream stream;
  Mesh mesh = alone();
  const std::unique_ptr<LanguageModel> model =
      make_model(allocator, stream, config.model, config.train.dtype, *mesh.tp_comm, ShardPlan::even(config.model, 1));
  load_parameters(reader, *model);
  Tensor tokens = Tensor::empty(allocator, Shape{5 * 23}, DType::i32, Purpose::activations);
  lab.dataset().split(Split::test).copy(11, 5 * 23, tokens.span<std::int32_t>().data());
  Tape tape(allocator, stream, TapeMode::inference);
  return values_of(model->logits(tape, tokens, 5));
}

/// max |a - b| / max |b|
double change(const std::vector<double>& a, const std::vector<double>& b) {
  double difference = 0, largest = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    difference = std::max(difference, std::abs(a[i] - b[i]));
    largest = std::max(largest, std::abs(b[i]));
  }
  return difference / largest;
}

TEST(GrownTransformer, KeepsTheOutputOfATrainedModel) {
  const Lab lab;
  int files = 0;
  for (const auto& [dtype, head, biases] :
       {std::tuple{DType::f64, Head::tied, Biases::all}, std::tuple{DType::f64, Head::untied, Biases::none},
        std::tuple{DType::f32, Head::tied, Biases::all}}) {
    const std::string old = fmt::format("old{}", files++);
    train_and_save(lab, transformer(lab, dtype, head, biases), 15, lab.path(old));
    const std::vector<double> before = logits_of(lab, old);
    const auto after = [&](const Counts& counts, double noise) {
      const std::string grown = fmt::format("grown{}", files++);
      ExpandRequest request = request_of(lab, grown, counts, noise);
      request.checkpoint = lab.path(old);
      expand_alone(request);
      return logits_of(lab, grown);
    };
    const double bound = dtype == DType::f64 ? 1e-13 : 2e-6;
    EXPECT_LE(change(after({{"dim", 64}, {"ffn_dim", 194}}, 0), before), bound);
    EXPECT_LE(change(after({{"dim", 96}}, 0.5), before), bound);
    // 97 neurons into 150 and 251: some are there twice, others once or three times.
    EXPECT_LE(change(after({{"ffn_dim", 150}}, 0), before), bound);
    EXPECT_LE(change(after({{"dim", 64}, {"ffn_dim", 251}, {"layers", 3}}, 0.5), before), bound);
    EXPECT_EQ(after({{"layers", 5}}, 0), before);  // not a bit
  }
}

/// Linformer's projections are copied with their heads; random features are the same for all heads.
TEST(GrownTransformer, KeepsTheOutputWithAnyAttention) {
  const Lab lab;
  for (const AttentionKind kind : kAttentionKinds) {
    for (const char* model : {"transformer", "tokenformer"}) {
      RunConfig config = transformer(lab, DType::f64);
      config.model.kind = model;
      config.model.rotary_fraction = 0;
      config.model.attention.kind = kind;
      config.model.attention.block = 8;
      config.model.attention.slots = 3;
      const std::string old = fmt::format("old {} {}", name_of(kind), model), grown = old + " grown";
      train_and_save(lab, config, 10, lab.path(old));
      const Counts counts =
          config.model.kind == "transformer" ? Counts{{"dim", 64}, {"layers", 3}} : Counts{{"query", 40}, {"ffn", 120}};
      ExpandRequest request = request_of(lab, grown, counts);
      request.checkpoint = lab.path(old);
      expand_alone(request);
      EXPECT_LE(change(logits_of(lab, grown), logits_of(lab, old)), 1e-12) << old;
      TinyRun run(config, lab, mesh_of(layouts().back()), lab.path(grown));
      EXPECT_EQ(run.trainer.step().update, Update::applied) << old;
    }
  }
}

TEST(GrownTransformer, AnotherFactorChangesTheFunctionAndSaysByHowMuch) {
  const Lab lab;
  train_and_save(lab, transformer(lab, DType::f64), 15, lab.path("old"));
  const ExpandResult result = expand_checkpoint(test_world(), request_of(lab, "grown", {{"dim", 40}}));
  EXPECT_GT(result.probe_change, 1e-3);
  EXPECT_TRUE(std::isinf(result.max_change));
  EXPECT_GT(change(logits_of(lab, "grown"), logits_of(lab, "old")), 1e-3);
  const CheckpointReader grown = CheckpointReader::open(lab.path("grown"));
  ASSERT_EQ(grown.growth_history().size(), 1U);
  EXPECT_EQ(grown.growth_history()[0].probe_error, result.probe_change);
  EXPECT_EQ(parse_config(grown.config(), "grown").config.model.heads, 5);
}

TEST(GrownTransformer, SameParametersOnAnyNumberOfRanks) {
  const Lab lab;
  train_and_save(lab, transformer(lab, DType::f32), 5, lab.path("old"));
  const Counts counts = {{"dim", 64}, {"ffn_dim", 200}, {"layers", 3}};
  expand_alone(request_of(lab, "one", counts, 0.1));
  expand_checkpoint(test_world(), request_of(lab, "all", counts, 0.1));
  expect_same_content(lab.path("one"), lab.path("all"));
}

/// The moments of the grown model after one more step are those that the old model has after it: every gradient of a
/// copy is the part of the old gradient that the moments were divided by.
TEST(GrownTransformer, MomentsAreThoseOfTheCopiesGradients) {
  const Lab lab;
  for (const Head head : {Head::tied, Head::untied}) {
    RunConfig config = transformer(lab, DType::f64, head);
    config.train.clip = 0;  // the norms of the gradients differ
    const std::string old_name = fmt::format("old{}", static_cast<int>(head)), grown_name = old_name + "grown";
    train_and_save(lab, config, 5, lab.path(old_name));
    ExpandRequest request = request_of(lab, grown_name, {{"dim", 64}, {"ffn_dim", 194}});
    request.checkpoint = lab.path(old_name);
    expand_alone(request);
    const std::unique_ptr<Growth> growth = transformer_growth(config.model, request.growth);
    TinyRun old(config, lab, alone(), lab.path(old_name)), grown(config, lab, alone(), lab.path(grown_name));
    old.trainer.step();
    grown.trainer.step();
    std::size_t i = 0;
    for (const Parameter& p : grown.trainer.model().parameters().all()) {
      const AdamW::State &was = old.trainer.optimizer().state(i), &now = grown.trainer.optimizer().state(i);
      ++i;
      for (const Moment moment : {Moment::first, Moment::second}) {
        const Tensor& before = moment == Moment::first ? was.m : was.v;
        const std::int64_t rows = before.shape()[0];
        Tensor want = Tensor::empty(grown.allocator, Shape{rows, p.columns()}, DType::f64, Purpose::moments);
        growth->fill_moment(moment, p.spec, as_matrix(before.view()), 0, want.view());
        const std::vector<double> got = rows_of(moment == Moment::first ? now.m : now.v, 0, rows);
        EXPECT_LT(change(got, values_of(want)), 1e-9) << p.path();
      }
    }
  }
}

TEST(GrownTransformer, RecordsEachGrowthAndKeepsAges) {
  const Lab lab;
  train_and_save(lab, transformer(lab, DType::f32), 5, lab.path("old"));
  expand_alone(request_of(lab, "grown", {{"dim", 64}, {"layers", 3}}, 0.25));
  const CheckpointReader old = CheckpointReader::open(lab.path("old")),
                         grown = CheckpointReader::open(lab.path("grown"));
  const std::vector<GrowthRecord>& records = grown.growth_history();
  ASSERT_EQ(records.size(), 2U);
  EXPECT_EQ(records[0].layer_group, "dim");
  EXPECT_EQ(records[0].rule, "net2net");
  EXPECT_EQ(records[0].tokens_before, 32);
  EXPECT_EQ(records[0].tokens_after, 64);
  EXPECT_EQ(records[1].layer_group, "layers");
  EXPECT_EQ(records[1].rule, "identity");
  EXPECT_EQ(records[1].tokens_after, 3);
  for (const GrowthRecord& record : records) {
    EXPECT_EQ(record.stage, 1);
    EXPECT_EQ(record.step, 5);
    EXPECT_EQ(record.parent_uuid, old.info().uuid);
    EXPECT_LT(record.probe_error, 1e-5);
    EXPECT_TRUE(record.extra.at("noise") == AttributeValue(0.25));
  }
  const ModelConfig model = parse_config(grown.config(), "grown").config.model;
  EXPECT_EQ(model.heads, 8);
  EXPECT_EQ(model.neurons(), 97);  // not named: they stay
  const auto ages = [&](const char* parameter) {
    return std::get<std::vector<std::int64_t>>(
        grown.tensor(std::string("optim/") + parameter + "/m").attributes.at("age_segments"));
  };
  using Ages = std::vector<std::int64_t>;
  EXPECT_EQ(ages("embedding"), (Ages{0, 5, 0}));  // wider, no more rows
  EXPECT_EQ(ages("layers.1.attention.query.weight"), (Ages{0, 5, 0, 32, 0, 1}));
  EXPECT_EQ(ages("layers.1.ffn.norm.bias"), (Ages{0, 5, 0, 32, 0, 1}));
  EXPECT_EQ(ages("layers.1.ffn.in.weight"), (Ages{0, 5, 0}));
  EXPECT_EQ(ages("layers.2.ffn.in.weight"), (Ages{0, 0, 1}));
}

TEST(GrownTransformer, TrainsOnTheSameOnEveryLayout) {
  const Lab lab;
  RunConfig config = transformer(lab, DType::f64);
  train_and_save(lab, config, 10, lab.path("old"));
  expand_alone(request_of(lab, "grown", {{"dim", 48}, {"ffn_dim", 120}, {"layers", 3}}, 0.1));
  config.train.growth.new_rows_warmup_steps = 3;
  TinyRun reference(config, lab, alone(), lab.path("grown"));
  const std::vector<StepResult> want = train(reference.trainer, 6);
  EXPECT_LT(want.back().loss, want.front().loss);
  for (const auto& layout : layouts()) {
    TinyRun run(config, lab, mesh_of(layout), lab.path("grown"));
    const std::vector<StepResult> got = train(run.trainer, 6);
    for (std::size_t i = 0; i < want.size(); ++i) EXPECT_LT(relative(got[i].loss, want[i].loss), 1e-10) << i;
  }
}

TEST(GrownTransformer, Refusals) {
  const Lab lab;
  train_and_save(lab, transformer(lab, DType::f32), 2, lab.path("old"));
  const auto refused = [&](const ExpandRequest& request, const std::string& part) {
    expect_error<UsageError>([&] { expand_checkpoint(test_world(), request); }, part);
    EXPECT_FALSE(std::filesystem::exists(lab.path("no")));
  };
  refused(request_of(lab, "no", {{"dim", 24}}), "has 32 dim columns and cannot shrink to 24");
  refused(request_of(lab, "no", {{"layers", 2}}), "nothing grows");
  refused(request_of(lab, "no", {{"dim", 36}}), "dim = 36 is no multiple of the 8 dimensions of a head");
  refused(request_of(lab, "no", {{"ffn", 200}}), "'ffn' is nothing that a transformer grows by");
  refused(request_of(lab, "no", {{"dim", 64}}, -1), "noise on old weights is -1");
  ExpandRequest request = request_of(lab, "no", {{"dim", 64}});
  request.growth.rule = "zero-key";
  refused(request, "'zero-key' is no growth rule of a transformer; there is net2net");
  request.growth.rule.clear();
  request.max_change = 1e-30;
  refused(request, "net2net growth changed the probe's logits");
}

}  // namespace
}  // namespace tforge::test
