#pragma once
// How much memory a training step takes beside parameters, gradients and moments.
#include <cstddef>
#include <cstdint>

#include "autograd/saved.h"
#include "core/dtype.h"
#include "model/config.h"
#include "model/shard_plan.h"

namespace tforge {

/// Bytes of activations, workspace and communication buffers that tensor-parallel rank `tp_rank` holds at the peak of a
/// forward and backward pass over `batch` sequences of `seq` tokens: what its ops keep for backward
/// under `saves`, and on top of it the larger of what the head takes and what going back through a layer takes.
/// Asked for with the number of threads (OpenMP) that the kernels will run with.
std::size_t activation_bytes(const ModelConfig& config, const ShardPlan& plan, int tp_rank, DType dtype,
                             const SavePolicy& saves, std::int64_t batch, std::int64_t seq);

}  // namespace tforge
