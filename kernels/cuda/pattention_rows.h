#pragma once
// The passes over rows between the products of Pattention on a CUDA device; operands are already checked.
//
// The elements of a row go to the threads of one block in runs of 16 bytes, in turn; a thread adds its elements in
// order, and the sums of the threads join in one order. So appended tokens with scores of 0 leave every bit of a row's
// statistic and of P, whatever the number of tokens was.
#include "core/bf16.h"
#include "core/device.h"
#include "core/pattention_norm.h"
#include "kernels/cuda/rows.h"

namespace tforge::kernels::cuda {

/// stat of each row of scores: the sum of squares (l2_norm_gelu) or the largest (softmax).
template <class T>
void pattention_statistic(const Stream& stream, PattentionNorm norm, Rows<const T> scores, Rows<Compute<T>> stat);

/// P and the weights; rows below the floor are added to *floored (may be null).
template <class T>
void pattention_activate(const Stream& stream, PattentionNorm norm, double scale, Rows<const T> scores,
                         Rows<const Compute<T>> stat, Rows<T> p, Rows<Compute<T>> weight, double* floored);

/// The same where the scores are those of all tokens: stat is written first, each row in one reading from memory.
template <class T>
void pattention_activate_all(const Stream& stream, PattentionNorm norm, double scale, Rows<const T> scores,
                             Rows<Compute<T>> stat, Rows<T> p, Rows<Compute<T>> weight, double* floored);

/// From dP (in d) to dscores of pattention_mix_backward in place, and P again; dot as there.
template <class T>
void pattention_activate_backward(const Stream& stream, PattentionNorm norm, double scale, Rows<const T> scores,
                                  Rows<const Compute<T>> stat, Rows<const Compute<T>> dweight, Rows<T> d, Rows<T> p,
                                  Rows<Compute<T>> dot);

/// l2_norm_gelu: d becomes (scale / r) (d - B dot / scale^2).
template <class T>
void pattention_through_norm(const Stream& stream, double scale, Rows<const T> scores, Rows<const Compute<T>> stat,
                             Rows<const Compute<T>> dot, Rows<T> d);

/// pattention_activate_backward() and what follows it, for scores of all tokens: from dP (in d) to dA in place, and P.
template <class T>
void pattention_activate_backward_all(const Stream& stream, PattentionNorm norm, double scale, Rows<const T> scores,
                                      Rows<const Compute<T>> stat, Rows<const Compute<T>> dweight, Rows<T> d,
                                      Rows<T> p);

template <class T>
void row_normalize_forward(const Stream& stream, PattentionNorm norm, double scale, Rows<const Compute<T>> u,
                           Rows<const Compute<T>> weight, Rows<T> y, double* floored);
template <class T>
void row_normalize_backward(const Stream& stream, PattentionNorm norm, double scale, Rows<const Compute<T>> u,
                            Rows<const Compute<T>> weight, Rows<const T> dy, Rows<Compute<T>> du,
                            Rows<Compute<T>> dweight);

}  // namespace tforge::kernels::cuda
