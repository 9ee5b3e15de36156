#pragma once
// Ends the process when a collective does not finish in time. Private to parallel/.
//
// The thread that communicates writes a small record of atomics; a second thread reads it. That thread makes no MPI
// call: where a peer is dead or has left the common order of collectives, any MPI call may hang as well.
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

namespace tforge {

class Watchdog {
 public:
  /// `timeout_seconds` <= 0 watches nothing and starts no thread.
  Watchdog(int rank, int ranks, double timeout_seconds);
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

  /// Marks a collective as begun and ended. `name` is a string literal. Not nested, one thread.
  void begin(const char* name, std::uint64_t bytes);
  void end();

 private:
  void run();
  [[noreturn]] void give_up(const char* name, std::uint64_t number, std::uint64_t bytes) const;

  const int rank_;
  const int ranks_;
  const std::int64_t timeout_ns_;
  // Odd while a collective is under way; (sequence + 1) / 2 is its number, counted from 1.
  std::atomic<std::uint64_t> sequence_{0};
  std::atomic<const char*> name_{""};
  std::atomic<std::uint64_t> bytes_{0};
  std::atomic<std::int64_t> begun_ns_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace tforge
