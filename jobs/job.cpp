#include "jobs/job.h"

#include <boost/program_options.hpp>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <new>
#include <sstream>
#include <thread>

#include "core/log.h"
#include "core/nearest.h"
#include "core/printable.h"
#include "core/version.h"

namespace tforge {

namespace {

namespace po = boost::program_options;

constexpr unsigned kHelpWidth = 100;
/// How long a rank other than 0 waits for rank 0 to report the same failure and end the job.
constexpr std::chrono::seconds kGrace{3};

template <class T>
T number(const std::string& option, const std::string& text) {
  T value{};
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc{} || stop != end) {
    throw UsageError("--{} {}: want {}", option, text, std::is_integral_v<T> ? "an integer" : "a number");
  }
  return value;
}

/// Stores the words given for one option; what they must look like follows from the target's type.
struct Store {
  const std::string& name;
  const std::vector<std::string>& words;

  void operator()(bool* target) const { *target = true; }
  void operator()(std::string* target) const { *target = words.front(); }
  void operator()(std::vector<std::string>* target) const { *target = words; }
  void operator()(std::int64_t* target) const { *target = number<std::int64_t>(name, words.front()); }
  void operator()(double* target) const { *target = number<double>(name, words.front()); }
  void operator()(std::optional<std::string>* target) const { *target = words.front(); }
  void operator()(std::optional<std::int64_t>* target) const { *target = number<std::int64_t>(name, words.front()); }
  void operator()(std::optional<double>* target) const { *target = number<double>(name, words.front()); }
};

/// The default as --help shows it, "" when there is none.
struct DefaultText {
  std::string operator()(const std::string* value) const { return *value; }
  std::string operator()(const std::int64_t* value) const { return std::to_string(*value); }
  std::string operator()(const double* value) const { return fmt::format("{}", *value); }
  template <class T>
  std::string operator()(const T*) const {
    return "";
  }
};

bool is_flag(const Option& option) { return std::holds_alternative<bool*>(option.target); }
bool is_list(const Option& option) { return std::holds_alternative<std::vector<std::string>*>(option.target); }

po::options_description described(const JobInfo& info) {
  po::options_description description("Options", kHelpWidth, kHelpWidth / 2);
  for (const Option& option : info.options) {
    std::string doc = option.doc;
    if (option.need == Need::required) doc += " (required)";
    if (const std::string text = std::visit(DefaultText{}, option.target); !text.empty()) {
      doc += fmt::format(" (default {})", text);
    }
    if (is_flag(option)) {
      description.add_options()(option.name.c_str(), doc.c_str());
    } else {
      // Words are collected as text and converted by Store, so that every message has our form.
      auto* value = po::value<std::vector<std::string>>()->value_name(option.argument);
      description.add_options()(option.name.c_str(), value, doc.c_str());
    }
  }
  description.add_options()("help,h", "prints this text")("version", "prints the version and what it was built with");
  return description;
}

std::string wrapped(const std::string& text) {
  std::string out;
  std::size_t column = 0;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find(' ', begin), text.size());
    if (column + end - begin >= kHelpWidth) {
      out += '\n';
      column = 0;
    } else if (column > 0) {
      out += ' ';
      ++column;
    }
    out += text.substr(begin, end - begin);
    column += end - begin;
    begin = end + 1;
  }
  return out;
}

void print_help(const JobInfo& info, const po::options_description& description) {
  std::string text = "Usage: " + info.name + " [options]";
  if (!info.positional.empty()) text += " [" + info.positional + "]";
  std::ostringstream options;
  options << description;
  text += "\n\n" + wrapped(info.description) + "\n\n" + options.str();
  if (!info.examples.empty()) text += "\nExamples:\n";
  for (const std::string& example : info.examples) text += "  " + example + "\n";
  std::fputs(text.c_str(), stdout);
}

/// One line.
void report(const JobInfo& info, int rank, const std::string& what) {
  std::string line = info.name + ": error: ";
  if (rank > 0) line += fmt::format("[rank {}] ", rank);
  line += printable(what);
  line += '\n';
  std::fflush(stdout);
  std::fwrite(line.data(), 1, line.size(), stderr);
}

struct Failure {
  ExitCode code = ExitCode::done;
  std::string what;
};

/// To be called inside a catch block: what the exception in flight says.
Failure current_failure() {
  try {
    throw;
  } catch (const Error& error) {
    return {error.code(), error.what()};
  } catch (const std::bad_alloc&) {
    return {ExitCode::no_resources, "out of memory; use a smaller batch or model, or more ranks"};
  } catch (const std::exception& error) {
    return {ExitCode::internal, error.what()};
  } catch (...) {
    return {ExitCode::internal, "an exception of an unknown type"};
  }
}

/// To be called inside a catch block: reports the exception in flight and gives the exit code for it.
ExitCode report_current(const JobInfo& info, int rank) {
  const Failure failure = current_failure();
  if (rank > 0) {
    // There is nothing left to save: the SIGTERM that follows another rank's report ends this rank at once.
    std::signal(SIGTERM, SIG_DFL);
    std::this_thread::sleep_for(kGrace);
  }
  report(info, rank, failure.what);
  return failure.code;
}

/// A file over the limit of the process is then an error like any other of the disk.
void ignore_file_size_signal() { std::signal(SIGXFSZ, SIG_IGN); }

/// Collective: the failure of the first rank that has one, reported by rank 0.
ExitCode agree(Communicator& world, const JobInfo& info, const Failure& mine) {
  // The code and the text travel as one string: "2 model.heads = ...".
  const std::string note =
      mine.code == ExitCode::done ? "" : fmt::format("{} {}", static_cast<int>(mine.code), mine.what);
  const std::vector<std::string> notes = world.all_gather_bytes(note);
  for (std::size_t rank = 0; rank < notes.size(); ++rank) {
    if (notes[rank].empty()) continue;
    const std::size_t space = notes[rank].find(' ');
    if (world.rank() == 0) report(info, static_cast<int>(rank), notes[rank].substr(space + 1));
    return static_cast<ExitCode>(std::stoi(notes[rank].substr(0, space)));
  }
  return ExitCode::done;
}

/// The rank that the launcher gave this process, before there is a communicator to ask; 0 without a launcher.
int launcher_rank() {
  for (const char* name : {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"}) {
    if (const char* text = std::getenv(name)) return std::atoi(text);
  }
  return 0;
}

}  // namespace

bool parse_command_line(int argc, const char* const* argv, const JobInfo& info) {
  const po::options_description description = described(info);
  po::positional_options_description positional;
  if (!info.positional.empty()) positional.add(info.positional.c_str(), -1);

  // Nothing is guessed from a prefix: an option means the same in every later version.
  using Style = po::command_line_style::style_t;
  constexpr int kStyle = Style::allow_long | Style::long_allow_adjacent | Style::long_allow_next | Style::allow_short |
                         Style::allow_dash_for_short | Style::short_allow_next;
  const std::string hint = fmt::format(" ({} --help lists all)", info.name);
  po::variables_map values;
  try {
    po::store(po::command_line_parser(argc, argv).options(description).positional(positional).style(kStyle).run(),
              values);
  } catch (const po::unknown_option& error) {
    std::vector<std::string> names = {"--help", "--version"};
    for (const Option& option : info.options) names.push_back("--" + option.name);
    const std::string given = error.get_option_name();
    throw UsageError("unknown option {}{}{}", given, did_you_mean(given, names), hint);
  } catch (const po::too_many_positional_options_error&) {
    throw UsageError("a word that belongs to no option was given{}", hint);
  } catch (const po::error& error) {
    throw UsageError("{}{}", error.what(), hint);
  }

  if (values.count("help") > 0) {
    if (launcher_rank() == 0) print_help(info, description);
    return false;
  }
  if (values.count("version") > 0) {
    if (launcher_rank() == 0) std::puts(version_text().c_str());
    return false;
  }
  for (const Option& option : info.options) {
    if (values.count(option.name) == 0) {
      if (option.need == Need::required) throw UsageError("--{} is missing{}", option.name, hint);
      continue;
    }
    std::vector<std::string> words;
    if (!is_flag(option)) words = values[option.name].as<std::vector<std::string>>();
    if (words.size() > 1 && !is_list(option)) {
      throw UsageError("--{} was given {} times; give it once", option.name, words.size());
    }
    std::visit(Store{option.name, words}, option.target);
  }
  return true;
}

int run_job(int argc, char** argv, const JobInfo& info, const std::function<ExitCode()>& body) {
  ignore_file_size_signal();
  try {
    return static_cast<int>(parse_command_line(argc, argv, info) ? body() : ExitCode::done);
  } catch (...) {
    return static_cast<int>(report_current(info, 0));
  }
}

int run_mpi_job(int argc, char** argv, const JobInfo& info, const std::function<ExitCode(Communicator&)>& body) {
  ignore_file_size_signal();
  std::int64_t expect_ranks = 0;
  std::optional<std::string> heartbeat;
  JobInfo with_shared = info;
  with_shared.options.push_back(
      {"expect-ranks", "N", &expect_ranks, "fails unless the job has N ranks; 0 only asks the launcher"});
  with_shared.options.push_back(
      {"heartbeat", "HOW", &heartbeat,
       "how ranks tell rank 0 what they do, so that a hang is named: udp, udp:INTERFACE, local"});

  // A wrong command line or configuration is found before MPI starts, and reported after: then the ranks can agree,
  // one reports it, and all end in the ordinary way.
  WorldOptions options;
  Failure early;
  try {
    if (!parse_command_line(argc, argv, with_shared)) return static_cast<int>(ExitCode::done);
    if (info.world_options) options = info.world_options();
    if (heartbeat) {
      if (!is_heartbeat_channel(*heartbeat)) {
        throw UsageError("--heartbeat {}: want udp, udp:INTERFACE or local", *heartbeat);
      }
      options.heartbeat = *heartbeat;
    }
    if (expect_ranks != 0) options.expect_ranks = static_cast<int>(expect_ranks);
  } catch (...) {
    early = current_failure();
  }

  std::unique_ptr<Communicator> world;
  try {
    world = create_world(options);
  } catch (...) {
    return static_cast<int>(report_current(info, launcher_rank()));
  }
  log::set_rank(world->rank(), world->size());
  ExitCode code = ExitCode::internal;
  try {
    code = agree(*world, info, early);
    if (code == ExitCode::done) code = body(*world);
  } catch (...) {
    code = report_current(info, world->rank());
    // The others may wait for this rank in a collective: end them. A rank alone ends in the ordinary way.
    if (world->size() > 1) world->abort(static_cast<int>(code));
  }
  world->shutdown();
  return static_cast<int>(code);
}

}  // namespace tforge
