#include "kernels/cuda/pattention.h"

#include <cstddef>
#include <iterator>
#include <string>
#include <type_traits>

#include "core/errors.h"
#include "core/log.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/pattention_rows.h"
#include "kernels/cuda/pattention_scores.h"
#include "kernels/cuda/timing.h"
#include "kernels/device_libraries.h"

namespace tforge::kernels::cuda {

namespace {

/// A [rows, columns] matrix of T at element `offset` of a workspace.
template <class T>
TensorView scratch(const TensorView& workspace, std::int64_t offset, std::int64_t rows, std::int64_t columns) {
  return {workspace
              ? static_cast<std::byte*>(workspace.data) + offset * static_cast<std::int64_t>(size_of(workspace.dtype))
              : nullptr,
          dtype_of<T>::value, Device::cuda, Shape{rows, columns}, columns};
}

/// Whether scores and statistic come from one kernel rather than from product and row pass: as is known for these
/// sizes, else as is faster where that may be measured. By the sizes alone, so that scores that are computed once more
/// have the bits of the first ones.
template <class Products, class Fused>
bool scores_are_fused(const Stream& stream, PattentionNorm norm, const ConstTensorView& x, const ConstTensorView& keys,
                      const Products& products, const Fused& fused) {
  constexpr const char *kProducts = "products", *kFused = "fused";
  if (norm == PattentionNorm::gelu_l2_norm || x.rows() == 0 || keys.rows() == 0) return false;
  if (stream.libraries() == nullptr || !stream.libraries()->choices().any()) return false;
  Choices& choices = stream.libraries()->choices();
  thread_local std::string question;  // whose memory is asked for once
  question.clear();
  fmt::format_to(std::back_inserter(question), "pattention_scores bf16 {} {},{},{}", name_of(norm), x.rows(),
                 keys.rows(), x.columns());
  const std::string* known = choices.find(question);
  if (known == nullptr && choices.measures()) {
    const float by_products = least_milliseconds(stream, products), in_one = least_milliseconds(stream, fused);
    choices.keep(question, in_one < by_products ? kFused : kProducts);
    known = choices.find(question);
    log::info("{}: {:.4f} ms by products, {:.4f} ms fused", question, by_products, in_one);
  }
  if (known == nullptr || *known == kProducts) return false;
  if (*known == kFused) return true;
  throw DataError("{} is damaged: \"{}\" is no way to compute {}; remove it, and they are measured anew",
                  choices.source(), *known, question);
}

}  // namespace

template <class T>
void pattention_scores_forward(const Stream& stream, PattentionNorm norm, ConstTensorView x, ConstTensorView keys,
                               TensorView scores, TensorView stat, TensorView workspace) {
  const auto products = [&] {
    gemm<T>(stream, Op::as_it_is, Op::transposed, 1, x, keys, GradMode::overwrite, scores);
    if (stat) pattention_statistic<T>(stream, norm, scores, stat);
  };
  if constexpr (std::is_same_v<T, bf16>) {
    const auto fused = [&] {
      pattention_scores_fused(stream, norm, x, keys, scores, stat, static_cast<float*>(workspace.data));
    };
    if (scores_are_fused(stream, norm, x, keys, products, fused)) return fused();
  }
  products();
}

template <class T>
void pattention_mix_forward(const Stream& stream, PattentionNorm norm, double scale, ConstTensorView scores,
                            ConstTensorView stat, ConstTensorView values, TensorView u, TensorView weight,
                            double* floored, TensorView workspace) {
  const TensorView p = scratch<T>(workspace, 0, scores.rows(), scores.columns());
  pattention_activate<T>(stream, norm, scale, scores, stat, p, weight, floored);
  gemm<T>(stream, Op::as_it_is, Op::as_it_is, 1, p, values, GradMode::overwrite, u);
}

template <class T>
void pattention_forward(const Stream& stream, PattentionNorm norm, ConstTensorView x,
                        std::span<const PattentionForward> layers, double* floored, TensorView workspace) {
  for (const PattentionForward& l : layers) {  // one after another: the workspace of one is enough
    const TensorView p = scratch<T>(workspace, 0, l.scores.rows(), l.scores.columns());
    const auto products = [&](double* counter) {
      gemm<T>(stream, Op::as_it_is, Op::transposed, 1, x, l.keys, GradMode::overwrite, l.scores);
      pattention_activate_all<T>(stream, norm, l.scale, l.scores, l.stat, p, l.weight, counter);
    };
    const auto start = [&] {
      if constexpr (std::is_same_v<T, bf16>) {
        const auto fused = [&](double* counter) {
          pattention_scores_fused(stream, norm, x, l.keys, l.scores, l.stat, static_cast<float*>(workspace.data));
          pattention_activate<T>(stream, norm, l.scale, l.scores, l.stat, p, l.weight, counter);
        };
        // What is measured counts no rows.
        const bool is_fused = scores_are_fused(
            stream, norm, x, l.keys, [&] { products(nullptr); }, [&] { fused(nullptr); });
        if (is_fused) return fused(floored);
      }
      products(floored);
    };
    start();
    gemm<T>(stream, Op::as_it_is, Op::as_it_is, 1, p, l.values, GradMode::overwrite, l.u);
  }
}

template <class T>
void pattention_mix_backward(const Stream& stream, PattentionNorm norm, double scale, ConstTensorView scores,
                             ConstTensorView stat, ConstTensorView values, ConstTensorView du, ConstTensorView dweight,
                             GradMode dvalues_mode, TensorView dvalues, TensorView dscores, TensorView dot,
                             TensorView workspace) {
  const TensorView p = scratch<T>(workspace, 0, scores.rows(), scores.columns());
  gemm<T>(stream, Op::as_it_is, Op::transposed, 1, du, values, GradMode::overwrite, dscores);
  pattention_activate_backward<T>(stream, norm, scale, scores, stat, dweight, dscores, p, dot);
  if (dvalues) gemm<T>(stream, Op::transposed, Op::as_it_is, 1, p, du, dvalues_mode, dvalues);
}

/// dX and dK from dA.
template <class T>
void products_backward(const Stream& stream, ConstTensorView da, ConstTensorView x, ConstTensorView keys,
                       GradMode dx_mode, TensorView dx, GradMode dkeys_mode, TensorView dkeys) {
  if (dx) gemm<T>(stream, Op::as_it_is, Op::as_it_is, 1, da, keys, dx_mode, dx);
  if (dkeys) gemm<T>(stream, Op::transposed, Op::as_it_is, 1, da, x, dkeys_mode, dkeys);
}

template <class T>
void pattention_scores_backward(const Stream& stream, PattentionNorm norm, double scale, ConstTensorView scores,
                                ConstTensorView stat, ConstTensorView dot, ConstTensorView x, ConstTensorView keys,
                                TensorView dscores, GradMode dx_mode, TensorView dx, GradMode dkeys_mode,
                                TensorView dkeys) {
  if (norm == PattentionNorm::l2_norm_gelu) pattention_through_norm<T>(stream, scale, scores, stat, dot, dscores);
  products_backward<T>(stream, dscores, x, keys, dx_mode, dx, dkeys_mode, dkeys);
}

template <class T>
void pattention_backward(const Stream& stream, PattentionNorm norm, ConstTensorView x,
                         std::span<const PattentionBackward> layers, GradMode dx_mode, TensorView dx,
                         TensorView workspace) {
  for (const PattentionBackward& l : layers) {
    const std::int64_t rows = x.rows(), tokens = l.keys.rows();
    const TensorView p = scratch<T>(workspace, 0, rows, tokens), d = scratch<T>(workspace, rows * tokens, rows, tokens);
    gemm<T>(stream, Op::as_it_is, Op::transposed, 1, l.du, l.values, GradMode::overwrite, d);
    pattention_activate_backward_all<T>(stream, norm, l.scale, l.scores, l.stat, l.dweight, d, p);
    if (l.dvalues) gemm<T>(stream, Op::transposed, Op::as_it_is, 1, p, l.du, l.dvalues_mode, l.dvalues);
    products_backward<T>(stream, d, x, l.keys, dx_mode, dx, l.dkeys_mode, l.dkeys);
    dx_mode = GradMode::accumulate;
  }
}

#define TFORGE_INSTANTIATE(T)                                                                                          \
  template void pattention_scores_forward<T>(const Stream&, PattentionNorm, ConstTensorView, ConstTensorView,          \
                                             TensorView, TensorView, TensorView);                                      \
  template void pattention_mix_forward<T>(const Stream&, PattentionNorm, double, ConstTensorView, ConstTensorView,     \
                                          ConstTensorView, TensorView, TensorView, double*, TensorView);               \
  template void pattention_forward<T>(const Stream&, PattentionNorm, ConstTensorView,                                  \
                                      std::span<const PattentionForward>, double*, TensorView);                        \
  template void pattention_mix_backward<T>(const Stream&, PattentionNorm, double, ConstTensorView, ConstTensorView,    \
                                           ConstTensorView, ConstTensorView, ConstTensorView, GradMode, TensorView,    \
                                           TensorView, TensorView, TensorView);                                        \
  template void pattention_scores_backward<T>(const Stream&, PattentionNorm, double, ConstTensorView, ConstTensorView, \
                                              ConstTensorView, ConstTensorView, ConstTensorView, TensorView, GradMode, \
                                              TensorView, GradMode, TensorView);                                       \
  template void pattention_backward<T>(const Stream&, PattentionNorm, ConstTensorView,                                 \
                                       std::span<const PattentionBackward>, GradMode, TensorView, TensorView)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
TFORGE_INSTANTIATE(bf16);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cuda
