// The Transformer on every layout of the ranks: one function, one run, what it sends and what it keeps.
#include <gtest/gtest.h>

#include "core/rng.h"
#include "support/run_checks.h"

namespace tforge::test {
namespace {

/// Four heads and a number of neurons that cannot be split evenly over 2 or 3 ranks.
RunConfig transformer(const Lab& lab, DType dtype) {
  RunConfig c = lab.config(dtype);
  c.model.kind = "transformer";
  c.model.ffn_dim = 97;
  return c;
}

TEST(Transformer, LearnsTheSameOnEveryLayout) {
  const Lab lab;
  for (const auto& [head, biases] : {std::pair{Head::tied, Biases::all}, std::pair{Head::untied, Biases::none}}) {
    RunConfig config = transformer(lab, DType::f64);
    config.model.head = head;
    config.model.biases = biases;
    train_and_save(lab, config, 10, lab.path("alone.h5"));
    for (const auto& layout : layouts()) {
      for (const std::int64_t zero : {0, 1}) {
        config.parallel.zero = zero;
        TinyRun run(config, lab, mesh_of(layout));
        const double first = run.trainer.step().loss;
        const double last = train(run.trainer, 9).back().loss;
        EXPECT_LT(last, first - 0.1) << text_of(layout);
        run.trainer.save(test_world(), lab.path("layout.h5"), Retention::rolling);
        expect_close_content(lab.path("layout.h5"), lab.path("alone.h5"), 1e-9);
      }
    }
  }
}

/// Of every parameter, along a random direction. The golden file compares the tied model with biases alone.
TEST(Transformer, GradientsAreThoseOfTheLoss) {
  const Lab lab;
  for (const auto& [head, biases] : {std::pair{Head::tied, Biases::all}, std::pair{Head::untied, Biases::none}}) {
    RunConfig config = transformer(lab, DType::f64);
    config.model.head = head;
    config.model.biases = biases;
    config.train.clip = 0;
    TinyRun run(config, lab, alone());
    train(run.trainer, 3);  // away from birth, where some gradients are 0
    LanguageModel& model = run.trainer.model();
    std::vector<std::int32_t> text(2 * 32 + 1);
    lab.dataset().split(Split::train).copy(0, 65, text.data());
    const std::span<const std::int32_t> all(text);
    const Tensor tokens = Tensor::of(run.allocator, Shape{64}, all.first(64), Purpose::activations);
    const Tensor targets = Tensor::of(run.allocator, Shape{64}, all.last(64), Purpose::activations);
    const auto loss = [&] {
      Tape tape(run.allocator, run.stream, TapeMode::inference);
      double sum = 0;
      for (const double nll : values_of(model.nll(tape, tokens, targets, 2))) sum += nll;
      return sum / 64;
    };
    model.parameters().clear_gradients();
    {
      Tape tape(run.allocator, run.stream, TapeMode::training);
      tape.backward(model.loss(tape, tokens, targets, 2, 1.0 / 64).loss);
      model.parameters().finish_gradients();
    }
    for (Parameter& p : model.parameters().all()) {
      constexpr double kStep = 1e-6;
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
      EXPECT_GT(size, 0.0) << p.path();
      move(kStep);
      const double up = loss();
      move(-2 * kStep);
      const double down = loss();
      move(kStep);
      EXPECT_NEAR(slope, (up - down) / (2 * kStep), 1e-7 * (1 + std::abs(slope))) << p.path();
    }
  }
}

TEST(Transformer, ResumesBitEqual) {
  const Lab lab;
  for (const auto& layout : layouts()) {
    for (const std::int64_t zero : {0, 1}) {
      RunConfig config = transformer(lab, DType::f32);
      config.model.head = zero == 0 ? Head::tied : Head::untied;
      config.parallel.zero = zero;
      TinyRun whole(config, lab, mesh_of(layout));
      train(whole.trainer, 3);
      whole.trainer.save(test_world(), lab.path("middle.h5"), Retention::rolling);
      train(whole.trainer, 3);
      whole.trainer.save(test_world(), lab.path("whole.h5"), Retention::rolling);
      TinyRun resumed(config, lab, mesh_of(layout), lab.path("middle.h5"));
      train(resumed.trainer, 3);
      resumed.trainer.save(test_world(), lab.path("resumed.h5"), Retention::rolling);
      expect_same_content(lab.path("whole.h5"), lab.path("resumed.h5"));
    }
  }
}

TEST(Transformer, LayoutIndependentRunsGiveTheSameBits) {
  const Lab lab;
  for (const std::int64_t zero : {0, 1}) {
    RunConfig config = independent(transformer(lab, DType::f32));
    config.model.head = zero == 0 ? Head::tied : Head::untied;
    config.parallel.zero = zero;
    if (zero == 1) config.train.saves = {Recompute::scores, SavedDType::bf16};
    train_and_save(lab, config, 5, lab.path("alone.h5"));
    for (const auto& layout : layouts()) {
      TinyRun run(config, lab, mesh_of(layout));
      train(run.trainer, 5);
      run.trainer.save(test_world(), lab.path("layout.h5"), Retention::rolling);
      expect_same_content(lab.path("alone.h5"), lab.path("layout.h5"));
    }
  }
}

TEST(Transformer, RecomputesTheSameBits) {
  const Lab lab;
  for (const auto& layout : layouts()) {
    RunConfig config = transformer(lab, DType::f32);
    config.train.micro_batch = 2;
    TinyRun kept(config, lab, mesh_of(layout));
    const double want = train(kept.trainer, 3).back().loss;
    for (const Recompute recompute : {Recompute::scores, Recompute::block}) {
      config.train.saves.recompute = recompute;
      TinyRun run(config, lab, mesh_of(layout));
      EXPECT_EQ(train(run.trainer, 3).back().loss, want) << text_of(layout) << " " << static_cast<int>(recompute);
    }
    config.train.saves = {Recompute::none, SavedDType::bf16};
    TinyRun rounded(config, lab, mesh_of(layout));
    EXPECT_LT(relative(train(rounded.trainer, 3).back().loss, want), 1e-2) << text_of(layout);
  }
}

TEST(Transformer, SendsWhatTheFormulasSay) {
  const Lab lab;
  for (const auto& layout : layouts()) {
    for (const Recompute recompute : {Recompute::none, Recompute::block}) {
      for (const Head head : {Head::tied, Head::untied}) {
        RunConfig config = transformer(lab, DType::f32);
        if (head == Head::untied) config = independent(config);
        config.model.head = head;
        config.train.saves.recompute = recompute;
        config.train.micro_batch = 2;
        TinyRun run(config, lab, mesh_of(layout));
        expect_traffic_of_formula(run, config, text_of(layout));
      }
    }
  }
}

TEST(Transformer, TakesWhatIsRehearsed) {
  const Lab lab;
  for (const auto& [recompute, dtype, mode] : std::vector<std::tuple<Recompute, SavedDType, Determinism>>{
           {Recompute::none, SavedDType::same, Determinism::same_layout},
           {Recompute::scores, SavedDType::same, Determinism::same_layout},
           {Recompute::block, SavedDType::same, Determinism::same_layout},
           {Recompute::none, SavedDType::bf16, Determinism::same_layout},
           {Recompute::scores, SavedDType::bf16, Determinism::same_layout},
           {Recompute::block, SavedDType::bf16, Determinism::same_layout},
           {Recompute::none, SavedDType::same, Determinism::layout_independent},
           {Recompute::block, SavedDType::same, Determinism::layout_independent}}) {
    RunConfig config = transformer(lab, DType::f32);
    if (mode == Determinism::layout_independent) config = independent(config);
    config.model.layers = 4;
    config.model.dim = 96;
    config.model.max_seq = 64;
    config.model.ffn_dim = 256;
    config.train.batch = 4;
    config.parallel.virtual_dp = 1;
    config.train.saves = {recompute, dtype};
    expect_rehearsed(lab, config, {1, test_world().size()}, "transformer");
  }
}

TEST(Transformer, CountsItsParameters) {
  const Lab lab;
  RunConfig config = transformer(lab, DType::f32);
  for (const Head head : {Head::tied, Head::untied}) {
    for (const Biases biases : {Biases::all, Biases::none}) {
      config.model.head = head;
      config.model.biases = biases;
      std::int64_t held = 0;
      for (const ParameterSpec& spec : parameter_specs(config.model, ShardPlan::even(config.model, 1))) {
        held += spec.shape.elements();
      }
      EXPECT_EQ(config.model.parameters(), held);
    }
  }
  // GPT-2 small without its positions: 124,439,808 - 1024 * 768.
  ModelConfig gpt2;
  gpt2.kind = "transformer";
  gpt2.layers = 12;
  gpt2.dim = 768;
  gpt2.heads = 12;
  gpt2.vocab = 50257;
  EXPECT_EQ(gpt2.parameters(), 124439808 - 1024 * 768);
}

}  // namespace
}  // namespace tforge::test
