// NCCL's entry points over MPI, put in NCCL's place on the loader's path: the communicator over NCCL, unchanged, then
// runs without several devices. Buffers go through the host, so that the ranks may use one device, or an emulated one.
// A collective is done when its call returns; a call that waits for another rank waits inside MPI.
//
// TFORGE_NCCL_SHIM_FAULT=<rank>:<n> makes the communicators of that rank of the world report an error after their nth
// collective, as NCCL does when a network or a device fails behind a call that had succeeded.
#include <cuda_runtime.h>
#include <mpi.h>
#include <nccl.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "core/bf16.h"

struct ncclComm {
  MPI_Comm ranks = MPI_COMM_NULL;
  int rank = 0;
  int size = 1;
  int collectives = 0;
};

namespace {

/// What a ncclUniqueId holds.
struct Name {
  int root = 0;  // rank of the world
  int number = 0;
};

int world_rank() {
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  return rank;
}

MPI_Datatype mpi_type(ncclDataType_t type) {
  switch (type) {
    case ncclInt32: return MPI_INT32_T;
    case ncclFloat32: return MPI_FLOAT;
    case ncclFloat64: return MPI_DOUBLE;
    case ncclBfloat16: return MPI_UINT16_T;  // its bits
    default: return MPI_DATATYPE_NULL;
  }
}
std::size_t bytes_of(std::size_t count, ncclDataType_t type) {
  int size = 0;
  MPI_Type_size(mpi_type(type), &size);
  return count * static_cast<std::size_t>(size);
}
/// y += x of bf16, given as its bits.
void add_bf16(void* x, void* y, int* count, MPI_Datatype*) {
  const auto* from = static_cast<const tforge::bf16*>(x);
  auto* to = static_cast<tforge::bf16*>(y);
  for (int i = 0; i < *count; ++i) to[i] = tforge::bf16(static_cast<float>(to[i]) + static_cast<float>(from[i]));
}
MPI_Op mpi_op(ncclRedOp_t op, ncclDataType_t type) {
  if (type == ncclBfloat16 && op == ncclSum) {
    static MPI_Op sum = [] {
      MPI_Op made = MPI_OP_NULL;
      MPI_Op_create(add_bf16, 1, &made);
      return made;
    }();
    return sum;
  }
  return op == ncclMax ? MPI_MAX : MPI_SUM;
}

/// Memory of a device from and to the host, behind what is on `stream`.
bool moved(void* to, const void* from, std::size_t bytes, cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream) == cudaSuccess &&
         cudaStreamSynchronize(stream) == cudaSuccess;
}

/// `f(in, out)` between host copies of what this rank sends and, if it does, gets.
template <class F>
ncclResult_t collective(ncclComm_t comm, const void* send, std::size_t send_bytes, void* receive,
                        std::size_t receive_bytes, cudaStream_t stream, F&& f) {
  ++comm->collectives;
  std::vector<char> in(send_bytes), out(receive_bytes);
  if (send_bytes > 0 && !moved(in.data(), send, send_bytes, stream)) return ncclUnhandledCudaError;
  if (f(in.data(), out.data()) != MPI_SUCCESS) return ncclSystemError;
  if (receive_bytes > 0 && !moved(receive, out.data(), receive_bytes, stream)) return ncclUnhandledCudaError;
  return ncclSuccess;
}

}  // namespace

// NOLINTBEGIN(readability-inconsistent-declaration-parameter-name): NCCL's differ
extern "C" {

/// Is in no other NCCL: tests ask for it (tests/support/nccl.h).
int tforge_nccl_over_mpi();
int tforge_nccl_over_mpi() { return 1; }

ncclResult_t ncclGetVersion(int* version) {
  *version = 0;
  return ncclSuccess;
}

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  static int number = 0;
  const Name name{world_rank(), ++number};
  std::memcpy(id->internal, &name, sizeof(name));
  return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank) {
  Name name;
  std::memcpy(&name, id.internal, sizeof(name));
  // Rank 0 hears who the others are, and tells them.
  std::vector<int> members(static_cast<std::size_t>(ranks));
  if (rank == 0) {
    members[0] = name.root;
    for (int r = 1; r < ranks; ++r) {
      int from[2] = {0, 0};
      MPI_Recv(from, 2, MPI_INT, MPI_ANY_SOURCE, name.number, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
      members[static_cast<std::size_t>(from[0])] = from[1];
    }
    for (int r = 1; r < ranks; ++r) {
      MPI_Send(members.data(), ranks, MPI_INT, members[static_cast<std::size_t>(r)], name.number, MPI_COMM_WORLD);
    }
  } else {
    const int self[2] = {rank, world_rank()};
    MPI_Send(self, 2, MPI_INT, name.root, name.number, MPI_COMM_WORLD);
    MPI_Recv(members.data(), ranks, MPI_INT, name.root, name.number, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
  }
  MPI_Group world = MPI_GROUP_NULL, group = MPI_GROUP_NULL;
  MPI_Comm_group(MPI_COMM_WORLD, &world);
  MPI_Group_incl(world, ranks, members.data(), &group);
  auto* made = new ncclComm{MPI_COMM_NULL, rank, ranks, 0};
  const int result = MPI_Comm_create_group(MPI_COMM_WORLD, group, name.number, &made->ranks);
  MPI_Group_free(&group);
  MPI_Group_free(&world);
  *comm = made;
  return result == MPI_SUCCESS ? ncclSuccess : ncclSystemError;
}

ncclResult_t ncclCommAbort(ncclComm_t comm) {
  delete comm;  // MPI's own is left: to free it is collective
  return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* state) {
  static const char* const fault = std::getenv("TFORGE_NCCL_SHIM_FAULT");
  int rank = 0, collectives = 0;
  const bool broken = fault != nullptr && std::sscanf(fault, "%d:%d", &rank, &collectives) == 2 &&
                      rank == world_rank() && comm->collectives >= collectives;
  *state = broken ? ncclRemoteError : ncclSuccess;
  return ncclSuccess;
}

const char* ncclGetErrorString(ncclResult_t result) {
  return result == ncclRemoteError ? "remote process exited or there was a network error" : "error";
}
const char* ncclGetLastError(ncclComm_t) { return "(by the shim)"; }

ncclResult_t ncclAllReduce(const void* send, void* receive, std::size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream) {
  const std::size_t bytes = bytes_of(count, type);
  return collective(comm, send, bytes, receive, bytes, stream, [&](const char* in, char* out) {
    return MPI_Allreduce(in, out, static_cast<int>(count), mpi_type(type), mpi_op(op, type), comm->ranks);
  });
}

ncclResult_t ncclReduce(const void* send, void* receive, std::size_t count, ncclDataType_t type, ncclRedOp_t op,
                        int root, ncclComm_t comm, cudaStream_t stream) {
  const std::size_t bytes = bytes_of(count, type);
  return collective(comm, send, bytes, receive, comm->rank == root ? bytes : 0, stream, [&](const char* in, char* out) {
    return MPI_Reduce(in, out, static_cast<int>(count), mpi_type(type), mpi_op(op, type), root, comm->ranks);
  });
}

ncclResult_t ncclBroadcast(const void* send, void* receive, std::size_t count, ncclDataType_t type, int root,
                           ncclComm_t comm, cudaStream_t stream) {
  const std::size_t bytes = bytes_of(count, type);
  return collective(comm, send, comm->rank == root ? bytes : 0, receive, bytes, stream, [&](const char* in, char* out) {
    if (comm->rank == root) std::memcpy(out, in, bytes);
    return MPI_Bcast(out, static_cast<int>(count), mpi_type(type), root, comm->ranks);
  });
}

ncclResult_t ncclAllGather(const void* send, void* receive, std::size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
  const std::size_t bytes = bytes_of(count, type);
  return collective(comm, send, bytes, receive, bytes * static_cast<std::size_t>(comm->size), stream,
                    [&](const char* in, char* out) {
                      return MPI_Allgather(in, static_cast<int>(count), mpi_type(type), out, static_cast<int>(count),
                                           mpi_type(type), comm->ranks);
                    });
}

ncclResult_t ncclReduceScatter(const void* send, void* receive, std::size_t receive_count, ncclDataType_t type,
                               ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
  const std::size_t bytes = bytes_of(receive_count, type);
  return collective(comm, send, bytes * static_cast<std::size_t>(comm->size), receive, bytes, stream,
                    [&](const char* in, char* out) {
                      return MPI_Reduce_scatter_block(in, out, static_cast<int>(receive_count), mpi_type(type),
                                                      mpi_op(op, type), comm->ranks);
                    });
}

ncclResult_t ncclGroupStart() { return ncclSuccess; }
ncclResult_t ncclGroupEnd() { return ncclSuccess; }

}  // extern "C"
// NOLINTEND(readability-inconsistent-declaration-parameter-name)
