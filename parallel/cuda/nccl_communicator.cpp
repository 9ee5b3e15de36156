// Collectives of tensors on a device by NCCL.
//
// A communicator queues them on a stream of its own: that one waits for the compute stream by an event, and the compute
// stream for it, at once or, after start_reduce, in finish. The host only queues. What was queued is kept in one list
// for the device, in order, until its events have come; the host goes through it before it waits for the device.
#include "parallel/cuda/nccl_communicator.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/cuda/runtime.h"
#include "core/device_queue.h"
#include "core/errors.h"
#include "parallel/cuda/nccl_library.h"
#include "parallel/device_communicator.h"
#include "parallel/heartbeat.h"

namespace tforge::cuda {
namespace {

class NcclCommunicator;

/// A collective on the device: the compute stream came to it, and it is done. `since` is set for finish(), where the
/// first of those that it waits for was started.
struct Queued {
  NcclCommunicator* owner = nullptr;
  const char* verb = "";
  std::uint64_t bytes = 0;
  cudaEvent_t since = nullptr, ready = nullptr, done = nullptr;
};

/// What the communicators of one device share.
class DeviceJob final : public WaitWatch {
 public:
  DeviceJob(const Stream& stream, int world_rank)
      : world_rank_(world_rank), stream_(stream), before_(tforge::set_wait_watch(this)) {}
  ~DeviceJob() override {
    tforge::set_wait_watch(before_);
    for (cudaEvent_t event : events_) cudaEventDestroy(event);
  }
  DeviceJob(const DeviceJob&) = delete;
  DeviceJob& operator=(const DeviceJob&) = delete;

  int world_rank() const { return world_rank_; }
  cudaStream_t compute() const { return static_cast<cudaStream_t>(stream_.native()); }

  cudaEvent_t record(cudaStream_t stream) {
    if (free_.empty()) {
      cudaEvent_t event = nullptr;
      check(cudaEventCreate(&event), "cudaEventCreate");
      events_.push_back(event);
      free_.push_back(event);
    }
    cudaEvent_t event = free_.back();
    free_.pop_back();
    check(cudaEventRecord(event, stream), "cudaEventRecord");
    return event;
  }
  void add(NcclCommunicator& communicator) { communicators_.push_back(&communicator); }
  void remove(NcclCommunicator& communicator) {
    std::erase(communicators_, &communicator);
    std::erase_if(queued_, [&](const Queued& q) { return q.owner == &communicator; });
  }

  void push(const Queued& queued) {
    queued_.push_back(queued);
    poll();
  }
  /// Forgets what is done, without waiting.
  void poll();
  void before_wait() override;
  /// The oldest of what `communicator` has queued; null when there is none.
  const Queued* oldest_of(const NcclCommunicator& communicator) const {
    const auto found = std::ranges::find(queued_, &communicator, &Queued::owner);
    return found == queued_.end() ? nullptr : &*found;
  }

 private:
  static bool come(cudaEvent_t event) {
    const cudaError_t status = cudaEventQuery(event);
    if (status == cudaErrorNotReady) return false;
    check(status, "cudaEventQuery");
    return true;
  }
  void wait_for(cudaEvent_t event) {
    for (unsigned turn = 1; !come(event); ++turn) {
      if (turn % 1024 == 0) check_health();
      std::this_thread::yield();
    }
  }
  void retire();
  void check_health();

  const int world_rank_;
  const Stream stream_;
  WaitWatch* const before_;
  std::vector<NcclCommunicator*> communicators_;
  std::deque<Queued> queued_;
  std::vector<cudaEvent_t> events_, free_;
};

ncclDataType_t nccl_type(DType dtype) {
  switch (dtype) {
    case DType::f32: return ncclFloat32;
    case DType::f64: return ncclFloat64;
    case DType::bf16: return ncclBfloat16;
    case DType::i32: return ncclInt32;
  }
  throw InternalError("no NCCL type for {}", name_of(dtype));
}

std::uint64_t bytes_of(const ConstTensorView& x) { return static_cast<std::uint64_t>(x.elements()) * size_of(x.dtype); }
std::size_t as_size(std::int64_t elements) { return static_cast<std::size_t>(elements); }

double seconds_between(cudaEvent_t begin, cudaEvent_t end) {
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
  return std::max(0.0, static_cast<double>(milliseconds) / 1000);  // of events of two streams in any order
}

class NcclCommunicator final : public DeviceCommunicator {
 public:
  template <class Host>
  NcclCommunicator(Host&& host_communicator, std::shared_ptr<DeviceJob> job)
      : DeviceCommunicator(std::forward<Host>(host_communicator)), job_(std::move(job)) {
    int least = 0, greatest = 0;
    check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
    // Before the kernels of backward, which would leave it no room.
    check(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest), "cudaStreamCreate");
    job_->add(*this);
  }
  /// Asks no other rank. On the normal path the ranks have met since the last collective was done on all of them.
  ~NcclCommunicator() override {
    job_->remove(*this);
    if (comm_ != nullptr) nccl().ncclCommAbort(comm_);
    cudaStreamDestroy(stream_);
  }

  void progress() override {
    host().progress();
    if (started_) job_->poll();
  }

  void finish() override {
    host().finish();
    if (!started_) return;
    started_ = false;
    const cudaEvent_t ready = job_->record(job_->compute()), done = job_->record(stream_);
    make_wait(job_->compute(), done);
    job_->push({this, "finish", std::exchange(started_bytes_, 0), since_, ready, done});
  }

  std::string bits_depend_on() const override {
    int version = 0;
    require("ncclGetVersion", nccl().ncclGetVersion(&version));
    return fmt::format("NCCL {}", version);
  }

  Traffic traffic() const override {
    Traffic sum = host().traffic();
    sum.calls += traffic_.calls;
    sum.bytes += traffic_.bytes;
    sum.seconds += traffic_.seconds;
    sum.exposed_seconds += traffic_.exposed_seconds;
    return sum;
  }

  /// Counts the time of a collective that is done. One that was started is counted by its finish().
  void count(const Queued& q) {
    const bool is_finish = q.since != nullptr;
    if (!is_finish && q.verb == kStarted) return;
    traffic_.exposed_seconds += seconds_between(q.ready, q.done);
    traffic_.seconds += seconds_between(is_finish ? q.since : q.ready, q.done);
  }

  /// Watches `wait`, which returns when the collective is done.
  void watch(const Queued& q, const std::function<void()>& wait) { host().watched(q.verb, q.bytes, wait); }

  /// Ends the job when NCCL has met an error after a collective was queued.
  void check_health() {
    if (comm_ == nullptr) return;
    ncclResult_t state = ncclSuccess;
    const ncclResult_t asked = nccl().ncclCommGetAsyncError(comm_, &state);
    if (asked != ncclSuccess) state = asked;
    if (state == ncclSuccess || state == ncclInProgress) return;
    const Queued* oldest = job_->oldest_of(*this);
    const std::string what =
        oldest == nullptr ? "a collective" : fmt::format("{} of {} bytes", oldest->verb, oldest->bytes);
    const std::string report = fmt::format("rank {} ({} of {} in its group): {} failed on the device: NCCL: {}",
                                           job_->world_rank(), rank(), size(), what, text_of(state));
    Heartbeat::end_process(report);  // and with it what this communicator has under way
  }

 private:
  static constexpr const char* kStarted = "start_reduce";

  std::unique_ptr<Communicator> on_device(std::unique_ptr<Communicator> part) override {
    return std::make_unique<NcclCommunicator>(std::move(part), job_);
  }
  bool adds_bf16() const override { return true; }
  void require_finished(const char* verb) const override {
    if (started_) throw InternalError("{} before finish() of what was started", verb);
  }

  void device_broadcast(Stream& stream, TensorView x, int root) override {
    run(stream, "broadcast", bytes_of(x), x.elements(), [&] {
      return nccl().ncclBroadcast(x.data, x.data, as_size(x.elements()), nccl_type(x.dtype), root, comm_, stream_);
    });
  }

  void device_all_reduce(Stream& stream, TensorView x, ReduceOp op) override {
    run(stream, "all_reduce", bytes_of(x), x.elements(), [&] {
      return nccl().ncclAllReduce(x.data, x.data, as_size(x.elements()), nccl_type(x.dtype),
                                  op == ReduceOp::sum ? ncclSum : ncclMax, comm_, stream_);
    });
  }

  void device_all_gather(Stream& stream, ConstTensorView send, TensorView receive,
                         std::span<const std::int64_t> counts) override {
    const ncclDataType_t type = nccl_type(send.dtype);
    run(stream, "all_gather", bytes_of(send), receive.elements(), [&] {
      if (even(counts)) return nccl().ncclAllGather(send.data, receive.data, as_size(counts[0]), type, comm_, stream_);
      return for_each_block(counts, receive, [&](int r, TensorView block) {
        const void* from = r == rank() ? send.data : block.data;
        return nccl().ncclBroadcast(from, block.data, as_size(block.elements()), type, r, comm_, stream_);
      });
    });
  }

  void device_reduce_scatter(Stream& stream, ConstTensorView send, TensorView receive,
                             std::span<const std::int64_t> counts) override {
    const ncclDataType_t type = nccl_type(send.dtype);
    run(stream, "reduce_scatter", bytes_of(send), send.elements(), [&] {
      if (even(counts)) {
        return nccl().ncclReduceScatter(send.data, receive.data, as_size(counts[0]), type, ncclSum, comm_, stream_);
      }
      return for_each_block(counts, send, [&](int r, ConstTensorView block) {
        // Of the other ranks it is not written.
        void* to = r == rank() ? receive.data : const_cast<void*>(block.data);
        return nccl().ncclReduce(block.data, to, as_size(block.elements()), type, ncclSum, r, comm_, stream_);
      });
    });
  }

  void device_start_reduce(Stream& stream, TensorView x, int root) override {
    const std::uint64_t bytes = bytes_of(x);
    count_call(bytes);
    if (x.elements() == 0) return;
    if (!started_) since_ = job_->record(native(stream));
    started_ = true;
    started_bytes_ += bytes;
    queue(stream, kStarted, bytes, [&] {
      const ncclDataType_t type = nccl_type(x.dtype);
      return root == kEveryRank
                 ? nccl().ncclAllReduce(x.data, x.data, as_size(x.elements()), type, ncclSum, comm_, stream_)
                 : nccl().ncclReduce(x.data, x.data, as_size(x.elements()), type, ncclSum, root, comm_, stream_);
    });
  }

  /// A collective that what is queued on `stream` after it waits for.
  template <class F>
  void run(Stream& stream, const char* verb, std::uint64_t bytes, std::int64_t elements_of_all, F&& f) {
    count_call(bytes);
    if (elements_of_all > 0) make_wait(native(stream), queue(stream, verb, bytes, f));
  }

  /// Queues f() behind what is on `stream`. Returns the event of its end.
  template <class F>
  cudaEvent_t queue(Stream& stream, const char* verb, std::uint64_t bytes, F&& f) {
    connect();
    const cudaEvent_t ready = job_->record(native(stream));
    make_wait(stream_, ready);
    // The first of a kind connects the ranks, and waits for them.
    host().watched(verb, bytes, [&] { require(verb, f()); });
    const cudaEvent_t done = job_->record(stream_);
    job_->push({this, verb, bytes, nullptr, ready, done});
    return done;
  }

  /// Makes the group of ranks, once. Rank 0 draws its name.
  void connect() {
    if (comm_ != nullptr) return;
    ncclUniqueId id{};
    if (rank() == 0) require("ncclGetUniqueId", nccl().ncclGetUniqueId(&id));
    const std::string bytes = host().all_gather_bytes(
        rank() == 0 ? std::string(reinterpret_cast<const char*>(&id), sizeof(id)) : std::string())[0];
    std::memcpy(&id, bytes.data(), sizeof(id));
    host().watched("connect", 0,
                   [&] { require("ncclCommInitRank", nccl().ncclCommInitRank(&comm_, size(), id, rank())); });
  }

  static bool even(std::span<const std::int64_t> counts) {
    return std::ranges::adjacent_find(counts, std::ranges::not_equal_to()) == counts.end();
  }

  /// Calls f(rank, its block of `all`) for the blocks that are not empty, as one collective.
  template <class View, class F>
  ncclResult_t for_each_block(std::span<const std::int64_t> counts, const View& all, F&& f) {
    const View flat{all.data, all.dtype, all.device, Shape{all.elements(), 1}, 1};
    ncclResult_t result = nccl().ncclGroupStart();
    std::int64_t first = 0;
    for (std::size_t r = 0; r < counts.size(); ++r) {
      if (counts[r] > 0 && result == ncclSuccess) {
        result = f(static_cast<int>(r), flat.row_range(first, counts[r]));
      }
      first += counts[r];
    }
    const ncclResult_t end = nccl().ncclGroupEnd();
    return result == ncclSuccess ? end : result;
  }

  void count_call(std::uint64_t bytes) {
    ++traffic_.calls;
    traffic_.bytes += bytes;
  }
  std::string text_of(ncclResult_t result) const {
    const char* last = nccl().ncclGetLastError(comm_);
    return fmt::format("{}{}{}", nccl().ncclGetErrorString(result), last != nullptr && *last != '\0' ? ": " : "",
                       last == nullptr ? "" : last);
  }
  void require(const char* verb, ncclResult_t result) const {
    if (result == ncclSuccess) return;
    throw CommunicationError("rank {}: {} failed: NCCL: {}", job_->world_rank(), verb, text_of(result));
  }
  static cudaStream_t native(const Stream& stream) { return static_cast<cudaStream_t>(stream.native()); }
  static void make_wait(cudaStream_t stream, cudaEvent_t event) {
    check(cudaStreamWaitEvent(stream, event, 0), "cudaStreamWaitEvent");
  }

  std::shared_ptr<DeviceJob> job_;
  cudaStream_t stream_ = nullptr;
  ncclComm_t comm_ = nullptr;
  Traffic traffic_;
  bool started_ = false;         // and not finished
  cudaEvent_t since_ = nullptr;  // where the first of them was
  std::uint64_t started_bytes_ = 0;
};

void DeviceJob::retire() {
  const Queued q = queued_.front();
  queued_.pop_front();
  q.owner->count(q);
  for (cudaEvent_t event : {q.since, q.ready, q.done}) {
    if (event != nullptr) free_.push_back(event);
  }
}

void DeviceJob::poll() {
  check_health();
  // Of a finish() nothing orders the two.
  while (!queued_.empty() && come(queued_.front().ready) && come(queued_.front().done)) retire();
}

void DeviceJob::before_wait() {
  check_health();
  while (!queued_.empty()) {
    const Queued& q = queued_.front();
    wait_for(q.ready);  // this rank's own work
    if (!come(q.done)) q.owner->watch(q, [&] { wait_for(q.done); });
    retire();
  }
  check_health();
}

void DeviceJob::check_health() {
  for (NcclCommunicator* communicator : communicators_) communicator->check_health();
}

}  // namespace

std::unique_ptr<Communicator> create_nccl(Communicator& world, const Stream& stream) {
  nccl();  // or an error
  return std::make_unique<NcclCommunicator>(world, std::make_shared<DeviceJob>(stream, world.rank()));
}

}  // namespace tforge::cuda
