// The communicator over MPI: the only file that sees mpi.h.
//
// Sums are MPI's own. Open MPI gives every rank the same bits (each of its all-reduce algorithms adds a given element
// in one order, whichever rank does it) and the same bits in every run of the same ranks and sizes; blocking and
// non-blocking reductions are different algorithms.
#include <mpi.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <optional>
#include <string_view>

#include "core/errors.h"
#include "parallel/checks.h"
#include "parallel/communicator.h"
#include "parallel/heartbeat.h"
#include "parallel/start_watch.h"

namespace tforge {
namespace {

MPI_Datatype mpi_type(DType dtype) {
  switch (dtype) {
    case DType::f32: return MPI_FLOAT;
    case DType::f64: return MPI_DOUBLE;
    case DType::bf16: return MPI_UINT16_T;  // moved, never added
    case DType::i32: return MPI_INT32_T;
  }
  throw InternalError("no MPI type for {}", name_of(dtype));
}

std::uint64_t bytes_of(const ConstTensorView& x) { return static_cast<std::uint64_t>(x.elements()) * size_of(x.dtype); }

/// Address of an element.
void* at(void* data, std::int64_t element, DType dtype) {
  return static_cast<std::byte*>(data) + element * static_cast<std::int64_t>(size_of(dtype));
}
const void* at(const void* data, std::int64_t element, DType dtype) {
  return static_cast<const std::byte*>(data) + element * static_cast<std::int64_t>(size_of(dtype));
}

/// What the communicators of one process share. Their handles are freed by shutdown, not by their owners: freeing is
/// collective, and a destructor must not wait for another rank.
struct Job {
  Job(int rank, int ranks) : heartbeat(rank, ranks) {}
  Heartbeat heartbeat;
  std::int64_t max_count = WorldOptions().max_count;
  std::vector<MPI_Comm> split_off;  // in the order of their creation
  bool finished = false;
};

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

class MpiCommunicator final : public Communicator {
 public:
  MpiCommunicator(MPI_Comm comm, std::shared_ptr<Job> job) : comm_(comm), job_(std::move(job)) {
    MPI_Comm_rank(comm_, &rank_);
    MPI_Comm_size(comm_, &size_);
    counts_.resize(static_cast<std::size_t>(size_));
    offsets_.resize(static_cast<std::size_t>(size_));
  }
  ~MpiCommunicator() override {
    // The normal path calls shutdown; this one is an exception that nobody caught.
    if (comm_ == MPI_COMM_WORLD && !job_->finished) abort(static_cast<int>(ExitCode::internal));
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }

  std::unique_ptr<Communicator> split(int color, int key) override {
    if (color < 0) throw InternalError("split: color {}, want 0 or more", color);
    MPI_Comm part = MPI_COMM_NULL;
    int ranks = 0;
    {
      const Call call(*this, "split", 0);
      call.check(MPI_Comm_split(comm_, color, key, &part));
      MPI_Comm_size(part, &ranks);
      job_->split_off.push_back(part);
    }
    if (ranks == 1) return create_self();
    return std::make_unique<MpiCommunicator>(part, job_);
  }

  void barrier() override {
    const Call call(*this, "barrier", 0);
    call.check(MPI_Barrier(comm_));
  }

  void broadcast(Stream&, TensorView x, int root) override {
    checks::on_host("broadcast", x);
    checks::sendable("broadcast", x);
    checks::root("broadcast", root, size_);
    const Call call(*this, "broadcast", bytes_of(x));
    broadcast_pieces(call, x.data, x.elements(), x.dtype, root);
  }

  void all_reduce(Stream&, TensorView x, ReduceOp op) override {
    checks::on_host("all_reduce", x);
    checks::sendable("all_reduce", x);
    if (x.dtype != DType::i32) checks::floating("all_reduce", x.dtype);
    const Call call(*this, "all_reduce", bytes_of(x));
    for_each_piece(x.elements(), [&](std::int64_t first, int count) {
      call.check(MPI_Allreduce(MPI_IN_PLACE, at(x.data, first, x.dtype), count, mpi_type(x.dtype),
                               op == ReduceOp::sum ? MPI_SUM : MPI_MAX, comm_));
    });
  }

  void all_gather(Stream&, ConstTensorView send, TensorView receive, std::span<const std::int64_t> counts) override {
    checks::on_host("all_gather", send);
    checks::on_host("all_gather", receive);
    checks::blocks("all_gather", send, receive, counts, rank_, size_);
    const Call call(*this, "all_gather", bytes_of(send));
    const std::int64_t own_offset = std::accumulate(counts.begin(), counts.begin() + rank_, std::int64_t{0});
    void* own = at(receive.data, own_offset, receive.dtype);
    if (fits_one_call(counts)) {
      const bool in_place = send.data == own;
      call.check(MPI_Allgatherv(in_place ? MPI_IN_PLACE : send.data, in_place ? 0 : counts_[index(rank_)],
                                mpi_type(send.dtype), receive.data, counts_.data(), offsets_.data(),
                                mpi_type(receive.dtype), comm_));
      return;
    }
    if (send.data != own) std::memcpy(own, send.data, bytes_of(send));
    std::int64_t offset = 0;
    for (int r = 0; r < size_; ++r) {
      broadcast_pieces(call, at(receive.data, offset, receive.dtype), counts[index(r)], receive.dtype, r);
      offset += counts[index(r)];
    }
  }

  void reduce_scatter(Stream&, ConstTensorView send, TensorView receive,
                      std::span<const std::int64_t> counts) override {
    checks::on_host("reduce_scatter", send);
    checks::on_host("reduce_scatter", receive);
    checks::blocks("reduce_scatter", receive, send, counts, rank_, size_);
    checks::floating("reduce_scatter", send.dtype);
    const Call call(*this, "reduce_scatter", bytes_of(send));
    const std::int64_t own_offset = std::accumulate(counts.begin(), counts.begin() + rank_, std::int64_t{0});
    const bool in_place = receive.data == at(send.data, own_offset, send.dtype);
    if (fits_one_call(counts)) {
      if (!in_place) {
        call.check(MPI_Reduce_scatter(send.data, receive.data, counts_.data(), mpi_type(send.dtype), MPI_SUM, comm_));
        return;
      }
      // MPI's own "in place" leaves the result where the first block was.
      void* all = const_cast<void*>(send.data);
      call.check(MPI_Reduce_scatter(MPI_IN_PLACE, all, counts_.data(), mpi_type(send.dtype), MPI_SUM, comm_));
      std::memmove(receive.data, all, bytes_of(receive));
      return;
    }
    std::int64_t offset = 0;
    for (int r = 0; r < size_; ++r) {
      for_each_piece(counts[index(r)], [&](std::int64_t first, int count) {
        const bool own = r == rank_;
        call.check(MPI_Reduce(own && in_place ? MPI_IN_PLACE : at(send.data, offset + first, send.dtype),
                              own ? at(receive.data, first, receive.dtype) : nullptr, count, mpi_type(send.dtype),
                              MPI_SUM, r, comm_));
      });
      offset += counts[index(r)];
    }
  }

  void start_reduce(Stream&, TensorView x, int root) override {
    checks::on_host("start_reduce", x);
    checks::sendable("start_reduce", x);
    checks::floating("start_reduce", x.dtype);
    if (root != kEveryRank) checks::root("start_reduce", root, size_);
    const Clock::time_point before = Clock::now();
    if (!under_way_ && x.elements() > 0) {
      under_way_ = true;
      under_way_since_ = before;
    }
    for_each_piece(x.elements(), [&](std::int64_t first, int count) {
      started_.push_back(MPI_REQUEST_NULL);
      void* piece = at(x.data, first, x.dtype);
      const int result =
          root == kEveryRank
              ? MPI_Iallreduce(MPI_IN_PLACE, piece, count, mpi_type(x.dtype), MPI_SUM, comm_, &started_.back())
          : root == rank_
              ? MPI_Ireduce(MPI_IN_PLACE, piece, count, mpi_type(x.dtype), MPI_SUM, root, comm_, &started_.back())
              : MPI_Ireduce(piece, nullptr, count, mpi_type(x.dtype), MPI_SUM, root, comm_, &started_.back());
      check("start_reduce", result);
    });
    ++traffic_.calls;
    traffic_.bytes += bytes_of(x);
    started_bytes_ += bytes_of(x);
    traffic_.exposed_seconds += seconds_since(before);
  }

  void progress() override {
    if (!under_way_) return;
    const Clock::time_point before = Clock::now();
    int complete = 0;
    check("progress", MPI_Testall(static_cast<int>(started_.size()), started_.data(), &complete, MPI_STATUSES_IGNORE));
    if (complete != 0) none_under_way();
    traffic_.exposed_seconds += seconds_since(before);
  }

  void finish() override {
    if (started_.empty()) return;
    const Clock::time_point before = Clock::now();
    job_->heartbeat.begin("finish", started_bytes_);
    const int result = MPI_Waitall(static_cast<int>(started_.size()), started_.data(), MPI_STATUSES_IGNORE);
    job_->heartbeat.end();
    check("finish", result);
    if (under_way_) none_under_way();
    started_.clear();
    started_bytes_ = 0;
    traffic_.exposed_seconds += seconds_since(before);
  }

  std::vector<std::string> all_gather_bytes(const std::string& bytes) override {
    const Call call(*this, "all_gather_bytes", bytes.size());
    std::vector<std::int64_t> lengths(index(size_));
    const auto length = static_cast<std::int64_t>(bytes.size());
    call.check(MPI_Allgather(&length, 1, MPI_INT64_T, lengths.data(), 1, MPI_INT64_T, comm_));
    if (!fits_one_call(lengths)) throw InternalError("all_gather_bytes: for small control data, not for tensors");
    std::string all(static_cast<std::size_t>(std::accumulate(lengths.begin(), lengths.end(), std::int64_t{0})), '\0');
    call.check(MPI_Allgatherv(bytes.data(), counts_[index(rank_)], MPI_CHAR, all.data(), counts_.data(),
                              offsets_.data(), MPI_CHAR, comm_));
    std::vector<std::string> result;
    for (int r = 0; r < size_; ++r) {
      result.push_back(all.substr(index(offsets_[index(r)]), index(counts_[index(r)])));
    }
    return result;
  }

  void watched(const char* verb, std::uint64_t bytes, const std::function<void()>& f) override {
    struct Watch {
      explicit Watch(Heartbeat& its_heartbeat) : heartbeat(its_heartbeat) {}
      ~Watch() { heartbeat.end(); }
      Heartbeat& heartbeat;
    };
    job_->heartbeat.begin(verb, bytes);
    const Watch watch(job_->heartbeat);
    f();
  }

  [[noreturn]] void abort(int code) override {
    std::fflush(nullptr);
    MPI_Abort(MPI_COMM_WORLD, code);
    std::_Exit(code);
  }

  void shutdown() override {
    const Call call(*this, "shutdown", 0);
    call.check(MPI_Barrier(comm_));
    while (!job_->split_off.empty()) {
      call.check(MPI_Comm_free(&job_->split_off.back()));
      job_->split_off.pop_back();
    }
    call.check(MPI_Finalize());
    job_->finished = true;
  }

  Traffic traffic() const override { return traffic_; }

 private:
  /// One collective that is watched, with its bytes and seconds.
  class Call {
   public:
    Call(MpiCommunicator& owner, const char* verb, std::uint64_t bytes)
        : owner_(owner), verb_(verb), begun_(Clock::now()) {
      if (!owner_.started_.empty()) throw InternalError("{} before finish() of what was started", verb);
      ++owner_.traffic_.calls;
      owner_.traffic_.bytes += bytes;
      owner_.job_->heartbeat.begin(verb, bytes);
    }
    ~Call() {
      owner_.job_->heartbeat.end();
      const double seconds = seconds_since(begun_);
      owner_.traffic_.seconds += seconds;
      owner_.traffic_.exposed_seconds += seconds;
    }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

    void check(int result) const { owner_.check(verb_, result); }

   private:
    MpiCommunicator& owner_;
    const char* verb_;
    Clock::time_point begun_;
  };

  void check(const char* verb, int result) const {
    if (result == MPI_SUCCESS) return;
    char text[MPI_MAX_ERROR_STRING] = "";
    int length = 0;
    MPI_Error_string(result, text, &length);
    throw CommunicationError("rank {} of {}: {} failed: {}", rank_, size_, verb,
                             std::string_view(text, static_cast<std::size_t>(length)));
  }

  void none_under_way() {
    under_way_ = false;
    traffic_.seconds += seconds_since(under_way_since_);
  }

  static std::size_t index(int i) { return static_cast<std::size_t>(i); }

  template <class F>
  void for_each_piece(std::int64_t elements, F&& f) const {
    for (std::int64_t first = 0; first < elements; first += job_->max_count) {
      f(first, static_cast<int>(std::min(job_->max_count, elements - first)));
    }
  }

  void broadcast_pieces(const Call& call, void* data, std::int64_t elements, DType dtype, int root) {
    for_each_piece(elements, [&](std::int64_t first, int count) {
      call.check(MPI_Bcast(at(data, first, dtype), count, mpi_type(dtype), root, comm_));
    });
  }

  /// Puts counts and offsets into the ints of MPI; false when they do not fit.
  bool fits_one_call(std::span<const std::int64_t> counts) {
    std::int64_t offset = 0;
    for (int r = 0; r < size_; ++r) {
      offsets_[index(r)] = static_cast<int>(offset);
      counts_[index(r)] = static_cast<int>(counts[index(r)]);
      offset += counts[index(r)];
      if (offset > job_->max_count) return false;
    }
    return true;
  }

  MPI_Comm comm_;
  std::shared_ptr<Job> job_;
  int rank_ = 0;
  int size_ = 1;
  Traffic traffic_;
  // What was started since the last finish. All of it is kept until the next one, so that the size of the vector does
  // not depend on time.
  std::vector<MPI_Request> started_;
  std::uint64_t started_bytes_ = 0;
  bool under_way_ = false;  // some of it is not known to be complete
  Clock::time_point under_way_since_;
  std::vector<int> counts_;  // scratch of fits_one_call
  std::vector<int> offsets_;
};

/// A number of ranks from the environment; nothing when it is not set or not a number.
std::optional<int> ranks_from(const char* variable) {
  const char* text = std::getenv(variable);
  if (text == nullptr) return std::nullopt;
  int ranks = 0;
  const char* end = text + std::strlen(text);
  const auto [last, error] = std::from_chars(text, end, ranks);
  if (error != std::errc() || last != end) return std::nullopt;
  return ranks;
}

/// What started this process, and how many ranks it says it started.
struct Launch {
  std::string variable;
  int ranks = 0;  // 0: no launcher
};

Launch find_launch() {
  // mpirun inside a SLURM job sees both: its own number is the one that counts.
  for (const char* variable : {"OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"}) {
    if (const auto ranks = ranks_from(variable)) return {variable, *ranks};
  }
  return {};
}

}  // namespace

std::unique_ptr<Communicator> create_world(const WorldOptions& options) {
  if (options.max_count < 1 || options.max_count > std::numeric_limits<std::int32_t>::max()) {
    throw InternalError("max_count is {}, want 1 to 2^31 - 1", options.max_count);
  }
  const bool under_launcher =
      std::getenv("OMPI_COMM_WORLD_SIZE") != nullptr || std::getenv("PMIX_NAMESPACE") != nullptr;
  // A rank that nobody launched starts no helper process. It needs no session folder either: all such processes of a
  // user and node share one, and MPI_Init fails in one when another removes it at that moment.
  if (!under_launcher) {
    ::setenv("OMPI_MCA_ess_singleton_isolated", "1", 0);
    ::setenv("OMPI_MCA_orte_create_session_dirs", "0", 0);
  }

  std::optional<StartWatch> start_watch;
  if (under_launcher) start_watch.emplace(options.timeout_seconds, Heartbeat::end_process);
  int provided = 0;
  // FUNNELED: OpenMP's threads compute, the heartbeats' thread watches, this one communicates.
  if (MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided) != MPI_SUCCESS ||
      provided < MPI_THREAD_FUNNELED) {
    throw CommunicationError("MPI did not start with thread support FUNNELED");
  }
  start_watch.reset();
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);  // split communicators inherit it
  int rank = 0;
  int ranks = 1;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &ranks);

  const Launch launch = find_launch();
  if (launch.ranks != 0 && launch.ranks != ranks) {
    MPI_Finalize();
    throw ResourceError(
        "MPI sees {} ranks, but {} says that {} were started: they would be independent jobs. "
        "Start with `mpirun -n {} PROGRAM`, or under SLURM with `srun --mpi=pmix -n {} PROGRAM`",
        ranks, launch.variable, launch.ranks, launch.ranks, launch.ranks);
  }
  if (options.expect_ranks != 0 && options.expect_ranks != ranks) {
    MPI_Finalize();
    throw ResourceError(
        "{} ranks are expected, MPI sees {}. Start with `mpirun -n {} PROGRAM`, or under SLURM with "
        "`srun --mpi=pmix -n {} PROGRAM`",
        options.expect_ranks, ranks, options.expect_ranks, options.expect_ranks);
  }
  const auto job = std::make_shared<Job>(rank, ranks);
  auto world = std::make_unique<MpiCommunicator>(MPI_COMM_WORLD, job);
  try {
    job->heartbeat.start(options.timeout_seconds, options.heartbeat,
                         [&](const std::string& text) { return world->all_gather_bytes(text); });
  } catch (...) {
    world->shutdown();  // all ranks fail alike
    throw;
  }
  job->max_count = options.max_count;
  return world;
}

}  // namespace tforge
