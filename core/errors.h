#pragma once
// Typed errors. Each carries the exit code of the job that it ends (docs/exit_codes.md) and one line of text:
// what happened, where, and what to do about it.
#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace tforge {

enum class ExitCode : int {
  done = 0,
  bad_input = 2,     // usage, configuration or input data
  no_resources = 3,  // disk, memory, ranks, devices
  damaged = 4,       // damaged checkpoint
  differs = 5,       // a comparison that was asked for is over its tolerance
  requeue = 10,      // stopped before the end, saved: requeue me
  diverged = 11,     // the loss or the gradients stayed non-finite
  hang = 12,         // a collective failed, or did not finish in time
  crash_loop = 13,   // restarts without progress
  interrupted = 14,  // left at once at a second signal
  internal = 70,     // a defect of TokenForge itself
};

class Error : public std::runtime_error {
 public:
  Error(ExitCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ExitCode code() const noexcept { return code_; }

 private:
  ExitCode code_;
};

/// One error class a kind; `ConfigError("train.lr is {}, want more than 0", lr)` formats its message with fmt.
#define TFORGE_DEFINE_ERROR(Name, code)                                                                \
  class Name : public Error {                                                                          \
   public:                                                                                             \
    explicit Name(const std::string& message) : Error(code, message) {}                                \
    template <class First, class... Rest>                                                              \
    Name(fmt::format_string<First, Rest...> format, First&& first, Rest&&... rest)                     \
        : Error(code, fmt::format(format, std::forward<First>(first), std::forward<Rest>(rest)...)) {} \
  }

TFORGE_DEFINE_ERROR(UsageError, ExitCode::bad_input);        // command line
TFORGE_DEFINE_ERROR(ConfigError, ExitCode::bad_input);       // configuration file or override
TFORGE_DEFINE_ERROR(DataError, ExitCode::bad_input);         // input data: text, token files, golden files
TFORGE_DEFINE_ERROR(ResourceError, ExitCode::no_resources);  // disk, memory, ranks
TFORGE_DEFINE_ERROR(DeviceError, ExitCode::no_resources);    // processor or device that is not there
TFORGE_DEFINE_ERROR(CheckpointError, ExitCode::damaged);     // damaged checkpoint
TFORGE_DEFINE_ERROR(DivergedError, ExitCode::diverged);      // non-finite loss or gradients
TFORGE_DEFINE_ERROR(CrashLoopError, ExitCode::crash_loop);   // restarts without progress
TFORGE_DEFINE_ERROR(ShapeError, ExitCode::internal);         // operand shapes that do not fit
TFORGE_DEFINE_ERROR(DTypeError, ExitCode::internal);         // operand types that do not fit
TFORGE_DEFINE_ERROR(InternalError, ExitCode::internal);      // a contract broken by our own code
TFORGE_DEFINE_ERROR(CommunicationError, ExitCode::hang);     // MPI or NCCL failed

#undef TFORGE_DEFINE_ERROR

}  // namespace tforge
