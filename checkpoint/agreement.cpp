#include "checkpoint/agreement.h"

#include <new>

#include "core/errors.h"

namespace tforge {
namespace {

[[noreturn]] void throw_code(int code, const std::string& message) {
  switch (static_cast<ExitCode>(code)) {
    case ExitCode::bad_input: throw DataError(message);
    case ExitCode::no_resources: throw ResourceError(message);
    case ExitCode::damaged: throw CheckpointError(message);
    default: throw Error(static_cast<ExitCode>(code), message);
  }
}

}  // namespace

std::vector<std::string> together(Communicator& world, const std::function<std::string()>& work) {
  // One byte of exit code (0: well), then the result or the message.
  std::string mine(1, '\0');
  const auto failed = [&](ExitCode code, const char* what) {
    mine.assign(1, static_cast<char>(code));
    mine += what;
  };
  try {
    mine += work();
  } catch (const Error& error) {
    failed(error.code(), error.what());
  } catch (const std::bad_alloc&) {
    failed(ExitCode::no_resources, "out of memory");
  } catch (const std::exception& error) {
    failed(ExitCode::internal, error.what());
  }
  std::vector<std::string> results = world.all_gather_bytes(mine);
  for (std::size_t rank = 0; rank < results.size(); ++rank) {
    const int code = static_cast<unsigned char>(results[rank][0]);
    results[rank].erase(0, 1);
    if (code != 0) throw_code(code, rank == 0 ? results[rank] : fmt::format("rank {}: {}", rank, results[rank]));
  }
  return results;
}

}  // namespace tforge
