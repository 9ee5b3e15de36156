// tf_prepare as a user runs it.
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdlib>

#include "data/token_dataset.h"
#include "support/corpus.h"
#include "support/scratch.h"

namespace tforge {
namespace {

using namespace test;

struct Outcome {
  int code = -1;
  std::string output;  // standard output
  std::string error;   // lines of standard error that are no log lines
};

Outcome run(const Scratch& scratch, const std::string& arguments) {
  const std::string command =
      fmt::format("{} {} >{} 2>{}", TF_PREPARE, arguments, scratch.path("stdout"), scratch.path("stderr"));
  const int status = std::system(command.c_str());
  Outcome outcome{
      .code = WIFEXITED(status) ? WEXITSTATUS(status) : -1, .output = read_whole(scratch.path("stdout")), .error = {}};
  std::ifstream lines(scratch.path("stderr"));
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with("tf_prepare: ")) outcome.error += line + "\n";
  }
  std::filesystem::remove(scratch.path("stdout"));
  std::filesystem::remove(scratch.path("stderr"));
  return outcome;
}

std::string corpus(int documents) {
  std::string text;
  const auto lines = generated_lines(documents * 4, 3);
  for (int i = 0; i < documents; ++i) {
    text += fmt::format("# {}\n", i);
    for (int j = 0; j < 4; ++j) text += lines[static_cast<std::size_t>(i) * 4 + static_cast<std::size_t>(j)] + "\n";
  }
  return text;
}

TEST(TfPrepare, WritesWhatItPrints) {
  const Scratch scratch;
  write_whole(scratch.path("in.txt"), corpus(60));
  const Outcome done = run(scratch, fmt::format("--input {} --document-start '^#' --vocab 400 --output {}",
                                                scratch.path("in.txt"), scratch.path("out.h5")));
  EXPECT_EQ(done.code, 0) << done.error;
  const TokenDataset dataset(scratch.path("out.h5"));
  EXPECT_EQ(dataset.vocab(), 400);
  EXPECT_NE(done.output.find(dataset.fingerprint()), std::string::npos) << done.output;
  EXPECT_NE(done.output.find(std::to_string(dataset.split(Split::train).tokens())), std::string::npos) << done.output;
}

TEST(TfPrepare, JsonlWithTheTokenizerOfADataset) {
  const Scratch scratch;
  write_whole(scratch.path("in.txt"), corpus(60));
  ASSERT_EQ(run(scratch, fmt::format("{} --document-start '^#' --vocab 400 --output {}", scratch.path("in.txt"),
                                     scratch.path("first.h5")))
                .code,
            0);
  std::string lines;
  for (const std::string& line : generated_lines(9, 5)) lines += fmt::format("{{\"body\": \"{}\"}}\n", line);
  write_whole(scratch.path("in.jsonl"), lines);
  const Outcome done =
      run(scratch, fmt::format("--jsonl {} --field body --tokenizer {} --output {}", scratch.path("in.jsonl"),
                               scratch.path("first.h5"), scratch.path("second.h5")));
  EXPECT_EQ(done.code, 0) << done.error;
  EXPECT_EQ(TokenDataset(scratch.path("second.h5")).tokenizer().fingerprint(),
            TokenDataset(scratch.path("first.h5")).tokenizer().fingerprint());
}

TEST(TfPrepare, BadInputIsOneLineAndExitCode2) {
  const Scratch scratch;
  const std::string in = scratch.path("in.txt"), out = scratch.path("out.h5");
  write_whole(in, corpus(9));
  write_whole(scratch.path("empty.txt"), "");
  write_whole(scratch.path("latin1.txt"), "caf\xe9\n");
  const auto fails = [&](const std::string& arguments, const std::string& part) {
    const Outcome outcome = run(scratch, arguments);
    EXPECT_EQ(outcome.code, 2) << arguments;
    EXPECT_NE(outcome.error.find(part), std::string::npos) << "was: " << outcome.error << "\nwant: " << part;
    EXPECT_EQ(std::count(outcome.error.begin(), outcome.error.end(), '\n'), 1) << outcome.error;
    EXPECT_EQ(names_in(scratch.folder()), (std::vector<std::string>{"empty.txt", "in.txt", "latin1.txt"}));
  };
  const std::string output = " --output " + out;
  fails("--input " + in, "output");
  fails(output, "give either --input or --jsonl");
  fails(in + output + " --jsonl " + in + " --field text", "give either --input or --jsonl");
  fails("--jsonl " + in + output, "--jsonl and --field NAME go together");
  fails("--jsonl " + in + " --field text" + output, "in.txt: line 1 is not JSON");
  fails(in + " --documnet-start x" + output, "document-start");
  fails(in + " --vocab many" + output, "vocab");
  fails(in + output, "the corpus holds 1 document, at least 3 are needed");
  fails(scratch.path("none.txt") + output, "none.txt: No such file or directory");
  fails(scratch.path("empty.txt") + output, "the corpus is empty");
  fails(scratch.path("latin1.txt") + output, "latin1.txt is not UTF-8: ill-formed character at byte offset 3");
  fails(in + " --document-start '(['" + output, "the regular expression '([' is malformed");
  fails(in + " --document-start '^#' --tokenizer " + in + output, "in.txt is not a sentencepiece model");
  fails(in + " --document-start '^#' --vocab 90000" + output, "a BPE vocabulary of 90000 pieces cannot be trained");
  fails(in + " --document-start '^#' --output " + in, "exists already; --force replaces it");
}

TEST(TfPrepare, FullDiskIsExitCode3AndLeavesNothing) {
  const SmallDisk disk(1);
  if (!disk.mounted()) GTEST_SKIP() << "mounting a small disk needs root";
  const Scratch scratch;
  write_whole(scratch.path("in.txt"), corpus(20'000));
  const Outcome outcome = run(scratch, fmt::format("{} --document-start '^#' --tokenizer bytes --output {}",
                                                   scratch.path("in.txt"), disk.path("out.h5")));
  EXPECT_EQ(outcome.code, 3) << outcome.error;
  EXPECT_EQ(outcome.error, fmt::format("tf_prepare: error: {}: the disk is full; free space or write elsewhere\n",
                                       disk.path("out.h5")));
  EXPECT_TRUE(names_in(disk.folder()).empty());
}

}  // namespace
}  // namespace tforge
