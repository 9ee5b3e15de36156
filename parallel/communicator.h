#pragma once
// Communication between the ranks of a job: a few verbs over typed views, counted in elements.
//
// MPI is called from the thread that created the world, and from no other. Every collective is watched
// (parallel/heartbeat.h): one that does not finish in time ends the job with exit code 12 and a line that names the
// rank that is missing or stuck, its host and process, and what it was doing.
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/device.h"
#include "core/tensor.h"

namespace tforge {

enum class ReduceOp : std::uint8_t { sum, max };

class Communicator {
 public:
  virtual ~Communicator() = default;
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  virtual int rank() const = 0;
  virtual int size() const = 0;

  /// The ranks with the same `color`, ordered by `key`. Collective.
  virtual std::unique_ptr<Communicator> split(int color, int key) = 0;
  virtual void barrier() = 0;
  /// `x` (contiguous, any dtype) of `root` becomes everyone's. Collective.
  virtual void broadcast(Stream& stream, TensorView x, int root) = 0;
  /// In place; f32, f64 or i32, contiguous. Every rank gets the same bits. Collective.
  virtual void all_reduce(Stream& stream, TensorView x, ReduceOp op) = 0;
  /// Rank r contributes `send` of counts[r] elements; `receive` holds all contributions in rank order. Contiguous,
  /// same dtype. counts.size() == size(), send.elements() == counts[rank()]. Collective. `send` may be this rank's part
  /// of `receive`.
  virtual void all_gather(Stream& stream, ConstTensorView send, TensorView receive,
                          std::span<const std::int64_t> counts) = 0;
  /// `send` holds one block of counts[r] elements for each rank r in rank order; `receive` (counts[rank()] elements)
  /// becomes the sum over ranks of this rank's block. f32 or f64. Collective. `receive` may be this rank's block of
  /// `send` itself; the other blocks then hold nothing of use afterwards.
  virtual void reduce_scatter(Stream& stream, ConstTensorView send, TensorView receive,
                              std::span<const std::int64_t> counts) = 0;
  /// Begins a sum of `x` (f32 or f64, contiguous) over the ranks, in place, on rank `root` or with kEveryRank on all of
  /// them, and returns: `x` belongs to the communicator until finish(). On the other ranks `x` stays as it is.
  /// What was started goes on inside progress() and finish(), and inside any other collective of the process. Every
  /// rank starts the same ones in the same order; until finish() no other verb of this communicator may be called
  /// (InternalError). Every rank gets the same bits, which need not be those of all_reduce. Collective.
  virtual void start_reduce(Stream& stream, TensorView x, int root) = 0;
  static constexpr int kEveryRank = -1;
  /// Moves on what was started, without waiting. Cheap when there is nothing. Not collective.
  virtual void progress() = 0;
  /// Waits until all that was started is complete. Does nothing when there is nothing.
  virtual void finish() = 0;
  /// Everyone's `bytes`, in rank order; lengths may differ. For small control data, not for tensors. Collective.
  virtual std::vector<std::string> all_gather_bytes(const std::string& bytes) = 0;

  /// Runs `f`, which waits for the same of other ranks, as a collective that is watched under that name.
  virtual void watched(const char* verb, std::uint64_t bytes, const std::function<void()>& f) = 0;

  /// Ends the whole job at once with `code`; does not return. Not collective.
  [[noreturn]] virtual void abort(int code) = 0;
  /// Collective; called once, last, on the normal path of the world. A world destroyed without it aborts the job.
  virtual void shutdown() = 0;

  /// What the bits of its sums depend on beside operands and layout: a library and its version, or nothing.
  virtual std::string bits_depend_on() const { return {}; }

  /// What this rank did so far. A blocking collective is exposed as a whole; of one that was started, what its rank
  /// spent in start_reduce, progress and finish.
  struct Traffic {
    std::uint64_t calls = 0;     // collectives called or started
    std::uint64_t bytes = 0;     // handed to them
    double seconds = 0;          // with a collective under way, from the first start until none was
    double exposed_seconds = 0;  // inside the verbs: the rank could do nothing else
  };
  virtual Traffic traffic() const = 0;

 protected:
  Communicator() = default;
};

struct WorldOptions {
  double timeout_seconds = 600;   // for the start of MPI and for one collective; 0 waits for ever
  std::string heartbeat = "udp";  // "udp", "udp:INTERFACE" or "local" (parallel/heartbeat.h)
  int expect_ranks = 0;           // 0: no expectation beyond what the launcher says
  // Elements of one MPI call, whose counts are int: larger tensors go in pieces. Tests lower it.
  std::int64_t max_count = std::numeric_limits<std::int32_t>::max();
};

/// Whether WorldOptions::heartbeat may be this.
bool is_heartbeat_channel(std::string_view channel);

/// Starts MPI and returns all ranks of the job. Throws ResourceError when the number of MPI ranks differs from what the
/// launcher says it started (SLURM_NTASKS under srun, OMPI_COMM_WORLD_SIZE under mpirun) or from
/// `expect_ranks`: otherwise N independent models would be trained. The text says how to launch. Throws ResourceError
/// when the ranks cannot hear each other's heartbeats. A rank whose launcher is gone before MPI has started, or whose
/// MPI does not start in time, says so and ends with exit code 12.
std::unique_ptr<Communicator> create_world(const WorldOptions& options);

/// A communicator of one rank that needs no MPI.
std::unique_ptr<Communicator> create_self();

/// Rank `rank` of a communicator of `size` ranks of which the others do not exist. Calls and bytes are counted and
/// nothing is sent: what the others would give stays as it is. For rehearsals and measurements of one rank
/// (train/lone_rank.h).
std::unique_ptr<Communicator> create_lone(int rank, int size);

/// Says in the heartbeats what the rank is doing ("forward", step 12). Cheap; a string literal.
void set_phase(const char* phase, std::int64_t step = -1);
/// And where in the model, until the next set_phase: the path of a parameter. Cheap; its first 39 characters are kept.
void set_place(std::string_view place);

}  // namespace tforge
