// From the third step on, a training step asks nobody for memory.
#include <gtest/gtest.h>

#include <cstdlib>
#include <new>

#include "kernels/gemm.h"
#include "support/run_checks.h"

namespace {

// Requests of this thread while it counts. Libraries in C (MPI, OpenMP, BLAS) do not come through here.
thread_local bool counting = false;
thread_local std::uint64_t requests = 0;

void* counted(std::size_t bytes, std::size_t alignment) {
  if (counting) ++requests;
  void* memory =
      std::aligned_alloc(alignment, (std::max<std::size_t>(bytes, 1) + alignment - 1) / alignment * alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

void* operator new(std::size_t bytes) { return counted(bytes, __STDCPP_DEFAULT_NEW_ALIGNMENT__); }
void* operator new[](std::size_t bytes) { return counted(bytes, __STDCPP_DEFAULT_NEW_ALIGNMENT__); }
void* operator new(std::size_t bytes, std::align_val_t a) { return counted(bytes, static_cast<std::size_t>(a)); }
void* operator new[](std::size_t bytes, std::align_val_t a) { return counted(bytes, static_cast<std::size_t>(a)); }
// Those that do not throw too: who replaces only some has the others' memory freed by a stranger.
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  return counted(bytes, __STDCPP_DEFAULT_NEW_ALIGNMENT__);
}
void* operator new[](std::size_t bytes, const std::nothrow_t&) noexcept {
  return counted(bytes, __STDCPP_DEFAULT_NEW_ALIGNMENT__);
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete[](void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

namespace tforge::test {
namespace {

/// From the third step on.
void expect_no_requests(TinyRun& run, const std::string& what) {
  train(run.trainer, 2);
  const std::uint64_t before = run.allocator.report().system_requests;
  EXPECT_GT(before, 0U) << what;
  requests = 0;
  counting = true;
  for (int i = 0; i < 4; ++i) run.trainer.step();
  counting = false;
  EXPECT_EQ(run.allocator.report().system_requests, before) << what;
  EXPECT_EQ(requests, 0U) << what;
}

TEST(Memory, SteadyStepsRequestNone) {
  const Lab lab;
  constexpr SavePolicy kPolicies[] = {{},
                                      {Recompute::scores, SavedDType::same},
                                      {Recompute::none, SavedDType::bf16},
                                      {Recompute::block, SavedDType::bf16}};
  for (const PattentionNorm norm :
       {PattentionNorm::l2_norm_gelu, PattentionNorm::gelu_l2_norm, PattentionNorm::softmax}) {
    for (const auto& layout : layouts()) {
      for (const SavePolicy& saves : kPolicies) {
        RunConfig config = lab.config(DType::f32, norm);
        config.train.micro_batch = 4;  // and a rest
        config.train.saves = saves;
        config.parallel.reduction = Reduction::polled;  // asks for all that the other two ask for
        config.parallel.zero = norm == PattentionNorm::softmax ? 1 : 0;
        TinyRun run(config, lab, mesh_of(layout));
        expect_no_requests(run, fmt::format("{} {} recompute {} saved {}", text_of(layout), name_of(norm),
                                            static_cast<int>(saves.recompute), static_cast<int>(saves.dtype)));
      }
    }
  }
}

TEST(Memory, SteadyStepsOfVirtualShardsRequestNone) {
  const Lab lab;
  for (const PattentionNorm norm : {PattentionNorm::l2_norm_gelu, PattentionNorm::softmax}) {
    for (const auto& layout : layouts()) {
      RunConfig config = independent(lab.config(DType::f32, norm));
      config.parallel.zero = norm == PattentionNorm::softmax ? 1 : 0;
      TinyRun run(config, lab, mesh_of(layout));
      expect_no_requests(run, text_of(layout));
    }
  }
}

TEST(Memory, SteadyStepsOfOtherAttentionRequestNone) {
  const Lab lab;
  for (const AttentionKind kind : {AttentionKind::linformer, AttentionKind::performer, AttentionKind::cosformer}) {
    for (const SavePolicy& saves : {SavePolicy{}, SavePolicy{Recompute::block, SavedDType::bf16}}) {
      RunConfig config = lab.config(DType::f32);
      config.model.kind = "transformer";
      config.model.rotary_fraction = 0;
      config.model.attention.kind = kind;
      config.model.attention.block = 8;
      config.model.attention.slots = 3;
      config.train.micro_batch = 4;
      config.train.saves = saves;
      TinyRun run(config, lab, mesh_of(layouts().back()));
      expect_no_requests(run, std::string(name_of(kind)));
    }
  }
}

/// What `tf_train --dry-run` and tf_plan tell is what a step takes, under every policy.
TEST(Memory, ARehearsalTakesWhatARunTakes) {
  const Lab lab;
  kernels::start_cpu_runtime(1);
  for (const PattentionNorm norm :
       {PattentionNorm::l2_norm_gelu, PattentionNorm::gelu_l2_norm, PattentionNorm::softmax}) {
    for (const Recompute recompute : {Recompute::none, Recompute::scores, Recompute::block}) {
      for (const SavedDType dtype : {SavedDType::same, SavedDType::bf16}) {
        RunConfig config = lab.config(DType::f32, norm);
        config.model.layers = 4;
        config.model.dim = 96;
        config.model.max_seq = 64;
        config.model.tokens = {64, 64, 64, 96, 256};
        config.train.batch = 4;
        config.train.saves = {recompute, dtype};
        for (const auto& layout : layouts()) expect_rehearsed(lab, config, layout, std::string(name_of(norm)));
      }
    }
  }
}

TEST(Memory, ARehearsalTakesWhatARunTakesInEveryMode) {
  const Lab lab;
  kernels::start_cpu_runtime(1);
  for (const Reduction reduction : {Reduction::blocking, Reduction::nonblocking}) {
    for (const std::int64_t zero : {0, 1}) {
      for (const auto& layout : layouts()) {
        RunConfig config = lab.config(DType::f32);
        config.train.micro_batch = 4;  // and a rest
        config.parallel.reduction = reduction;
        config.parallel.bucket_mb = 0.02;
        config.parallel.zero = zero;
        expect_rehearsed(lab, config, layout, fmt::format("reduction {} zero {}", static_cast<int>(reduction), zero));
        if (reduction == Reduction::blocking) {
          expect_rehearsed(lab, independent(config), layout, fmt::format("independent, zero {}", zero));
        }
      }
    }
  }
}

/// A rehearsal allocates nothing that exists: this one is of 3.7 terabytes.
TEST(Memory, ARehearsalIsOfAnySize) {
  RunConfig config;
  config.model.layers = 96;
  config.model.dim = 12288;
  config.model.heads = 96;
  config.model.vocab = 50304;
  config.model.max_seq = 2048;
  config.model.tokens = {12288, 12288, 12288, 12288, 49152};
  config.train.batch = 8;
  const ShardPlan shards = ShardPlan::even(config.model, 1);
  const MemoryReport memory = rehearse(config, shards, {}).memory;
  const auto bytes = [&](Purpose p) { return static_cast<double>(memory.peak[static_cast<std::size_t>(p)]); };
  const double weights = 4 * static_cast<double>(config.model.parameters());
  EXPECT_GT(weights, 900e9);
  EXPECT_NEAR(bytes(Purpose::weights) / weights, 1, 1e-3);
  EXPECT_NEAR(bytes(Purpose::gradients) / weights, 1, 1e-3);
  EXPECT_NEAR(bytes(Purpose::moments) / weights, 2, 1e-3);
}

TEST(Memory, TheCounterCounts) {
  requests = 0;
  counting = true;
  const std::vector<int> some(100);
  counting = false;
  EXPECT_EQ(requests, 1U);
  EXPECT_EQ(some.size(), 100U);
}

}  // namespace
}  // namespace tforge::test
