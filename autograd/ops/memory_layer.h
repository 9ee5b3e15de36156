#pragma once
// The Memory Layer as one differentiable op over a group of layers that share their input and its hash (q, k and v), or
// over one layer.
#include <cstdint>
#include <span>

#include "autograd/reducer.h"
#include "autograd/row_shards.h"
#include "autograd/tape.h"
#include "autograd/var.h"
#include "core/hash_weight.h"
#include "kernels/memory_layer.h"

namespace tforge {

/// The tables of one layer that are held here.
struct MemoryTables {
  Var tables;             // [K 2^bits, d_out]
  Var bias = {};          // [d_out], or empty
  RowShards shards = {};  // of whole tables
};

/// How they are looked up; see kernels/memory_layer.h.
struct MemoryHashing {
  HashWeight weight = HashWeight::p;
  double temperature = 1;
  std::int64_t weight_bits = 0;
  Tensor coordinates;  // [bits, K] i32, of the tables held here
};

using kernels::kMaxMemoryGroup;

/// Which rank adds the biases to a result that is PARTIAL over tables: they are replicated.
enum class BiasShare : std::uint8_t { added_here, added_elsewhere };

/// y_g = sum_k w_k(x) tables_g[k 2^bits + code_k(x), :] [+ bias_g] of each of the G layers (1 to 3), whose tables hash
/// x alike: x [T, d_in] -> [y_0 | ... | y_{G-1}]. x is hashed once.
///
/// Over tables: tables sharded by rows, whole tables a rank, x replicated. The result is PARTIAL; backward needs the
/// whole gradient on every rank and gives a PARTIAL dx. With a reducer by_shard() both are complete; the layers have
/// the same shards. Each rank computes the whole gradient of the biases; one of them adds them (`share`; with a reducer
/// by_shard() they are added to the sum, whatever `share` says).
/// Saves x, and codes and weights [T, K] as they are. Throws ShapeError, DTypeError.
Var memory_layer(Tape& tape, const Var& x, const MemoryHashing& hash, std::span<const MemoryTables> layers,
                 Reducer& reducer, BiasShare share = BiasShare::added_here);

}  // namespace tforge
