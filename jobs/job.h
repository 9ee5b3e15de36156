#pragma once
// The shared main of all jobs: command line, --help, --version, exit codes, one line for an error.
//
//   int main(int argc, char** argv) {
//     std::string config;
//     std::vector<std::string> set;
//     bool dry_run = false;
//     const JobInfo info{.name = "tf_train", .description = "Trains a model ...",
//                        .options = {{"config", "FILE", &config, "configuration (TOML)", Need::required},
//                                    {"set", "KEY=VALUE", &set, "overrides a key of the configuration"},
//                                    {"dry-run", "", &dry_run, "prints the plan and writes nothing"}},
//                        .examples = {"mpirun -n 2 tf_train --config configs/demo.toml"}};
//     return run_mpi_job(argc, argv, info, [&](Communicator& world) { ...; return ExitCode::done; });
//   }
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "core/errors.h"
#include "parallel/communicator.h"

namespace tforge {

enum class Need { optional, required };

/// Where an option's value goes. A bool is a flag without a value, a vector collects repeated options; the others
/// keep what the variable holds (shown as the default by --help) when the option is absent.
using OptionTarget = std::variant<bool*, std::string*, std::vector<std::string>*, std::int64_t*, double*,
                                  std::optional<std::string>*, std::optional<std::int64_t>*, std::optional<double>*>;

struct Option {
  std::string name;      // without the dashes
  std::string argument;  // what --help calls the value: "FILE"; empty for a flag
  OptionTarget target;   // must outlive run_job
  std::string doc;
  Need need = Need::optional;
};

struct JobInfo {
  std::string name;         // the binary: "tf_train"
  std::string description;  // one paragraph
  std::vector<Option> options;
  std::string positional{};  // name of the option that takes words without a name; "" when there is none
  std::vector<std::string> examples{};
  /// Called by run_mpi_job after the command line is read and before MPI starts, for a job whose configuration says
  /// how long a collective may take or how many ranks there must be.
  std::function<WorldOptions()> world_options = {};
};

/// Reads the command line into the targets. --help and --version print to standard output and give false: there is
/// nothing left to do. Throws UsageError for an unknown option (with the nearest valid name), a missing or surplus
/// value, a value of the wrong type, a missing required option.
bool parse_command_line(int argc, const char* const* argv, const JobInfo& info);

/// Runs `body` in a single process and returns the exit code of the process (docs/exit_codes.md): what `body`
/// returned; the code of a tforge::Error, 3 for std::bad_alloc, 70 for any other exception, each after one line
/// "<name>: error: <what>" on standard error.
int run_job(int argc, char** argv, const JobInfo& info, const std::function<ExitCode()>& body);

/// The same over MPI: creates the world (parallel/communicator.h), sets the log's rank, runs `body` on every rank, and
/// shuts MPI down. Every such job has the options `--expect-ranks N` and
/// `--heartbeat HOW`. --help and --version need no MPI.
/// What the command line or `world_options` throws is agreed on by all ranks, reported once, and ends the job in the
/// ordinary way. An exception of `body` aborts the whole job with its code: rank 0 reports at once; another rank first
/// gives rank 0 a moment to report what both found, then reports with its rank. `body` must return the same code on
/// every rank.
int run_mpi_job(int argc, char** argv, const JobInfo& info, const std::function<ExitCode(Communicator&)>& body);

}  // namespace tforge
