#pragma once
// Heartbeats: every rank tells rank 0 what it is doing, over UDP, so that a job that hangs says who hangs. Private to
// parallel/.
//
// The thread that communicates writes a small record of atomics; a monitoring thread of each rank reads it and sends it
// to rank 0, which answers. That thread makes no MPI call: where a peer is dead or has left the common order of
// collectives, any MPI call may hang as well. When a collective takes longer than the limit, rank 0 names who is
// missing (no heartbeat) or is not in a collective while others wait, and tells every rank to end with exit code 12. A
// rank that hears nothing of the kind in time says that rank 0 is missing and ends by itself.
//
// Time is counted in ticks of the monitoring thread. A job that is suspended as a whole counts nothing, and goes on.
//
// Packets carry a random number that rank 0 has drawn and MPI has handed round; any other packet is ignored. They go to
// every IPv4 address of rank 0's node until one answers, and to that one from then on.
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace tforge {

class Heartbeat {
 public:
  /// Everyone's text in rank order; collective, called by the thread that calls start().
  using Exchange = std::function<std::vector<std::string>(const std::string&)>;
  /// Ends the process; `report` is one line, empty where another rank has said it. Called by the monitoring thread.
  using GiveUp = std::function<void(const std::string& report)>;

  /// Prints the report and ends the process with exit code 12.
  static void end_process(const std::string& report);

  Heartbeat(int rank, int ranks, GiveUp give_up = end_process);
  /// Ends the monitoring thread; sends nothing.
  ~Heartbeat();
  Heartbeat(const Heartbeat&) = delete;
  Heartbeat& operator=(const Heartbeat&) = delete;

  /// Watches from now on: a collective may take `timeout_seconds` (0 or less, or one rank: nothing is watched).
  /// `channel`: "udp"; "udp:INTERFACE", with that network interface of rank 0's node; "local": no heartbeats, each rank
  /// watches itself alone. Collective. Throws ResourceError, on every rank alike, when the interface does not exist or
  /// a rank gets no answer from rank 0.
  void start(double timeout_seconds, const std::string& channel, const Exchange& exchange);

  /// Marks a collective as begun and ended. `operation` is a string literal. Not nested, one thread.
  void begin(const char* operation, std::uint64_t bytes);
  void end();

 private:
  struct Monitor;
  // Odd while a collective is under way; (sequence + 1) / 2 is its number, counted from 1.
  std::atomic<std::uint64_t> sequence_{0};
  std::atomic<const char*> operation_{""};
  std::atomic<std::uint64_t> bytes_{0};
  const int rank_;
  const int ranks_;
  GiveUp give_up_;
  std::unique_ptr<Monitor> monitor_;
};

}  // namespace tforge
