#pragma once
// NCCL, loaded when several devices are first used together.
#include <nccl.h>

namespace tforge::cuda {

/// The functions that we use, under their own names.
#define TFORGE_NCCL_FUNCTIONS(F) \
  F(ncclGetVersion)              \
  F(ncclGetUniqueId)             \
  F(ncclCommInitRank)            \
  F(ncclCommAbort)               \
  F(ncclCommGetAsyncError)       \
  F(ncclGetErrorString)          \
  F(ncclGetLastError)            \
  F(ncclAllReduce)               \
  F(ncclReduce)                  \
  F(ncclBroadcast)               \
  F(ncclAllGather)               \
  F(ncclReduceScatter)           \
  F(ncclGroupStart)              \
  F(ncclGroupEnd)

struct Nccl {
#define TFORGE_MEMBER(name) decltype(&::name) name;
  TFORGE_NCCL_FUNCTIONS(TFORGE_MEMBER)
#undef TFORGE_MEMBER
};

/// Throws DeviceError, naming the file, when it cannot be loaded.
const Nccl& nccl();

}  // namespace tforge::cuda
