#pragma once
// Gradient check: what backward gives, against central differences, in f64.
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "autograd/tape.h"
#include "autograd/var.h"
#include "core/allocator.h"
#include "core/device.h"
#include "core/tensor.h"

namespace tforge {

/// A function under check: builds its result on `tape`. It is run on recording and on inference tapes and must give
/// the same numbers for the same inputs every time.
using DifferentiableFunction = std::function<Var(Tape& tape, std::span<const Var> inputs)>;

/// Checks the gradient of loss = sum_i r_i y_i, y = function(inputs), for every element of every input (f64, of the
/// order of 1); r is standard normal under `seed`. A y of one element is the loss itself, because a loss op may have
/// to be the root of the backward pass.
/// Returns "" when all is well, else one line on the first fault:
///   - an input got no gradient, or one whose largest element is too near zero for the comparison to tell anything;
///   - an element differs from (loss(x + h) - loss(x - h)) / 2h by more than the tolerance;
///   - a second pass without clear_grad() in between does not add the same gradient once more.
///
/// Tolerance: with h = cbrt(eps) the truncation of the difference, h^2 f'''/6, and its rounding, eps |loss| / h, are
/// both of the order of eps^(2/3), eps = 2^-52. The tolerance is 50 eps^(2/3) (about 2e-9) times
/// sum_i |r_i y_i| + the input's largest gradient; "near zero" is up to 1000 times that, where an error of 0.1 %
/// in the largest element would pass unseen.
///
/// The inputs are not changed. Memory comes from `allocator`. Throws DTypeError for an input or a y that is not f64,
/// and what `function` throws.
std::string grad_check(Allocator& allocator, Stream& stream, const DifferentiableFunction& function,
                       std::vector<Tensor> inputs, std::uint64_t seed = 1);

}  // namespace tforge
