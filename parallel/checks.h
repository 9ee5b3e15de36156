#pragma once
// Checks of arguments that every communicator makes before it sends anything. Private to parallel/.
#include <cstdint>
#include <span>

#include "core/tensor.h"

namespace tforge::checks {

/// `x` is in the memory of the CPU. Throws DeviceError naming `verb`.
void on_host(const char* verb, const ConstTensorView& x);
/// `x` is contiguous. Throws ShapeError naming `verb`.
void sendable(const char* verb, const ConstTensorView& x);
/// `dtype` can be summed. Throws DTypeError naming `verb`.
void floating(const char* verb, DType dtype);
/// One dtype; one count a rank, none negative; `mine` holds counts[rank] elements, `all` holds their sum.
/// Throws DTypeError or ShapeError naming `verb`.
void blocks(const char* verb, const ConstTensorView& mine, const ConstTensorView& all,
            std::span<const std::int64_t> counts, int rank, int size);
/// 0 <= root < size. Throws InternalError naming `verb`.
void root(const char* verb, int root, int size);

}  // namespace tforge::checks
