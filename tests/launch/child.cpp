// One rank of a job that does what its first argument says; see launch_test.cpp.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "core/errors.h"
#include "core/tensor.h"
#include "parallel/communicator.h"

namespace tforge {
namespace {

void require(bool holds, const char* what) {
  if (!holds) throw InternalError("{} is wrong", what);
}

/// Every verb whose tensors exceed `max_count`, against exact values.
void use_all_verbs(Communicator& world) {
  Allocator allocator;
  Stream stream;
  const int rank = world.rank();
  const int size = world.size();
  const auto make = [&](std::int64_t n) {
    return Tensor::zeros(allocator, Shape{n}, DType::f64, Purpose::communication);
  };

  Tensor x = make(23);
  std::iota(x.span<double>().begin(), x.span<double>().end(), 100.0 * rank);
  Tensor sum = x.clone(allocator);
  world.all_reduce(stream, sum.view(), ReduceOp::sum);
  for (int i = 0; i < 23; ++i) {
    require(sum.span<double>()[static_cast<std::size_t>(i)] == 50.0 * size * (size - 1) + size * i, "all_reduce");
  }
  Tensor started = x.clone(allocator);
  world.start_reduce(stream, started.view(), Communicator::kEveryRank);
  world.finish();
  for (std::size_t i = 0; i < 23; ++i) require(started.span<double>()[i] == sum.span<double>()[i], "start_reduce");
  world.broadcast(stream, x.view(), 1);
  for (int i = 0; i < 23; ++i) require(x.span<double>()[static_cast<std::size_t>(i)] == 100.0 + i, "broadcast");

  // Rank r owns 7 + r elements; element i of the whole is i, times the number of ranks once summed.
  std::vector<std::int64_t> counts;
  for (int r = 0; r < size; ++r) counts.push_back(7 + r);
  const std::int64_t all = std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
  const std::int64_t first = std::accumulate(counts.begin(), counts.begin() + rank, std::int64_t{0});
  Tensor whole = make(all);
  std::iota(whole.span<double>().begin(), whole.span<double>().end(), 0.0);
  Tensor mine = make(7 + rank);
  world.reduce_scatter(stream, whole.view(), mine.view(), counts);
  for (std::int64_t i = 0; i < 7 + rank; ++i) {
    require(mine.span<double>()[static_cast<std::size_t>(i)] == static_cast<double>(size * (first + i)),
            "reduce_scatter");
  }
  const Tensor own = whole.rows(first, 7 + rank);
  world.reduce_scatter(stream, whole.view(), Tensor(own).view(), counts);
  for (std::int64_t i = 0; i < 7 + rank; ++i) {
    require(own.span<double>()[static_cast<std::size_t>(i)] == static_cast<double>(size * (first + i)),
            "reduce_scatter in place");
  }
  whole.fill_zero();
  world.all_gather(stream, mine.view(), whole.view(), counts);
  for (std::int64_t i = 0; i < all; ++i) {
    require(whole.span<double>()[static_cast<std::size_t>(i)] == static_cast<double>(size * i), "all_gather");
  }
}

/// A process of its own, started by rank 0, that stops the ranks `which` after 0.45 s and, if asked, wakes them 2.5 s
/// later.
void stop_ranks(Communicator& world, std::vector<std::size_t> which, bool wake) {
  const std::vector<std::string> pids = world.all_gather_bytes(std::to_string(::getpid()));
  if (world.rank() != 0) return;
  const pid_t child = ::fork();
  if (child != 0) return;
  const auto send = [&](int signal) {
    for (const std::size_t r : which) ::kill(static_cast<pid_t>(std::atoi(pids[r].c_str())), signal);
  };
  ::usleep(450'000);
  send(SIGSTOP);
  if (wake) {
    ::usleep(2'500'000);
    // Nodes are not reached at one moment: rank 0 wakes first and still waits.
    std::ranges::reverse(which);
    for (const std::size_t r : which) {
      ::kill(static_cast<pid_t>(std::atoi(pids[r].c_str())), SIGCONT);
      ::usleep(200'000);
    }
  }
  ::_exit(0);
}

void run(const std::string& what, Communicator& world) {
  if (what == "suspend") stop_ranks(world, {1, 0}, true);
  if (what == "stop0") stop_ranks(world, {0}, false);
  if (what == "stop1") stop_ranks(world, {1}, false);
  if ((what == "sleep" || what == "sleep_local") && world.rank() == 1)
    std::this_thread::sleep_for(std::chrono::seconds(30));
  if (what == "throw" && world.rank() == 1) throw DataError("tokens.h5 is truncated");
  if (what == "verbs") use_all_verbs(world);
  set_phase("forward", 7);
  Allocator allocator;
  Stream stream;
  Tensor x = Tensor::zeros(allocator, Shape{16}, DType::f32, Purpose::communication);
  if (what == "sleep_started") {
    if (world.rank() == 1) std::this_thread::sleep_for(std::chrono::seconds(30));
    world.start_reduce(stream, x.view(), Communicator::kEveryRank);
    world.finish();
    return;
  }
  if (what == "suspend" || what.starts_with("stop")) {
    // Three seconds of collectives, in which rank 0 waits nearly always.
    for (int i = 0; i < 10; ++i) {
      world.all_reduce(stream, x.view(), ReduceOp::sum);
      if (world.rank() != 0) ::usleep(300'000);
    }
  }
  world.all_reduce(stream, x.view(), ReduceOp::sum);
}

int run_rank(const std::string& what, int expect_ranks) {
  WorldOptions options;
  options.expect_ranks = expect_ranks;
  if (what.starts_with("s")) options.timeout_seconds = 1;
  if (what == "sleep_local") options.heartbeat = "local";
  if (what == "verbs") options.max_count = 5;
  auto world = create_world(options);
  try {
    run(what, *world);
  } catch (const Error& error) {
    std::fprintf(stderr, "error: rank %d: %s\n", world->rank(), error.what());
    world->abort(static_cast<int>(error.code()));
  }
  if (what == "leave" && world->rank() == 1) return 0;  // without shutdown
  world->shutdown();
  std::printf("rank %d of %d is done\n", world->rank(), world->size());
  return 0;
}

}  // namespace
}  // namespace tforge

int main(int argc, char** argv) {
  try {
    return tforge::run_rank(argc > 1 ? argv[1] : "", argc > 2 ? std::atoi(argv[2]) : 0);
  } catch (const tforge::Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return static_cast<int>(error.code());
  }
}
