#pragma once
// The tensor cores' product of bf16 matrices by one warp, how its operands are loaded, and copies into shared memory
// that the threads do not wait for. sm_80 and later; after the PTX ISA, "Matrix multiply-accumulate operation using mma
// instruction" (m16n8k16 with .bf16 operands), "ldmatrix", "cp.async" and "ex2". Every function here but the copies and
// the power is a matter of all lanes of a warp at once.
//
// Which lane holds what, with g = lane / 4 and t = lane % 4; a pair is two bf16, the one of the smaller index in the
// lower half:
//   A (16 x 16), pairs along a row:    A(g, 2t), A(g + 8, 2t), A(g, 2t + 8), A(g + 8, 2t + 8)
//   B (16 x 8), pairs down a column:   B(2t, g), B(2t + 8, g)
//   C (16 x 8), f32:                   C(g, 2t), C(g, 2t + 1), C(g + 8, 2t), C(g + 8, 2t + 1)
#include <cuda_runtime.h>

#include "kernels/cuda/launch.cuh"

// Loops over registers must be unrolled: a register has no index.
#ifdef TFORGE_CUDA_EMULATOR
#define TFORGE_UNROLL
#else
#define TFORGE_UNROLL _Pragma("unroll")
#endif

namespace tforge::kernels::cuda {

#ifdef TFORGE_CUDA_EMULATOR
namespace ptx = tforge_emulator::ptx;
#else
namespace ptx {

__device__ inline unsigned shared_address(const void* x) { return static_cast<unsigned>(__cvta_generic_to_shared(x)); }

__device__ inline void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void ldmatrix_x4(unsigned (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void ldmatrix_x4_trans(unsigned (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void cp_async_16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes)
               : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
__device__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

__device__ inline float ex2_approx_ftz(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace ptx
#endif

/// What a lane has of a left operand, a right operand and a sum.
struct FragmentA {
  unsigned pair[4];
};
struct FragmentB {
  unsigned pair[2];
};
struct FragmentC {
  float at[4];
};

/// c += a b, summed in f32.
__device__ inline void add_product(FragmentC& c, const FragmentA& a, const FragmentB& b) {
  ptx::mma_m16n8k16(c.at, a.pair, b.pair);
}

/// 2^x, off by 2 units in the last place at most (PTX ISA, "ex2"), as exp2f is, but with 0 for what is below the normal
/// numbers, which spares their scaling. 0 of -infinity, NaN of NaN.
__device__ inline float power_of_two(float x) { return ptx::ex2_approx_ftz(x); }

/// Two sums side by side (columns 0 .. 7 and 8 .. 15) as a left operand, rounded: a lane has what it needs already.
__device__ inline FragmentA a_of_sums(const FragmentC& left, const FragmentC& right) {
  return {{pair_of(left.at[0], left.at[1]), pair_of(left.at[2], left.at[3]), pair_of(right.at[0], right.at[1]),
           pair_of(right.at[2], right.at[3])}};
}

/// Distance of the rows of a tile in shared memory, of `columns` a multiple of 16: rows begin at 16 bytes, and eight
/// neighbours in different banks. A tile begins at 16 bytes too.
constexpr __host__ __device__ int tile_pitch(int columns) { return columns + 8; }

/// The row of a tile that a lane names to ldmatrix when four 8 x 8 matrices lie 0 1 over 2 3, or 0 2 over 1 3.
__device__ inline const bf16* across(const bf16* tile, int pitch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  return tile + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8;
}
__device__ inline const bf16* down(const bf16* tile, int pitch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  return tile + lane % 16 * pitch + lane / 16 * 8;
}

/// A(i, k) = tile[i * pitch + k].
__device__ inline FragmentA a_of_rows(const bf16* tile, int pitch) {
  FragmentA a;
  ptx::ldmatrix_x4(a.pair, down(tile, pitch));
  return a;
}

/// Right operands side by side: columns 0 .. 7 and 8 .. 15 of 16 x 16.
struct TwoB {
  FragmentB left, right;
};
/// B(k, j) = tile[k * pitch + j].
__device__ inline TwoB b_of_rows(const bf16* tile, int pitch) {
  unsigned x[4];
  ptx::ldmatrix_x4_trans(x, down(tile, pitch));
  return {{{x[0], x[1]}}, {{x[2], x[3]}}};
}
/// B(k, j) = tile[j * pitch + k].
__device__ inline TwoB b_of_columns(const bf16* tile, int pitch) {
  unsigned x[4];
  ptx::ldmatrix_x4(x, across(tile, pitch));
  return {{{x[0], x[1]}}, {{x[2], x[3]}}};
}

/// Starts a copy of 16 bytes into shared memory, or of zeros, for which `from` is not read. Both at 16 bytes. Nothing
/// reads or writes there before the wait.
enum class Copied { data, zeros };
__device__ inline void start_copy(bf16* to, const bf16* from, Copied what) {
  ptx::cp_async_16(to, from, what == Copied::data ? 16 : 0);
}
/// The copies that this thread has started since the last call are a group.
__device__ inline void end_group() { ptx::cp_async_commit(); }
/// Waits for all groups of this thread but the latest kGroups. What other threads copied: a barrier behind their wait.
template <int kGroups>
__device__ void wait_for_groups() {
  ptx::cp_async_wait<kGroups>();
}

}  // namespace tforge::kernels::cuda
