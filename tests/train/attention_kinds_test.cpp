// Models with each kind of attention: causal, the same run on every layout, resumed, recomputed, generated from, within
// the memory of the formula.
#include <gtest/gtest.h>

#include "core/rng.h"
#include "model/attention.h"
#include "model/generator.h"
#include "support/run_checks.h"

namespace tforge::test {
namespace {

constexpr std::array kOthers = {AttentionKind::linformer, AttentionKind::performer, AttentionKind::cosformer};

/// A Transformer of sequences of 80: two chunks of sums, and ten blocks of linformer's.
RunConfig config_of(const Lab& lab, AttentionKind kind, DType dtype, const std::string& model = "transformer") {
  RunConfig c = lab.config(dtype);
  c.model.kind = model;
  c.model.max_seq = 80;
  c.model.ffn_dim = 97;
  c.model.attention.kind = kind;
  c.model.attention.block = 8;
  c.model.attention.slots = 3;
  c.model.rotary_fraction = kind == AttentionKind::cosformer ? 0 : 0.5;
  if (model == "memoryformer") c.model.hash_bits = {4, 4, 4};
  c.train.batch = 4;
  return c;
}

TEST(AttentionKinds, LearnTheSameOnEveryLayout) {
  const Lab lab;
  for (const AttentionKind kind : kOthers) {
    for (const char* model : {"transformer", "tokenformer", "memoryformer"}) {
      RunConfig config = config_of(lab, kind, DType::f64, model);
      train_and_save(lab, config, 4, lab.path("alone.h5"));
      for (const auto& layout : config.model.kind == "transformer" ? layouts() : std::vector{layouts().back()}) {
        const std::string what = fmt::format("{} {} on {}", name_of(kind), model, text_of(layout));
        config.parallel.zero = layout.first > 1 ? 1 : 0;
        TinyRun run(config, lab, mesh_of(layout));
        const double first = run.trainer.step().loss;
        EXPECT_LT(train(run.trainer, 3).back().loss, first) << what;
        run.trainer.save(test_world(), lab.path("layout.h5"), Retention::rolling);
        expect_close_content(lab.path("layout.h5"), lab.path("alone.h5"), 1e-8);
        if (testing::Test::HasFatalFailure()) FAIL() << what;
      }
    }
  }
}

TEST(AttentionKinds, TheFutureDoesNotTouchThePast) {
  const Lab lab;
  for (const AttentionKind kind : kAttentionKinds) {
    for (const char* model : {"transformer", "tokenformer", "memoryformer"}) {
      const RunConfig config = config_of(lab, kind, DType::f32, model);
      TinyRun run(config, lab, mesh_of(layouts().back()));
      train(run.trainer, 2);
      std::vector<std::int32_t> text(80);
      lab.dataset().split(Split::test).copy(3, 80, text.data());
      Tape tape(run.allocator, run.stream, TapeMode::inference);
      const auto logits = [&] {
        return values_of(run.trainer.model().logits(
            tape, Tensor::of<std::int32_t>(run.allocator, Shape{80}, text, Purpose::activations), 1));
      };
      const std::vector<double> before = logits();
      for (const std::size_t cut : {70U, 64U, 41U, 7U}) {
        for (std::size_t t = cut; t < text.size(); ++t) text[t] = (text[t] + 1 + static_cast<std::int32_t>(cut)) % 256;
        const std::vector<double> after = logits();
        for (std::size_t t = 0; t < text.size(); ++t) {
          bool same = true;
          for (std::size_t w = 0; w < 256; ++w) same = same && before[t * 256 + w] == after[t * 256 + w];
          ASSERT_EQ(same, t < cut) << name_of(kind) << " " << model << ": position " << t << ", changed from " << cut;
        }
      }
    }
  }
}

/// Of what the kinds put into the loss, linformer's projections among it. The op of each has its own check.
TEST(AttentionKinds, GradientsAreThoseOfTheLoss) {
  const Lab lab;
  for (const AttentionKind kind : kOthers) {
    RunConfig config = config_of(lab, kind, DType::f64);
    TinyRun run(config, lab, alone());
    train(run.trainer, 2);
    LanguageModel& model = run.trainer.model();
    std::vector<std::int32_t> text(161);
    lab.dataset().split(Split::train).copy(0, 161, text.data());
    const std::span<const std::int32_t> all(text);
    const Tensor tokens = Tensor::of(run.allocator, Shape{160}, all.first(160), Purpose::activations);
    const Tensor targets = Tensor::of(run.allocator, Shape{160}, all.last(160), Purpose::activations);
    const auto loss = [&] {
      Tape tape(run.allocator, run.stream, TapeMode::inference);
      double sum = 0;
      for (const double nll : values_of(model.nll(tape, tokens, targets, 2))) sum += nll;
      return sum / 160;
    };
    model.parameters().clear_gradients();
    {
      Tape tape(run.allocator, run.stream, TapeMode::training);
      tape.backward(model.loss(tape, tokens, targets, 2, 1.0 / 160).loss);
      model.parameters().finish_gradients();
    }
    for (Parameter& p : model.parameters().all()) {
      if (p.path().find("attention") == std::string::npos) continue;
      // Where a relu of cosFormer turns within the step, differences are wrong by what it turns by: 3e-4 at 1e-6.
      const double step = kind == AttentionKind::cosformer ? 1e-7 : 1e-6;
      const Rng rng(1, p.path());
      const auto values = p.value().span<double>();
      const auto move = [&](double by) {
        for (std::size_t i = 0; i < values.size(); ++i) values[i] += by * rng.normal(i);
      };
      double slope = 0, size = 0;
      const auto gradient = p.gradient.span<double>();
      for (std::size_t i = 0; i < gradient.size(); ++i) {
        slope += gradient[i] * rng.normal(i);
        size += gradient[i] * gradient[i];
      }
      EXPECT_GT(size, 0.0) << name_of(kind) << " " << p.path();
      move(step);
      const double up = loss();
      move(-2 * step);
      const double down = loss();
      move(step);
      EXPECT_NEAR(slope, (up - down) / (2 * step), 1e-7 * (1 + std::abs(slope))) << name_of(kind) << " " << p.path();
    }
  }
}

TEST(AttentionKinds, ResumeBitEqual) {
  const Lab lab;
  for (const AttentionKind kind : kOthers) {
    const RunConfig config = config_of(lab, kind, DType::f32);
    for (const auto& layout : layouts()) {
      TinyRun whole(config, lab, mesh_of(layout));
      train(whole.trainer, 2);
      whole.trainer.save(test_world(), lab.path("middle.h5"), Retention::rolling);
      train(whole.trainer, 2);
      whole.trainer.save(test_world(), lab.path("whole.h5"), Retention::rolling);
      TinyRun resumed(config, lab, mesh_of(layout), lab.path("middle.h5"));
      train(resumed.trainer, 2);
      resumed.trainer.save(test_world(), lab.path("resumed.h5"), Retention::rolling);
      expect_same_content(lab.path("whole.h5"), lab.path("resumed.h5"));
    }
  }
}

TEST(AttentionKinds, RecomputeTheSameBits) {
  const Lab lab;
  for (const AttentionKind kind : kOthers) {
    RunConfig config = config_of(lab, kind, DType::f32);
    config.train.micro_batch = 2;
    TinyRun kept(config, lab, mesh_of(layouts().back()));
    const double want = train(kept.trainer, 3).back().loss;
    for (const Recompute recompute : {Recompute::scores, Recompute::block}) {
      config.train.saves.recompute = recompute;
      TinyRun run(config, lab, mesh_of(layouts().back()));
      EXPECT_EQ(train(run.trainer, 3).back().loss, want) << name_of(kind) << " " << static_cast<int>(recompute);
    }
    config.train.saves = {Recompute::none, SavedDType::bf16};
    TinyRun rounded(config, lab, mesh_of(layouts().back()));
    EXPECT_LT(relative(train(rounded.trainer, 3).back().loss, want), 1e-2) << name_of(kind);
  }
}

TEST(AttentionKinds, LayoutIndependent) {
  const Lab lab;
  for (const auto& [kind, model] :
       {std::pair{AttentionKind::performer, "tokenformer"}, std::pair{AttentionKind::cosformer, "transformer"},
        std::pair{AttentionKind::linformer, "tokenformer"}, std::pair{AttentionKind::linformer, "transformer"}}) {
    RunConfig config = config_of(lab, kind, DType::f32, model);
    config = independent(config);
    train_and_save(lab, config, 3, lab.path("alone.h5"));
    for (const auto& layout : layouts()) {
      TinyRun run(config, lab, mesh_of(layout));
      train(run.trainer, 3);
      run.trainer.save(test_world(), lab.path("layout.h5"), Retention::rolling);
      expect_same_content(lab.path("alone.h5"), lab.path("layout.h5"));
    }
  }
}

TEST(AttentionKinds, SendWhatTheFormulasSay) {
  const Lab lab;
  for (const AttentionKind kind : kOthers) {
    for (const auto& layout : layouts()) {
      const RunConfig config = config_of(lab, kind, DType::f32, "tokenformer");
      TinyRun run(config, lab, mesh_of(layout));
      expect_traffic_of_formula(run, config, fmt::format("{} {}", name_of(kind), text_of(layout)));
    }
  }
}

TEST(AttentionKinds, TakeWhatIsRehearsed) {
  const Lab lab;
  for (const AttentionKind kind : kOthers) {
    for (const SavePolicy& saves : {SavePolicy{}, SavePolicy{Recompute::block, SavedDType::same},
                                    SavePolicy{Recompute::none, SavedDType::bf16}}) {
      RunConfig config = config_of(lab, kind, DType::f32);
      config.model.dim = 96;
      config.model.layers = 3;
      config.model.ffn_dim = 256;
      config.model.max_seq = 256;
      config.train.saves = saves;
      for (const auto& layout : layouts()) expect_rehearsed(lab, config, layout, std::string(name_of(kind)));
    }
  }
}

TEST(AttentionKinds, GenerateFromWhatTheyKeep) {
  const Lab lab;
  for (const AttentionKind kind : kOthers) {
    const RunConfig config = config_of(lab, kind, DType::f64);
    train_and_save(lab, config, 10, lab.path("model"));
    TinyRun run(config, lab, mesh_of(layouts().back()), lab.path("model"));
    TinyRun reference(config, lab, alone(), lab.path("model"));
    LanguageModel& model = run.trainer.model();
    Tape tape(run.allocator, run.stream, TapeMode::inference);
    std::vector<std::int32_t> text(160);
    lab.dataset().split(Split::test).copy(3, 160, text.data());
    const auto columns = [&](std::size_t first, std::size_t count) {
      std::vector<std::int32_t> part;
      for (const std::size_t sequence : {0U, 1U}) {
        const auto at = text.begin() + static_cast<std::ptrdiff_t>(80 * sequence + first);
        part.insert(part.end(), at, at + static_cast<std::ptrdiff_t>(count));
      }
      return Tensor::of<std::int32_t>(run.allocator, Shape{static_cast<std::int64_t>(part.size())}, part,
                                      Purpose::activations);
    };
    const std::vector<double> all = values_of(model.logits(tape, columns(0, 80), 2));
    KvCache cache = model.make_cache(2, 80);
    std::size_t seen = 0;
    for (const std::size_t count : {4U, 1U, 12U, 45U, 1U, 1U, 1U, 7U, 8U}) {
      const std::vector<double> last = values_of(model.extend(tape, columns(seen, count), cache));
      seen += count;
      for (std::size_t b = 0; b < 2; ++b) {
        for (std::size_t w = 0; w < 256; ++w) {
          ASSERT_NEAR(last[b * 256 + w], all[(b * 80 + seen - 1) * 256 + w], 1e-12) << name_of(kind) << " at " << seen;
        }
      }
    }
    EXPECT_EQ(cache.length(), 80);
    GenerateOptions options;
    options.sampling.seed = 5;
    options.tokens = 110;  // slides past the trained length
    options.samples = 2;
    options.past_end = PastEnd::slide;
    const std::vector<std::int32_t> prompt(text.begin(), text.begin() + 6);
    const auto cached = generate(model, run.allocator, run.stream, prompt, options);
    EXPECT_EQ(cached, generate(reference.trainer.model(), reference.allocator, reference.stream, prompt, options));
    options.cache = CacheUse::recomputed;
    EXPECT_EQ(cached, generate(model, run.allocator, run.stream, prompt, options)) << name_of(kind);
  }
}

/// What a state holds does not depend on the length that it was made for; keys and values, and slots, do.
TEST(AttentionKinds, StatesOfConstantSize) {
  const Lab lab;
  const auto bytes = [&](AttentionKind kind, std::int64_t capacity) {
    TinyRun run(config_of(lab, kind, DType::f32), lab, alone());
    const auto in_use = [&] { return run.allocator.report().in_use[static_cast<std::size_t>(Purpose::activations)]; };
    const std::size_t before = in_use();
    const KvCache cache = run.trainer.model().make_cache(1, capacity);
    return in_use() - before;
  };
  for (const AttentionKind kind : {AttentionKind::performer, AttentionKind::cosformer}) {
    EXPECT_EQ(bytes(kind, 8), bytes(kind, 80)) << name_of(kind);
  }
  EXPECT_LT(bytes(AttentionKind::linformer, 80), bytes(AttentionKind::softmax, 80) / 2);
}

TEST(AttentionKinds, CountTheirParametersAndMultiplyAdds) {
  const Lab lab;
  for (const AttentionKind kind : kAttentionKinds) {
    for (const char* model : {"transformer", "tokenformer", "memoryformer"}) {
      const RunConfig config = config_of(lab, kind, DType::f32, model);
      std::int64_t held = 0;
      for (const ParameterSpec& spec : parameter_specs(config.model, ShardPlan::even(config.model, 1))) {
        held += spec.shape.elements();
      }
      EXPECT_EQ(config.model.parameters(), held) << name_of(kind) << " " << model;
    }
  }
  // By hand, pair by pair, for 4 heads of 8 and sequences of 150.
  ModelConfig m = config_of(lab, AttentionKind::performer, DType::f32).model;
  m.attention.features = 10;
  double chunks = 0, blocks = 0;
  for (std::int64_t i = 0; i < 150; ++i) {
    chunks += 4 * (2 * 8 * 10 + static_cast<double>(i % 64 + 1) * (10 + 8));
    if (i >= 64) chunks += 4 * 8 * 10;  // the query with the sums
    if (i < 128) chunks += 4 * 8 * 10;  // key and value into them
    blocks += 4 * 2 * 8 * static_cast<double>(i % 8 + 1 + i / 8 * 3);
    if (i < 144) blocks += 4 * 2 * 8 * 3;  // into the slots
  }
  EXPECT_NEAR(attention_multiply_adds(m, 150), chunks / 150, 1e-9);
  m.attention.kind = AttentionKind::linformer;
  EXPECT_NEAR(attention_multiply_adds(m, 150), blocks / 150, 1e-9);
  m.attention.kind = AttentionKind::softmax;
  EXPECT_EQ(attention_multiply_adds(m, 150), 151 * 32);
}

}  // namespace
}  // namespace tforge::test
