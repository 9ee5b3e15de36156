// From the third step on, a training step asks nobody for memory.
#include <gtest/gtest.h>

#include <cstdlib>
#include <new>

#include "support/tiny_run.h"

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

TEST(Memory, SteadyStepsRequestNone) {
  const Lab lab;
  for (const PattentionNorm norm :
       {PattentionNorm::l2_norm_gelu, PattentionNorm::gelu_l2_norm, PattentionNorm::softmax}) {
    for (const auto& layout : layouts()) {
      RunConfig config = lab.config(DType::f32, norm);
      config.train.micro_batch = 4;  // and a rest
      TinyRun run(config, lab, mesh_of(layout));
      train(run.trainer, 2);
      const std::uint64_t before = run.allocator.report().system_requests;
      EXPECT_GT(before, 0U);
      requests = 0;
      counting = true;
      for (int i = 0; i < 6; ++i) run.trainer.step();
      counting = false;
      EXPECT_EQ(run.allocator.report().system_requests, before) << text_of(layout) << " " << name_of(norm);
      EXPECT_EQ(requests, 0U) << text_of(layout) << " " << name_of(norm);
    }
  }
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
