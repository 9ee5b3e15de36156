// The shared main: command lines, exit codes, one line for an error.
#include "jobs/job.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <new>

#include "core/nearest.h"
#include "core/version.h"

namespace tforge {
namespace {

struct Line {
  std::string config;
  std::vector<std::string> set;
  bool dry_run = false;
  std::int64_t count = 3;
  double top_p = 0.9;
  std::optional<std::int64_t> seed;

  JobInfo info() {
    return {.name = "tf_test",
            .description = "Does nothing, to show how.",
            .options = {{"config", "FILE", &config, "configuration", Need::required},
                        {"set", "KEY=VALUE", &set, "overrides a key"},
                        {"dry-run", "", &dry_run, "writes nothing"},
                        {"count", "N", &count, "how many"},
                        {"top-p", "P", &top_p, "share"},
                        {"seed", "N", &seed, "seed"}},
            .positional = "",
            .examples = {"tf_test --config a.toml"},
            .world_options = {}};
  }
};

struct Outcome {
  int code = 0;
  std::string out, err;
};

Outcome run(Line& line, std::vector<const char*> words, const std::function<ExitCode()>& body) {
  words.insert(words.begin(), "tf_test");
  testing::internal::CaptureStdout();
  testing::internal::CaptureStderr();
  Outcome o;
  o.code = run_job(static_cast<int>(words.size()), const_cast<char**>(words.data()), line.info(), body);
  o.out = testing::internal::GetCapturedStdout();
  o.err = testing::internal::GetCapturedStderr();
  return o;
}

Outcome run(std::vector<const char*> words) {
  Line line;
  return run(line, std::move(words), [] { return ExitCode::done; });
}

TEST(Job, ValuesReachTheirTargets) {
  Line line;
  const Outcome o = run(
      line,
      {"--config", "a.toml", "--set", "a=1", "--set=b=-2", "--dry-run", "--count", "-5", "--top-p=0.25", "--seed", "7"},
      [] { return ExitCode::requeue; });
  EXPECT_EQ(o.code, 10);
  EXPECT_EQ(o.err, "");
  EXPECT_EQ(line.config, "a.toml");
  EXPECT_EQ(line.set, (std::vector<std::string>{"a=1", "b=-2"}));
  EXPECT_TRUE(line.dry_run);
  EXPECT_EQ(line.count, -5);
  EXPECT_EQ(line.top_p, 0.25);
  EXPECT_EQ(line.seed, 7);
}

TEST(Job, AbsentOptionsKeepTheirDefaults) {
  Line line;
  EXPECT_EQ(run(line, {"--config", "a"}, [] { return ExitCode::done; }).code, 0);
  EXPECT_EQ(line.count, 3);
  EXPECT_FALSE(line.seed.has_value());
}

TEST(Job, MisspeltOption) {
  const Outcome o = run({"--confg", "a"});
  EXPECT_EQ(o.code, 2);
  EXPECT_EQ(o.err, "tf_test: error: unknown option --confg; did you mean `--config`? (tf_test --help lists all)\n");
}

TEST(Job, PrefixIsNotGuessed) {
  const Outcome o = run({"--config", "a", "--dry"});
  EXPECT_EQ(o.code, 2);
  EXPECT_EQ(o.err.rfind("tf_test: error: unknown option --dry", 0), 0U) << o.err;
}

TEST(Job, WrongCommandLines) {
  const auto error_of = [](std::vector<const char*> words) {
    const Outcome o = run(std::move(words));
    EXPECT_EQ(o.code, 2);
    EXPECT_EQ(std::count(o.err.begin(), o.err.end(), '\n'), 1) << o.err;
    return o.err;
  };
  EXPECT_EQ(error_of({}), "tf_test: error: --config is missing (tf_test --help lists all)\n");
  EXPECT_EQ(error_of({"--config", "a", "--count", "x"}), "tf_test: error: --count x: want an integer\n");
  EXPECT_EQ(error_of({"--config", "a", "--top-p", "1.5x"}), "tf_test: error: --top-p 1.5x: want a number\n");
  EXPECT_EQ(error_of({"--config", "a", "--config", "b"}), "tf_test: error: --config was given 2 times; give it once\n");
  EXPECT_NE(error_of({"--config"}).find("--config"), std::string::npos);
  EXPECT_NE(error_of({"--config", "a", "--dry-run=yes"}).find("--dry-run"), std::string::npos);
  EXPECT_NE(error_of({"--config", "a", "stray"}).find("a word that belongs to no option"), std::string::npos);
}

TEST(Job, WordsWithoutAName) {
  std::vector<std::string> files;
  const JobInfo info{.name = "tf_test",
                     .description = "",
                     .options = {{"file", "FILE", &files, "files"}},
                     .positional = "file",
                     .examples = {},
                     .world_options = {}};
  const char* words[] = {"tf_test", "a.txt", "b.txt"};
  EXPECT_TRUE(parse_command_line(3, words, info));
  EXPECT_EQ(files, (std::vector<std::string>{"a.txt", "b.txt"}));
}

TEST(Job, HelpAndVersionDoNothingElse) {
  Line line;
  bool ran = false;
  const auto body = [&] {
    ran = true;
    return ExitCode::done;
  };
  const Outcome help = run(line, {"--help"}, body);
  EXPECT_EQ(help.code, 0);
  for (const char* part : {"Usage: tf_test", "Does nothing", "--config FILE", "(required)", "(default 0.9)",
                           "Examples:\n  tf_test --config a.toml", "--version"}) {
    EXPECT_NE(help.out.find(part), std::string::npos) << part << "\n" << help.out;
  }
  const Outcome version = run(line, {"--version"}, body);
  EXPECT_EQ(version.code, 0);
  EXPECT_EQ(version.out, version_text() + "\n");
  EXPECT_FALSE(ran);
}

TEST(Job, ErrorsBecomeOneLineAndTheirCode) {
  const auto outcome = [](const std::function<ExitCode()>& body) {
    Line line;
    return run(line, {"--config", "a"}, body);
  };
  Outcome o = outcome([]() -> ExitCode { throw CheckpointError("step_3.h5: a digest\ndiffers"); });
  EXPECT_EQ(o.code, 4);
  EXPECT_EQ(o.err, "tf_test: error: step_3.h5: a digest\\x0adiffers\n");
  EXPECT_EQ(outcome([]() -> ExitCode { throw DataError("x"); }).code, 2);
  EXPECT_EQ(outcome([]() -> ExitCode { throw ResourceError("x"); }).code, 3);
  EXPECT_EQ(outcome([]() -> ExitCode { throw DivergedError("x"); }).code, 11);
  EXPECT_EQ(outcome([]() -> ExitCode { throw std::bad_alloc(); }).code, 3);
  EXPECT_EQ(outcome([]() -> ExitCode { throw std::runtime_error("x"); }).code, 70);
  EXPECT_EQ(outcome([]() -> ExitCode { throw 5; }).code, 70);
}

TEST(Version, NamesEverythingTheBuildIsMadeOf) {
  const std::string text = version_text();
  for (const char* part : {"tokenforge ", ", commit ", ", GNU ", ", OpenBLAS ", "MPI ", ", HDF5 ", ", CUDA "}) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  }
  EXPECT_EQ(text.find('\n'), std::string::npos);
}

TEST(Nearest, FindsSlipsAndRefusesStrangers) {
  const std::vector<std::string> names = {"warmup_steps", "steps", "lr", "seed"};
  EXPECT_EQ(nearest("step", names), "steps");
  EXPECT_EQ(nearest("wramup_steps", names), "warmup_steps");
  EXPECT_EQ(nearest("sede", names), "seed");
  EXPECT_EQ(nearest("sede", std::vector<std::string>{"rude", "seed"}), "seed");  // a swap is one slip
  EXPECT_EQ(nearest("l", names), "lr");
  EXPECT_EQ(nearest("flavour", names), "");
  EXPECT_EQ(nearest("anything", {}), "");
}

}  // namespace
}  // namespace tforge
