#pragma once
// The Memory Layer (MemoryFormer, arXiv 2411.12992, equations 6 to 12): rows of tables in place of a product.
//
//   z_k[i] = x[coordinates[i, k]]                   i < bits                 what table k looks at
//   code_k = sum_i 1[z_k[i] >= 0] 2^(bits - 1 - i)  i < bits                 the first coordinate is the highest bit
//   w_k    = p(z_k) or ||z_k||_1 p(z_k)             over i < weight_bits     core/hash_weight.h
//   y      = sum_k w_k tables[k 2^bits + code_k, :]                          k < K tables held here, in order of k
//
// weight_bits is less than bits where tables got more bits than their weight looks at. Zero counts as positive, -0 too.
// The hash has no gradient: y jumps where a sign flips, and x is reached through the weights alone,
//   dp/dz_i = (2 / t) p sgn(z_i) / (1 + exp(2 |z_i| / t))        d(||z||_1 p)/dz_i = sgn(z_i) p + ||z||_1 dp/dz_i
// with sgn(0) = +1, the side that the hash takes.
//
// T rows, K tables, x [T, d_in], coordinates [bits, K] i32 in [0, d_in), codes [T, K] i32, weights [T, K],
// tables [K 2^bits, d_out], y [T, d_out]. f32 or f64 (all alike); f32 accumulates in f32 in fixed order: an element of
// y is one chain of multiply-adds over k. No bit depends on the threads or on the number of rows, on a CUDA device
// either, whose exponentials and sums round otherwise than the CPU's. Row strides are allowed, also of codes and
// weights, so that tables [k0, k1) are used through column ranges of the three [*, K] operands and a row range of the
// tables. Nothing is allocated. Throws ShapeError or DTypeError naming the function and the operand.
#include <cstddef>
#include <cstdint>
#include <span>

#include "core/device.h"
#include "core/hash_weight.h"
#include "core/tensor.h"

namespace tforge::kernels {

inline constexpr std::int64_t kMostHashBits = 16;

/// What decides codes and weights of an input row. `coordinates` are trusted to lie inside of x.
struct MemoryHash {
  HashWeight weight = HashWeight::p;
  double temperature = 1;
  std::int64_t weight_bits = 0;  // 1 .. bits
  ConstTensorView coordinates;   // [bits, K] i32
};

/// codes and weights of every row of x, for all layers that read x.
void memory_hash_forward(Stream& stream, const MemoryHash& hash, ConstTensorView x, TensorView codes,
                         TensorView weights);

/// One of the layers that share a hash: q, k and v.
struct MemoryForward {
  ConstTensorView tables;
  TensorView y;
};
inline constexpr std::size_t kMaxMemoryGroup = 3;

/// y of each layer from the codes and weights of `bits` bits. Bytes read for each row and layer: K rows of a table.
void memory_lookup_forward(Stream& stream, std::int64_t bits, ConstTensorView codes, ConstTensorView weights,
                           std::span<const MemoryForward> layers);

struct MemoryBackward {
  ConstTensorView tables, dy;
  GradMode dtables_mode = GradMode::overwrite;
  TensorView dtables;  // may be empty: skipped
};

/// dtables[k 2^bits + c, :] {=, +=} sum over the rows t with code c, in order of t, of w_k[t] dy[t, :]
///   (each row is summed by one thread; with overwrite, rows without a hit become 0). Where the first element of a row
///   that was hit comes out as 0 it is set to the smallest normal number: a gradient that is 0 but for rounding would
///   else be 0 or not by chance, and what leaves rows without a hit alone (kernels/adamw.h) could not tell them.
/// dweights[k, t] = sum over the layers, in order, of <dy[t, :], tables[k 2^bits + code_k[t], :]>    [K, T], transposed
/// An empty dweights skips it. order: i32 of at least memory_lookup_workspace(T, bits, K), asked for with the number of
/// threads that the kernel then runs with, or for the device.
void memory_lookup_backward(Stream& stream, std::int64_t bits, ConstTensorView codes, ConstTensorView weights,
                            std::span<const MemoryBackward> layers, TensorView dweights, TensorView order);
std::int64_t memory_lookup_workspace(std::int64_t rows, std::int64_t bits, std::int64_t tables,
                                     Device device = Device::cpu);

/// dx[t, c] {=, +=} sum over the coordinates c of the tables, in order of (k, i), of dweights[k, t] dw_k/dz_k[i].
void memory_hash_backward(Stream& stream, const MemoryHash& hash, ConstTensorView x, ConstTensorView dweights,
                          GradMode mode, TensorView dx);

}  // namespace tforge::kernels
