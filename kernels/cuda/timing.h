#pragma once
// The time of one algorithm among several.
#include <functional>

#include "core/device.h"

namespace tforge::kernels::cuda {

/// Milliseconds of what `run` queues on `stream`: the least of three means of four runs each, after one run that is not
/// counted. The host waits. Throws DeviceError.
float least_milliseconds(const Stream& stream, const std::function<void()>& run);

}  // namespace tforge::kernels::cuda
