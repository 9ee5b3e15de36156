// tf_prepare: text or JSONL -> a token dataset (HDF5) with its tokenizer inside.
#include <fmt/format.h>

#include "data/prepare.h"
#include "jobs/job.h"

using namespace tforge;

namespace {
void print(const PrepareSummary& summary, const std::string& output) {
  SplitCount all;
  for (const SplitCount& split : summary.splits) {
    all.documents += split.documents;
    all.tokens += split.tokens;
    all.bytes += split.bytes;
    all.words += split.words;
  }
  fmt::print("{:<11} {:>12} {:>15} {:>15} {:>15} {:>12}\n", "split", "documents", "tokens", "bytes", "words",
             "bytes/token");
  const auto line = [](std::string_view name, const SplitCount& count) {
    fmt::print("{:<11} {:>12} {:>15} {:>15} {:>15} {:>12.3f}\n", name, count.documents, count.tokens, count.bytes,
               count.words, static_cast<double>(count.bytes) / static_cast<double>(count.tokens));
  };
  for (const Split split : kSplits) line(name_of(split), summary.splits[static_cast<std::size_t>(split)]);
  line("all", all);
  if (summary.empty_documents > 0) fmt::print("{} empty documents were passed over\n", summary.empty_documents);
  fmt::print("tokenizer   {} of {} pieces\nfingerprint {}\nwrote       {}\n", name_of(summary.kind), summary.vocab,
             summary.fingerprint, output);
}
}  // namespace

int main(int argc, char** argv) {
  PrepareOptions options;
  std::vector<std::string> input, jsonl;
  std::optional<std::string> field;
  std::int64_t seed = 0, threads = 0;
  bool force = false;
  const JobInfo info{
      .name = "tf_prepare",
      .description =
          "Makes a token dataset from text (each file one document, or split with --document-start) or from "
          "JSONL (each line one document). Documents are divided between train, validation and test.",
      .options = {{"input", "FILE", &input, "text, UTF-8; may be repeated, or given without the option's name"},
                  {"jsonl", "FILE", &jsonl, "JSON objects, one a line; may be repeated"},
                  {"field", "NAME", &field, "the member of each object that holds the text (with --jsonl)"},
                  {"output", "FILE.h5", &options.output, "the token dataset to write", Need::required},
                  {"document-start", "REGEX", &options.corpus.document_start,
                   "a document begins at each line that matches this POSIX extended regular expression"},
                  {"tokenizer", "NAME|FILE", &options.tokenizer,
                   "bytes; bpe (trained on the train split); a sentencepiece .model; a token dataset or a "
                   "checkpoint (.h5) whose tokenizer is taken"},
                  {"vocab", "N", &options.vocab, "pieces of a trained tokenizer"},
                  {"tokenizer-bytes", "N", &options.tokenizer_bytes, "most text that a tokenizer is trained on"},
                  {"validation-fraction", "X", &options.validation_fraction, "of the documents; at least one"},
                  {"test-fraction", "X", &options.test_fraction, "of the documents; at least one"},
                  {"seed", "N", &seed, "decides the split and the text that the tokenizer is trained on"},
                  {"threads", "N", &threads, "0: one a core; the result does not depend on it"},
                  {"force", "", &force, "replaces an existing output"}},
      .positional = "input",
      .examples = {"tf_prepare --input bible.txt --document-start '^[A-Za-z0-9]+ 1:1 ' --vocab 4096 --output bible.h5",
                   "tf_prepare --input wiki.train.tokens --document-start '^ = [^=]' --output wiki.h5",
                   "tf_prepare --jsonl pages.jsonl --field text --tokenizer bytes --output pages.h5",
                   "tf_prepare --input more/*.txt --tokenizer bible.h5 --output more.h5"}};
  return run_job(argc, argv, info, [&] {
    if (input.empty() == jsonl.empty()) throw UsageError("give either --input or --jsonl");
    if (field.has_value() != !jsonl.empty()) throw UsageError("--jsonl and --field NAME go together");
    if (!jsonl.empty() && !options.corpus.document_start.empty()) {
      throw UsageError("--document-start is for --input; in JSONL each line is a document");
    }
    if (seed < 0) throw UsageError("--seed is {}, want 0 or more", seed);
    if (threads < 0 || threads > 4096) throw UsageError("--threads is {}, want 0 to 4096", threads);
    options.corpus.format = jsonl.empty() ? CorpusFormat::text : CorpusFormat::jsonl;
    options.corpus.files = jsonl.empty() ? input : jsonl;
    options.corpus.field = field.value_or("text");
    options.existing = force ? ExistingFile::replace : ExistingFile::refuse;
    options.seed = static_cast<std::uint64_t>(seed);
    options.threads = static_cast<int>(threads);
    print(prepare(options), options.output);
    return ExitCode::done;
  });
}
