// Training that keeps less for backward: the same bits when it computes again, close when it rounds.
#include <gtest/gtest.h>

#include "support/tiny_run.h"

namespace tforge::test {
namespace {

constexpr PattentionNorm kNorms[] = {PattentionNorm::l2_norm_gelu, PattentionNorm::gelu_l2_norm,
                                     PattentionNorm::softmax};

void expect_same_bits(const ParameterSet& a, const ParameterSet& b, const std::string& what) {
  for (std::size_t i = 0; i < a.all().size(); ++i) {
    const Parameter &x = a.all()[i], &y = b.all()[i];
    EXPECT_EQ(values_of(x.gradient), values_of(y.gradient)) << what << ", gradient of " << x.path();
    EXPECT_EQ(values_of(x.value()), values_of(y.value())) << what << ", " << x.path();
  }
}

TEST(Recompute, GivesTheSameBitsOnEveryLayout) {
  const Lab lab;
  for (const PattentionNorm norm : kNorms) {
    for (const auto& layout : layouts()) {
      RunConfig config = lab.config(DType::f32, norm);
      config.train.micro_batch = 2;  // gradients accumulate, in the last micro-batch over fewer sequences
      config.train.batch = 7;
      TinyRun plain(config, lab, mesh_of(layout));
      const std::vector<StepResult> want = train(plain.trainer, 3);
      // The keys of a layer vanish: each row of it is floored, and counted once however often it is computed.
      const auto break_a_layer = [](TinyRun& run) {
        Tensor keys = run.trainer.model().parameters().find("layers.1.ffn.keys").value();
        keys.fill_zero();
        return run.trainer.step().floored_rows;
      };
      for (const Recompute recompute : {Recompute::scores, Recompute::block}) {
        config.train.saves.recompute = recompute;
        TinyRun run(config, lab, mesh_of(layout));
        const std::vector<StepResult> got = train(run.trainer, 3);
        const std::string what = fmt::format("{} {} {}", text_of(layout), name_of(norm), static_cast<int>(recompute));
        for (std::size_t i = 0; i < got.size(); ++i) {
          EXPECT_EQ(got[i].loss, want[i].loss) << what;
          EXPECT_EQ(got[i].grad_norm, want[i].grad_norm) << what;
        }
        expect_same_bits(run.trainer.model().parameters(), plain.trainer.model().parameters(), what);
        if (recompute == Recompute::block && norm != PattentionNorm::softmax) {
          TinyRun other(config, lab, mesh_of(layout));
          train(other.trainer, 3);
          const std::int64_t floored = break_a_layer(other);
          EXPECT_GT(floored, 0) << what;
          config.train.saves.recompute = Recompute::none;
          TinyRun same(config, lab, mesh_of(layout));
          train(same.trainer, 3);
          EXPECT_EQ(floored, break_a_layer(same)) << what;
        }
      }
    }
  }
}

/// Bytes that this rank hands to tensor-parallel collectives in a step, and in the blocks of a forward pass.
TEST(Recompute, RepeatsTheCollectivesOfABlocksForward) {
  const Lab lab;
  const int ranks = test_world().size();
  if (ranks == 1) GTEST_SKIP() << "no collectives";
  for (const PattentionNorm norm : kNorms) {
    RunConfig config = lab.config(DType::f32, norm);
    std::vector<std::uint64_t> step;
    std::uint64_t blocks = 0;
    for (const Recompute recompute : {Recompute::none, Recompute::scores, Recompute::block}) {
      config.train.saves.recompute = recompute;
      TinyRun run(config, lab, mesh_of({1, ranks}));
      auto sent = [&, before = run.mesh.tp_comm->traffic().bytes]() mutable {
        const std::uint64_t now = run.mesh.tp_comm->traffic().bytes;
        return now - std::exchange(before, now);
      };
      run.trainer.step();
      step.push_back(sent());
      Tape tape(run.allocator, run.stream, TapeMode::inference);
      const Tensor tokens =
          Tensor::zeros(run.allocator, Shape{config.train.batch * config.seq()}, DType::i32, Purpose::activations);
      run.trainer.model().hidden(tape, tokens, config.train.batch);
      const auto width = static_cast<std::uint64_t>(config.model.dim);
      blocks = sent() - static_cast<std::uint64_t>(tokens.elements()) * width * sizeof(float);  // less the embedding's
    }
    EXPECT_GT(blocks, 0U);
    EXPECT_EQ(step[1], step[0]) << name_of(norm);
    EXPECT_EQ(step[2], step[0] + blocks) << name_of(norm);
  }
}

TEST(SavedAsBf16, TrainsAlmostAlike) {
  const Lab lab;
  for (const PattentionNorm norm : kNorms) {
    RunConfig config = lab.config(DType::f32, norm);
    for (const auto& layout : layouts()) {
      config.train.saves = {};
      TinyRun plain(config, lab, mesh_of(layout));
      const std::vector<StepResult> want = train(plain.trainer, 10);
      for (const Recompute recompute : {Recompute::none, Recompute::block}) {
        config.train.saves = {recompute, SavedDType::bf16};
        TinyRun run(config, lab, mesh_of(layout));
        const std::vector<StepResult> got = train(run.trainer, 10);
        EXPECT_EQ(got[0].loss, want[0].loss) << "forward does not round";
        EXPECT_NE(got[0].grad_norm, want[0].grad_norm);
        EXPECT_LE(relative(got[0].grad_norm, want[0].grad_norm), 1e-3) << text_of(layout) << " " << name_of(norm);
        EXPECT_LE(relative(got[9].loss, want[9].loss), 1e-3) << text_of(layout) << " " << name_of(norm);
      }
    }
  }
}

}  // namespace
}  // namespace tforge::test
