#pragma once
// Pattention as one differentiable op over a group of layers that share their input (q, k and v), or over one layer.
#include <optional>
#include <span>

#include "autograd/reducer.h"
#include "autograd/row_shards.h"
#include "autograd/tape.h"
#include "autograd/var.h"
#include "core/pattention_norm.h"
#include "kernels/pattention.h"

namespace tforge {

/// The parameter tokens of one Pattention layer that are held here.
struct PattentionTokens {
  Var keys;      // [n, d_in]
  Var values;    // [n, d_out]
  double scale;  // the layer's stored scale
  RowShards shards = {};
};

using kernels::kMaxPattentionGroup;

/// Pattention of x [T, d_in] with each of the G layers (1 to 3, same d_in and d_out); see kernels/pattention.h.
/// `reducer` covers the ranks that hold the layers' other tokens; it is called once with [T, G] row numbers before the
/// second product (not for gelu_l2_norm), and once in backward (l2_norm_gelu only).
///
/// Over tokens: keys and values sharded by rows, x replicated. The result is PARTIAL, its sum over the ranks is
///   l2_norm_gelu:  [Y_0 | ... | Y_{G-1}]                          [T, G d_out], the layers' outputs
///   others:        [U_0 | ... | U_{G-1} | w_0 ... w_{G-1}]        [T, G d_out + G], to be finished by row_normalize;
///                                                                 f32 where x is bf16
/// U and w of softmax are relative to the row's largest score. Backward takes that for a constant: row_normalize's
/// result does not depend on it.
/// Backward needs the result's whole gradient on every rank and gives a PARTIAL dx.
/// With a reducer by_shard() the result and dx are complete; the layers have the same number of shards.
/// Saves x, the scores [T, n] (not with Recompute::scores) and the row numbers. Counts floored rows in
/// tape.floored_rows(). Throws ShapeError, DTypeError.
Var pattention(Tape& tape, const Var& x, std::span<const PattentionTokens> layers, PattentionNorm norm,
               Reducer& reducer);

/// Finishes gelu_l2_norm and softmax after the reduction over ranks: u [T, G c + G] -> y [T, G c] with
///   y_g = scale_g * u_g / sqrt(w_g)   or   scale_g * u_g / w_g.
/// c may be a part of d_out (heads of this rank): then the gradient of w is this rank's part of a sum.
/// For l2_norm_gelu returns u itself. y is of `dtype`, which may be bf16 where u is f32; by default of u's. Saves u.
Var row_normalize(Tape& tape, const Var& u, std::span<const double> scales, PattentionNorm norm,
                  std::optional<DType> dtype = {});

}  // namespace tforge
