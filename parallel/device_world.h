#pragma once
// Communicators for tensors on a CUDA device: over another one, which carries everything that is in the host's memory
// (small numbers, control data, heartbeats), and which outlives them.
#include <cstdint>
#include <memory>

#include "core/device.h"
#include "parallel/communicator.h"

namespace tforge {

/// Whether each rank of a host has a device of its own, or some use one together.
enum class DeviceUse : std::uint8_t { own, shared };

/// Tensors on a device go through pinned memory of the host, so that several ranks may use one device. The host waits
/// for `stream` in every verb; what a verb writes to the device is queued there.
std::unique_ptr<Communicator> create_staged(Communicator& world, const Stream& stream);

/// Tensors on a device are NCCL's, which is loaded here; each rank has a device of its own. `stream` is the one of all
/// tensors. A communicator makes its group of ranks at its first tensor, before which nothing of the host may be under
/// way, and has a queue of its own on the device, ordered with `stream` by events: no verb waits. While the host waits
/// for `stream`, the oldest collective is watched like those of the host; an error of NCCL ends the job with code 12.
/// Throws DeviceError when NCCL cannot be loaded, InternalError for a stream of the CPU.
std::unique_ptr<Communicator> create_nccl(Communicator& world, const Stream& stream);

}  // namespace tforge
