// Training on a CUDA device beside the CPU: losses, checkpoints from one to the other, memory of the steady state.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "model/generator.h"
#include "parallel/device_world.h"
#include "support/nccl.h"
#include "support/run_checks.h"
#include "train/workplace.h"

namespace tforge {
namespace {

using test::Lab;

/// A trainer on a device, new or from a checkpoint.
struct PlacedRun {
  PlacedRun(const RunConfig& config, const Lab& lab)
      : place(test_world(), config.run.device), trainer(config, lab.dataset(), mesh, place.memory(), place.stream()) {}
  PlacedRun(const RunConfig& config, const Lab& lab, const std::string& checkpoint)
      : place(test_world(), config.run.device),
        trainer(config, lab.dataset(), mesh, place.memory(), place.stream(), CheckpointReader::open(checkpoint)) {}

  Workplace place;
  Mesh mesh = test::alone();
  Trainer trainer;
};

/// Calls f(lab) where there is a device for one rank.
template <class F>
void on_cuda(const F& f) {
  const Devices found = devices_of(Device::cuda);
  if (found.count == 0) GTEST_SKIP() << "no CUDA device: " << found.why_none;
  if (test_world().size() > 1) GTEST_SKIP() << "a device is used by one rank";
  const Lab lab;
  f(lab);
}

/// Few rows: an emulated device is slow.
RunConfig small(const Lab& lab, DType dtype, PattentionNorm norm = PattentionNorm::l2_norm_gelu) {
  RunConfig config = lab.config(dtype, norm);
  config.model.max_seq = 16;
  config.train.batch = 3;
  return config;
}

RunConfig on(Device device, RunConfig config) {
  config.run.device = device;
  return config;
}

/// Of bf16 beside f32, as a part of the loss.
constexpr double kBf16Loss = 0.01;

double relative(double a, double b) { return std::abs(a - b) / std::abs(b); }

TEST(Cuda, TrainsAsTheCpuDoes) {
  on_cuda([](const Lab& lab) {
    for (const PattentionNorm norm :
         {PattentionNorm::l2_norm_gelu, PattentionNorm::gelu_l2_norm, PattentionNorm::softmax}) {
      const int steps = norm == PattentionNorm::l2_norm_gelu ? 50 : 5;
      const RunConfig config = small(lab, DType::f32, norm);
      PlacedRun there(on(Device::cuda, config), lab), here(on(Device::cpu, config), lab);
      for (int i = 0; i < steps; ++i) {
        const StepResult got = there.trainer.step(), want = here.trainer.step();
        ASSERT_LE(relative(got.loss, want.loss), 1e-3) << name_of(norm) << ", step " << i;
        ASSERT_LE(relative(got.grad_norm, want.grad_norm), 1e-2) << name_of(norm) << ", step " << i;
      }
      const EvalResult got = there.trainer.evaluate(Split::validation, {}),
                       want = here.trainer.evaluate(Split::validation, {});
      EXPECT_EQ(got.tokens, want.tokens);
      EXPECT_LE(relative(got.nll_sum, want.nll_sum), 1e-3);
    }
  });
}

TEST(Cuda, TrainsTheOtherKindsToo) {
  on_cuda([](const Lab& lab) {
    RunConfig transformer = small(lab, DType::f32);
    transformer.model.kind = "transformer";
    transformer.model.ffn_dim = 97;
    RunConfig memory = small(lab, DType::f64);  // in f32 the sums of a device may flip a bit of a hash
    memory.model.kind = "memoryformer";
    memory.model.hash_bits = {4, 4, 5};
    memory.model.memory_width = 45;
    memory.model.tables = {11, 0, 0};  // which look through a permutation
    memory.train.idle_rows = IdleRows::skip;
    for (const RunConfig& config : {transformer, memory}) {
      const double bound = config.train.dtype == DType::f64 ? 1e-9 : 1e-4;
      PlacedRun there(on(Device::cuda, config), lab), here(on(Device::cpu, config), lab);
      for (int i = 0; i < 5; ++i) {
        const StepResult got = there.trainer.step(), want = here.trainer.step();
        ASSERT_LE(relative(got.loss, want.loss), bound) << config.model.kind << ", step " << i;
        ASSERT_LE(relative(got.grad_norm, want.grad_norm), 100 * bound) << config.model.kind << ", step " << i;
      }
    }
  });
}

TEST(Cuda, TrainsWithEveryAttention) {
  on_cuda([](const Lab& lab) {
    RunConfig linformer = small(lab, DType::f32), performer = linformer, cosformer = linformer;
    linformer.model.attention.kind = AttentionKind::linformer;
    linformer.model.attention.block = 6;  // 16 positions: two whole blocks, and some more
    linformer.model.attention.slots = 2;
    performer.model.attention.kind = AttentionKind::performer;
    performer.model.attention.features = 11;
    cosformer.model.attention.kind = AttentionKind::cosformer;
    cosformer.model.rotary_fraction = 0;
    for (const RunConfig& config : {linformer, performer, cosformer}) {
      const std::string_view kind = name_of(config.model.attention.kind);
      RunConfig narrow = on(Device::cuda, config);
      narrow.train.dtype = DType::bf16;
      PlacedRun there(on(Device::cuda, config), lab), here(on(Device::cpu, config), lab), in_bf16(narrow, lab);
      for (int i = 0; i < 5; ++i) {
        const StepResult got = there.trainer.step(), want = here.trainer.step();
        ASSERT_LE(relative(got.loss, want.loss), 1e-4) << kind << ", step " << i;
        ASSERT_LE(relative(got.grad_norm, want.grad_norm), 1e-2) << kind << ", step " << i;
        ASSERT_LE(relative(in_bf16.trainer.step().loss, want.loss), 0.01) << kind << ", step " << i;
      }
      GenerateOptions options;
      options.tokens = 8;
      options.sampling.temperature = 0;
      const std::vector<std::int32_t> prompt = {1, 2, 3};
      here.trainer.save(test_world(), lab.path("attention.h5"), Retention::rolling);
      PlacedRun same(on(Device::cuda, config), lab, lab.path("attention.h5"));
      const auto continued = [&](PlacedRun& run) {
        return generate(run.trainer.model(), run.place.memory(), run.place.stream(), prompt, options);
      };
      EXPECT_EQ(continued(same), continued(here)) << kind;
    }
  });
}

/// TFORGE_BF16_STEPS for a longer look.
int bf16_steps() {
  const char* text = std::getenv("TFORGE_BF16_STEPS");
  return text != nullptr ? std::atoi(text) : 30;
}

/// Token by token with the cache, the logits are those of the whole sequence: up to rounding, since a product of one
/// row may be computed by another algorithm than one of several.
void expect_cached_logits(PlacedRun& run) {
  LanguageModel& model = run.trainer.model();
  Allocator host;
  Tape tape(run.place.memory(), run.place.stream(), TapeMode::inference);
  const std::vector<std::int32_t> tokens = {3, 1, 4, 1, 5, 9, 2, 6};
  const auto tensor = [&](std::span<const std::int32_t> some) {
    return Tensor::of<std::int32_t>(run.place.memory(), Shape{std::ssize(some)}, some, Purpose::activations);
  };
  const Tensor whole = model.logits(tape, tensor(tokens), 1).clone(host);
  KvCache cache = model.make_cache(1, std::ssize(tokens));
  double apart = 0, largest = 0;
  for (std::size_t n = 0; n < tokens.size(); ++n) {
    const Tensor last = model.extend(tape, tensor(std::span(tokens).subspan(n, 1)), cache).clone(host);
    const std::span<const float> got = last.span<float>(),
                                 want = whole.rows(static_cast<std::int64_t>(n), 1).span<float>();
    for (std::size_t i = 0; i < want.size(); ++i) {
      apart = std::max(apart, std::abs(static_cast<double>(got[i] - want[i])));
      largest = std::max(largest, std::abs(static_cast<double>(want[i])));
    }
  }
  EXPECT_GT(largest, 0.1);
  EXPECT_LE(apart, kBf16Loss * largest);
}

TEST(Cuda, TrainsInBf16) {
  on_cuda([](const Lab& lab) {
    RunConfig tokens = small(lab, DType::f32), transformer = tokens;
    transformer.model.kind = "transformer";
    transformer.model.ffn_dim = 97;
    std::vector<RunConfig> configs = {tokens, transformer};
    for (const PattentionNorm norm : {PattentionNorm::gelu_l2_norm, PattentionNorm::softmax}) {
      configs.push_back(small(lab, DType::f32, norm));
    }
    for (const RunConfig& config : configs) {
      RunConfig narrow = on(Device::cuda, config);
      narrow.train.dtype = DType::bf16;
      PlacedRun there(narrow, lab), here(on(Device::cpu, config), lab);
      EXPECT_EQ(there.trainer.model().dtype(), DType::f32);
      double begun = 0, want = 0, most = 0;
      const bool briefly = config.model.norm != tokens.model.norm;
      for (int i = 0; i < (briefly ? 6 : bf16_steps()); ++i) {
        const double got = there.trainer.step().loss;
        want = here.trainer.step().loss;
        if (i == 0) begun = want;
        most = std::max(most, relative(got, want));
        ASSERT_LE(relative(got, want), kBf16Loss) << config.model.kind << ", step " << i;
      }
      RecordProperty(config.model.kind, std::to_string(most));
      EXPECT_LT(want, begun - (briefly ? 0 : 0.2)) << "nothing was learned";
      // Parameters and moments are stored as they are: the same bits go on, and the CPU goes on in f32.
      there.trainer.save(test_world(), lab.path("bf16.h5"), Retention::rolling);
      PlacedRun again(narrow, lab, lab.path("bf16.h5")), wide(on(Device::cpu, config), lab, lab.path("bf16.h5"));
      const double next = there.trainer.step().loss;
      EXPECT_EQ(again.trainer.step().loss, next);
      EXPECT_LE(relative(wide.trainer.step().loss, next), kBf16Loss);
      const EvalResult got = there.trainer.evaluate(Split::validation, {}),
                       in_f32 = wide.trainer.evaluate(Split::validation, {});
      EXPECT_LE(relative(got.nll_sum, in_f32.nll_sum), kBf16Loss);
      expect_cached_logits(there);
    }
  });
}

/// What is kept for backward changes no bit where it is not rounded, and takes what a plan says.
TEST(Cuda, SavesForBackwardAsItIsTold) {
  on_cuda([](const Lab& lab) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      RunConfig config = on(Device::cuda, small(lab, DType::f32));
      config.train.dtype = dtype;
      config.train.micro_batch = 2;
      PlacedRun plain(config, lab);
      const std::vector<StepResult> want = test::train(plain.trainer, 3);
      for (const Recompute recompute : {Recompute::none, Recompute::scores, Recompute::block}) {
        for (const SavedDType saved : {SavedDType::same, SavedDType::bf16}) {
          const std::string what = fmt::format("{} recompute {} saved {}", name_of(dtype), static_cast<int>(recompute),
                                               static_cast<int>(saved));
          config.train.saves = {recompute, saved};
          const bool same = saved == SavedDType::same;
          if (dtype == DType::bf16 && !same) continue;  // it is narrow already
          PlacedRun run(config, lab);
          const Rehearsal rehearsal = rehearse(config, run.trainer.model().plan(), {});
          std::vector<StepResult> got = test::train(run.trainer, 2);
          Profile profile;
          run.place.stream().set_profile(&profile);
          got.push_back(run.trainer.step());
          run.place.stream().set_profile(nullptr);
          for (std::size_t i = 0; i < got.size(); ++i) {
            EXPECT_LE(relative(got[i].loss, want[i].loss), same ? 0 : kBf16Loss) << what;
            EXPECT_LE(relative(got[i].grad_norm, want[i].grad_norm), same ? 0 : 10 * kBf16Loss) << what;
          }
          test::expect_as_rehearsed(rehearsal, run.place.memory().report(), profile, what);
        }
      }
    }
  });
}

TEST(Cuda, GivesTheSameBitsTwice) {
  on_cuda([](const Lab& lab) {
    const RunConfig config = on(Device::cuda, small(lab, DType::f32));
    PlacedRun first(config, lab), second(config, lab);
    for (int i = 0; i < 5; ++i) {
      const StepResult a = first.trainer.step(), b = second.trainer.step();
      ASSERT_EQ(a.loss, b.loss);
      ASSERT_EQ(a.grad_norm, b.grad_norm);
    }
  });
}

TEST(Cuda, GoesOnFromTheCpuAndBack) {
  on_cuda([](const Lab& lab) {
    const RunConfig config = small(lab, DType::f32);
    const RunConfig cuda = on(Device::cuda, config), cpu = on(Device::cpu, config);
    PlacedRun whole(cpu, lab), begun(cpu, lab);
    for (int i = 0; i < 3; ++i) begun.trainer.step();
    begun.trainer.save(test_world(), lab.path("on_cpu.h5"), Retention::rolling);
    PlacedRun middle(cuda, lab, lab.path("on_cpu.h5"));
    for (int i = 0; i < 3; ++i) middle.trainer.step();
    middle.trainer.save(test_world(), lab.path("on_cuda.h5"), Retention::rolling);
    PlacedRun again(cuda, lab, lab.path("on_cuda.h5")), back(cpu, lab, lab.path("on_cuda.h5"));
    for (int i = 0; i < 6; ++i) whole.trainer.step();
    for (int i = 0; i < 3; ++i) {
      const double want = whole.trainer.step().loss, on_device = middle.trainer.step().loss;
      EXPECT_LE(relative(on_device, want), 1e-4);
      EXPECT_EQ(again.trainer.step().loss, on_device) << "a resume on the device";
      EXPECT_LE(relative(back.trainer.step().loss, want), 1e-4);
    }
  });
}

TEST(Cuda, ContinuesAPromptAsTheCpuDoes) {
  on_cuda([](const Lab& lab) {
    RunConfig tokens = small(lab, DType::f64), transformer = tokens, memory = tokens;
    transformer.model.kind = "transformer";
    transformer.model.ffn_dim = 97;
    memory.model.kind = "memoryformer";
    memory.model.hash_bits = {4, 4, 5};
    memory.model.tables = {11, 0, 0};
    for (const RunConfig& config : {tokens, transformer, memory}) {
      PlacedRun here(on(Device::cpu, config), lab);
      here.trainer.step();
      here.trainer.save(test_world(), lab.path(config.model.kind), Retention::rolling);
      PlacedRun there(on(Device::cuda, config), lab, lab.path(config.model.kind));
      const std::vector<std::int32_t> prompt = {3, 1, 4, 1, 5};
      GenerateOptions options;
      options.tokens = 14;  // past the trained length
      options.samples = 2;
      options.past_end = PastEnd::slide;
      const auto continued = [&](PlacedRun& run, CacheUse use) {
        options.cache = use;
        return generate(run.trainer.model(), run.place.memory(), run.place.stream(), prompt, options);
      };
      const auto want = continued(here, CacheUse::cached);
      EXPECT_NE(want[0], want[1]);
      EXPECT_EQ(continued(there, CacheUse::cached), want) << config.model.kind;
      EXPECT_EQ(continued(there, CacheUse::recomputed), want) << config.model.kind;
    }
  });
}

TEST(Cuda, AsksForNoMemoryFromTheThirdStepOn) {
  on_cuda([](const Lab& lab) {
    RunConfig config = on(Device::cuda, small(lab, DType::f32));
    config.train.micro_batch = 2;  // two micro-batches of unlike size
    PlacedRun run(config, lab);
    for (int i = 0; i < 2; ++i) run.trainer.step();
    const std::uint64_t before = run.place.memory().report().system_requests;
    for (int i = 0; i < 3; ++i) run.trainer.step();
    EXPECT_EQ(run.place.memory().report().system_requests, before);
    EXPECT_GT(run.place.memory().report().total_peak, 0U);
  });
}

enum class Over : std::uint8_t { nccl, pinned_memory };

/// The same losses as the CPU's alone in f32, over a few steps, in every layout.
void several_ranks_train(Over over, DType dtype, PattentionNorm norm = PattentionNorm::l2_norm_gelu) {
  const int ranks = test_world().size();
  const std::string why_not = over == Over::nccl ? test::why_no_nccl(ranks) : test::why_no_device(ranks);
  if (!why_not.empty()) GTEST_SKIP() << why_not;
  if (ranks == 1) GTEST_SKIP() << "for several ranks";
  // Who shares a device stages, unless a test has NCCL over MPI.
  const bool shares = over == Over::pinned_memory || devices_of(Device::cuda).count < ranks;
  const Lab lab;
  const double bound = dtype == DType::bf16 ? kBf16Loss : 1e-4;
  for (const auto& [dp, tp] : test::layouts()) {
    for (const std::int64_t zero : {0, 1}) {
      if (zero == 1 && dp == 1) continue;
      RunConfig config = small(lab, DType::f32, norm);
      config.train.batch = 4;
      config.train.seq = 8;
      config.parallel.zero = zero;
      config.parallel.bucket_mb = 0.05;  // several
      config.parallel.reduction = zero == 1 ? Reduction::polled : Reduction::nonblocking;
      Workplace place(test_world(), Device::cuda, shares ? DeviceUse::shared : DeviceUse::own);
      const auto nccl = shares && over == Over::nccl ? create_nccl(test_world(), place.stream()) : nullptr;
      Mesh mesh = Mesh::create(nccl ? *nccl : place.world(), dp, tp);
      config.train.dtype = dtype;
      const RunConfig narrow = on(Device::cuda, config);
      Trainer there(narrow, lab.dataset(), mesh, place.memory(), place.stream());
      config.train.dtype = DType::f32;
      config.parallel.zero = 0;
      PlacedRun here(config, lab);
      std::uint64_t requests = 0;
      for (int i = 0; i < 4; ++i) {
        if (i == 2) requests = place.memory().report().system_requests;
        const StepResult got = there.step(), want = here.trainer.step();
        ASSERT_LE(relative(got.loss, want.loss), bound) << dp << "x" << tp << " zero " << zero << ", step " << i;
        ASSERT_LE(relative(got.grad_norm, want.grad_norm), 10 * bound) << dp << "x" << tp << ", step " << i;
      }
      EXPECT_EQ(place.memory().report().system_requests, requests);
      const Communicator::Traffic before = mesh.tp_comm->traffic();
      there.step();
      const Volume volume = volume_of(
          step_exchanges(narrow, there.model().plan(), there.model().parameters().buckets(bucket_bytes(narrow), dp),
                         {dp, tp, mesh.dp_index, mesh.tp_index}),
          MeshAxis::tp);
      EXPECT_EQ(volume.calls, static_cast<std::int64_t>(mesh.tp_comm->traffic().calls - before.calls));
      EXPECT_EQ(volume.bytes, static_cast<std::int64_t>(mesh.tp_comm->traffic().bytes - before.bytes));
      const Communicator::Traffic sent = (dp > 1 ? mesh.dp_comm : mesh.tp_comm)->traffic();
      EXPECT_GT(sent.bytes, 0U);
      EXPECT_GT(sent.seconds, 0);
    }
  }
}

/// Of the emulator, while it lives.
struct OneDevice {
  OneDevice() { ::setenv("TFORGE_EMULATOR_DEVICES", "1", 1); }
  ~OneDevice() { ::setenv("TFORGE_EMULATOR_DEVICES", std::to_string(test_world().size()).c_str(), 1); }
  OneDevice(const OneDevice&) = delete;
  OneDevice& operator=(const OneDevice&) = delete;
};

TEST(Cuda, SeveralRanksOnOneDeviceTrainAsTheCpuDoes) {
  const OneDevice one;
  several_ranks_train(Over::pinned_memory, DType::f32);
}

TEST(Cuda, SeveralRanksOverNcclTrainAsTheCpuDoes) { several_ranks_train(Over::nccl, DType::f32); }

TEST(Cuda, SeveralRanksOverNcclShareADeviceWhereItIsOverMpi) {
  const OneDevice one;
  several_ranks_train(Over::nccl, DType::f32);
}

TEST(Cuda, SeveralRanksOverNcclTrainInBf16) {
  for (const PattentionNorm norm :
       {PattentionNorm::l2_norm_gelu, PattentionNorm::gelu_l2_norm, PattentionNorm::softmax}) {
    several_ranks_train(Over::nccl, DType::bf16, norm);
  }
}

TEST(Cuda, RanksThatShareADeviceUnaskedAreRefused) {
  const OneDevice one;
  const Devices found = devices_of(Device::cuda);
  if (found.count != 1 || test_world().size() == 1) GTEST_SKIP() << "for several ranks on one device";
  try {
    const Workplace place(test_world(), Device::cuda);
    FAIL() << "they share it";
  } catch (const ConfigError& error) {
    const std::string text = error.what();
    EXPECT_EQ(text.find("run.device = \"cuda\": ranks 0 and 1 would use the same device of "), 0U) << text;
    EXPECT_NE(text.find("parallel.share_device = true"), std::string::npos) << text;
    EXPECT_EQ(text.find('\n'), std::string::npos);
  }
}

TEST(Cuda, WithoutADeviceOneLineSaysSo) {
  const Devices found = devices_of(Device::cuda);
  if (found.count > 0) GTEST_SKIP() << "there is a device";
  try {
    const Workplace place(test_world(), Device::cuda);
    FAIL() << "a place on no device";
  } catch (const DeviceError& error) {
    const std::string text = error.what();
    EXPECT_EQ(error.code(), ExitCode::no_resources);
    EXPECT_EQ(text.find("run.device = \"cuda\": there is none here: "), 0U) << text;
    EXPECT_NE(text.find(found.why_none), std::string::npos) << text;
    EXPECT_EQ(text.find('\n'), std::string::npos);
  }
}

}  // namespace
}  // namespace tforge
