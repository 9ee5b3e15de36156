#include "data/prepare.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstdlib>
#include <map>

#include "storage/hdf5_file.h"
#include "support/corpus.h"
#include "support/scratch.h"

namespace tforge {
namespace {

using namespace test;

/// Gathers documents.
class Gather : public DocumentHandler {
 public:
  void text(std::string_view piece) override { under_way_ += piece; }
  void end_document() override { documents.push_back(std::exchange(under_way_, {})); }
  std::vector<std::string> documents;

 private:
  std::string under_way_;
};

std::vector<std::string> documents_of(const Corpus& corpus) {
  Gather gather;
  const CorpusCount count = read_documents(corpus, gather);
  EXPECT_EQ(count.documents, gather.documents.size());
  return gather.documents;
}

/// Every document of a dataset, decoded, by its text.
std::map<std::string, Split> contents(const TokenDataset& dataset) {
  std::map<std::string, Split> found;
  for (const Split which : kSplits) {
    const TokenSplit& split = dataset.split(which);
    for (std::uint64_t i = 0; i < split.documents(); ++i) {
      const DocumentInfo info = split.document(i);
      std::vector<std::int32_t> tokens(info.tokens);
      split.copy(info.first_token, info.tokens, tokens.data());
      const std::string text = dataset.tokenizer().decode(tokens);
      EXPECT_EQ(text.size(), info.bytes);
      found[text] = which;
    }
  }
  return found;
}

/// Chapters with a heading each, of all kinds of lines.
std::string chapters(int count) {
  std::string text;
  const auto lines = generated_lines(count * 5, 4);
  for (int i = 0; i < count; ++i) {
    text += fmt::format(" = Chapter {} = \n", i);
    for (int j = 0; j < 5; ++j)
      text += lines[static_cast<std::size_t>(i) * 5 + static_cast<std::size_t>(j)] + (j % 2 == 0 ? "\n" : "\r\n");
    text += " = = Section = = \n\xe2\x96\x81\ttab \xf0\x9f\x98\x80\n\n";
  }
  return text;
}

PrepareOptions options_for(const Scratch& scratch, const std::string& text, const std::string& output = "out.h5") {
  write_whole(scratch.path("in.txt"), text);
  PrepareOptions options;
  options.corpus.files = {scratch.path("in.txt")};
  options.corpus.document_start = "^ = [^=]";
  options.output = scratch.path(output);
  options.vocab = 400;
  return options;
}

TEST(Documents, FileIsOneDocument) {
  const Scratch scratch;
  write_whole(scratch.path("a"), "one\ntwo");
  write_whole(scratch.path("b"), std::string(3'000'000, 'x'));
  write_whole(scratch.path("c"), "");
  Corpus corpus{.files = {scratch.path("a"), scratch.path("b"), scratch.path("c")}};
  Gather gather;
  const CorpusCount count = read_documents(corpus, gather);
  EXPECT_EQ(count.documents, 2U);
  EXPECT_EQ(count.empty, 1U);
  EXPECT_TRUE(gather.documents == (std::vector<std::string>{"one\ntwo", std::string(3'000'000, 'x')}));
}

TEST(Documents, StartLinesBeginDocuments) {
  const Scratch scratch;
  const auto split = [&](const std::string& text, const std::string& regex) {
    write_whole(scratch.path("t"), text);
    return documents_of({.files = {scratch.path("t")}, .document_start = regex});
  };
  using Texts = std::vector<std::string>;
  EXPECT_EQ(split("# a\nx\n# b\ny\n", "^#"), (Texts{"# a\nx\n", "# b\ny\n"}));
  EXPECT_EQ(split("before\n# a\nx\n# b", "^#"), (Texts{"before\n", "# a\nx\n", "# b"}));
  EXPECT_EQ(split(" \n\n# a\nx\n", "^#"), (Texts{" \n\n# a\nx\n"}));
  EXPECT_EQ(split("no start\nhere\n", "^#"), (Texts{"no start\nhere\n"}));
  EXPECT_EQ(split("# a\n# b\n", "^#"), (Texts{"# a\n", "# b\n"}));
  EXPECT_EQ(split("a end\r\nb\nc end\n", "end$"), (Texts{"a end\r\nb\n", "c end\n"}));
  EXPECT_EQ(split(" = A = \n = = s = = \n = B = \n", "^ = [^=]"), (Texts{" = A = \n = = s = = \n", " = B = \n"}));
  // A line longer than what is searched neither matches at its cut nor loses a byte.
  const std::string longline = std::string(2'500'000, 'x');
  EXPECT_TRUE(split(longline + "\n# a\n" + longline, "^#|x$") == (Texts{longline + "\n", "# a\n" + longline}));
}

TEST(Documents, EveryByteArrivesWhateverTheBlocks) {
  const Scratch scratch;
  std::string text;
  std::mt19937 random(5);
  while (text.size() < 5'000'000) {
    if (random() % 10 == 0) text += "# ";
    text +=
        std::string(random() % 3 == 0 ? random() % 9000 : random() % 90, static_cast<char>('a' + random() % 26)) + "\n";
  }
  write_whole(scratch.path("t"), text);
  const auto documents = documents_of({.files = {scratch.path("t")}, .document_start = "^#"});
  EXPECT_GT(documents.size(), 50U);
  std::string joined;
  for (std::size_t i = 0; i < documents.size(); ++i) {
    EXPECT_TRUE(i == 0 || documents[i].starts_with("# "));
    EXPECT_EQ(documents[i].find("\n# "), std::string::npos);
    joined += documents[i];
  }
  EXPECT_TRUE(joined == text);
}

TEST(Documents, Jsonl) {
  const Scratch scratch;
  write_whole(scratch.path("j"),
              "{\"id\": 1, \"text\": \"one\\nline\", \"more\": {\"text\": [1, {\"text\": 2}]}}\n"
              "\n"
              "  {\"text\": \"caf\\u00e9 \\ud83d\\ude00\"}  \r\n"
              "{\"text\": \"\"}\n"
              "{\"other\": null, \"text\": \"last\"}");
  Corpus corpus{.files = {scratch.path("j")}, .format = CorpusFormat::jsonl};
  Gather gather;
  const CorpusCount count = read_documents(corpus, gather);
  EXPECT_EQ(gather.documents, (std::vector<std::string>{"one\nline", "caf\xc3\xa9 \xf0\x9f\x98\x80", "last"}));
  EXPECT_EQ(count.empty, 1U);

  const auto error = [&](const std::string& line, const std::string& part) {
    write_whole(scratch.path("e"), "{\"text\": \"good\"}\n" + line);
    Gather ignored;
    expect_error<DataError>(
        [&] { read_documents({.files = {scratch.path("e")}, .format = CorpusFormat::jsonl}, ignored); }, part);
  };
  error("{\"Text\": \"x\"}\n", "line 2 has no field \"text\"");
  error("{\"text\": 3}\n", "line 2: the field \"text\" is a number, want a string");
  error("{\"text\": [\"x\"]}\n", "line 2: the field \"text\" is an array");
  error("[\"text\"]\n", "line 2 is an array, want an object");
  error("\"text\"\n", "line 2 is a string, want an object");
  error("{\"text\": \"a\", \"text\": \"b\"}\n", "line 2 has the field \"text\" twice");
  error("{\"text\": \"a\"\n", "line 2 is not JSON at byte offset");
  error("{\"text\": \"a\"} {\"text\": \"b\"}\n", "line 2 is not JSON at byte offset 31");
  error("{\"text\": \"\xff\"}\n", "line 2 is not JSON at byte offset 27 of the file");
  error("{\"text\": \"" + std::string(100'000, 'x'), "line 2 is not JSON");
}

TEST(Documents, BadInputIsNamed) {
  const Scratch scratch;
  Gather gather;
  const auto read = [&](const std::string& name, const std::string& regex = "") {
    read_documents({.files = {scratch.path(name)}, .document_start = regex}, gather);
  };
  expect_error<DataError>([&] { read("none"); }, "none: No such file or directory");
  expect_error<DataError>([&] { read("."); }, "not a regular file");
  ASSERT_EQ(::mkfifo(scratch.path("fifo").c_str(), 0600), 0);
  expect_error<DataError>([&] { read("fifo"); }, "not a regular file");
  write_whole(scratch.path("t"), "good");
  expect_error<DataError>([&] { read("t", "(["); }, "the regular expression '([' is malformed");
  write_whole(scratch.path("bad"), std::string(2'000'000, 'a') + "\xe9 latin-1");
  expect_error<DataError>([&] { read("bad"); }, "bad is not UTF-8: ill-formed character at byte offset 2000000");
  write_whole(scratch.path("cut"), "caf\xc3");
  expect_error<DataError>([&] { read("cut"); }, "cut is not UTF-8: ill-formed character at byte offset 3");
}

TEST(Prepare, WholeCorpusComesBackSplitByDocument) {
  const Scratch scratch;
  PrepareOptions options = options_for(scratch, chapters(100));
  for (const std::string tokenizer : {"bpe", "bytes"}) {
    options.tokenizer = tokenizer;
    options.existing = ExistingFile::replace;
    const PrepareSummary summary = prepare(options);
    const TokenDataset dataset(options.output);
    dataset.verify();
    EXPECT_EQ(dataset.fingerprint(), summary.fingerprint);
    EXPECT_EQ(dataset.vocab(), tokenizer == "bpe" ? 400 : 256);
    EXPECT_EQ(dataset.split(Split::train).documents(), 90U);
    EXPECT_EQ(dataset.split(Split::validation).documents(), 5U);
    EXPECT_EQ(dataset.split(Split::test).documents(), 5U);
    const auto found = contents(dataset);
    const auto expected = documents_of(options.corpus);
    EXPECT_EQ(found.size(), expected.size());
    for (const std::string& document : expected) EXPECT_TRUE(found.contains(document)) << document;
    std::uint64_t bytes = 0, words = 0;
    for (const SplitCount& split : summary.splits) {
      bytes += split.bytes;
      words += split.words;
    }
    EXPECT_EQ(bytes, read_whole(options.corpus.files[0]).size());
    EXPECT_GT(words, 3000U);
  }
}

TEST(Prepare, ResultDoesNotDependOnThreads) {
  const Scratch scratch;
  std::string text = chapters(50);
  text += " = Long = \n";  // a document of several pieces, with and without newlines
  for (const std::string& line : generated_lines(20'000, 9)) text += line + (text.size() % 3 == 0 ? "\n" : " ");
  text += " = Unbroken = \n" + std::string(1'500'000, 'z') + "\n = Spaces = \n" + std::string(700'000, ' ');
  PrepareOptions options = options_for(scratch, text);
  std::vector<std::string> fingerprints;
  for (const int threads : {1, 2, 5}) {
    options.output = scratch.path(fmt::format("{}.h5", threads));
    options.threads = threads;
    fingerprints.push_back(prepare(options).fingerprint);
  }
  EXPECT_EQ(fingerprints[0], fingerprints[1]);
  EXPECT_EQ(fingerprints[0], fingerprints[2]);
  // The pieces changed no token: each document encoded as a whole is what the file holds.
  const TokenDataset dataset(options.output);
  std::map<std::string, std::vector<std::int32_t>> stored;
  for (const Split which : kSplits) {
    for (std::uint64_t i = 0; i < dataset.split(which).documents(); ++i) {
      const DocumentInfo info = dataset.split(which).document(i);
      std::vector<std::int32_t> tokens(info.tokens);
      dataset.split(which).copy(info.first_token, info.tokens, tokens.data());
      stored[dataset.tokenizer().decode(tokens)] = tokens;
    }
  }
  for (const std::string& document : documents_of(options.corpus)) {
    std::vector<std::int32_t> whole;
    dataset.tokenizer().encode(document, whole);
    EXPECT_TRUE(stored[document] == whole) << document.substr(0, 40);
  }
}

TEST(Prepare, SplitDependsOnSeedAlone) {
  const Scratch scratch;
  PrepareOptions options = options_for(scratch, chapters(60));
  const auto split_with = [&](std::uint64_t seed, const std::string& tokenizer) {
    options.seed = seed;
    options.tokenizer = tokenizer;
    options.existing = ExistingFile::replace;
    prepare(options);
    return contents(TokenDataset(options.output));
  };
  EXPECT_EQ(split_with(1, "bpe"), split_with(1, "bytes"));
  EXPECT_NE(split_with(1, "bytes"), split_with(2, "bytes"));
}

TEST(Prepare, EverySplitGetsADocument) {
  const Scratch scratch;
  for (const double fraction : {0.0, 0.05, 0.49}) {
    PrepareOptions options = options_for(scratch, chapters(3));
    options.tokenizer = "bytes";
    options.existing = ExistingFile::replace;
    options.validation_fraction = options.test_fraction = fraction;
    prepare(options);
    const TokenDataset dataset(options.output);
    for (const Split split : kSplits) EXPECT_EQ(dataset.split(split).documents(), 1U);
  }
}

TEST(Prepare, TokenizerIsTrainedOnAtMostItsBytesOfTheTrainSplit) {
  const Scratch scratch;
  PrepareOptions options = options_for(scratch, chapters(400));
  options.tokenizer_bytes = 10'000;
  options.vocab = 5000;
  const std::string error = error_of<DataError>([&] { prepare(options); });
  const std::string before = "a BPE vocabulary of 5000 pieces cannot be trained on ";
  ASSERT_TRUE(error.starts_with(before)) << error;
  const int bytes = std::stoi(error.substr(before.size()));
  EXPECT_LE(bytes, 10'000);
  EXPECT_GT(bytes, 9'900);
  options.vocab = 400;
  // A character of the held-out documents alone is not in the vocabulary.
  options.tokenizer_bytes = 1'000'000;
  prepare(options);
  const auto splits = contents(TokenDataset(options.output));
  const std::string held_out = "\xd0\x96\xd0\x96\xd0\x96";
  std::string text;
  for (const std::string& document : documents_of(options.corpus)) {
    text += document;
    if (splits.at(document) != Split::train) {
      for (int i = 0; i < 200; ++i) text += held_out + " ";
      text += "\n";
    }
  }
  write_whole(options.corpus.files[0], text);
  options.existing = ExistingFile::replace;
  prepare(options);
  const TokenDataset dataset(options.output);
  for (std::int32_t id = 0; id < dataset.vocab(); ++id) {
    EXPECT_EQ(dataset.tokenizer().piece(id).find("\xd0\x96"), std::string_view::npos);
  }
}

TEST(Prepare, TokenizerOfAnotherDatasetOrModel) {
  const Scratch scratch;
  PrepareOptions options = options_for(scratch, chapters(50), "first.h5");
  prepare(options);
  const TokenDataset first(options.output);
  write_whole(scratch.path("m.model"), first.tokenizer().serialized());
  for (const std::string tokenizer : {"first.h5", "m.model"}) {
    PrepareOptions other = options_for(scratch, chapters(20), "second.h5");
    other.existing = ExistingFile::replace;
    other.tokenizer = scratch.path(tokenizer);
    prepare(other);
    EXPECT_EQ(TokenDataset(other.output).tokenizer().fingerprint(), first.tokenizer().fingerprint());
  }
}

TEST(Prepare, BadInputIsNamedAndLeavesNothing) {
  const Scratch scratch;
  const auto fails = [&]<class E>(std::type_identity<E>, const std::string& text, auto&& change,
                                  const std::string& part) {
    PrepareOptions options = options_for(scratch, text);
    change(options);
    expect_error<E>([&] { prepare(options); }, part);
    EXPECT_EQ(names_in(scratch.folder()), std::vector<std::string>{"in.txt"});
  };
  const std::type_identity<DataError> data;
  const std::type_identity<UsageError> usage;
  const auto nothing = [](PrepareOptions&) {};
  fails(data, "", nothing, "the corpus is empty");
  fails(data, chapters(2), nothing, "the corpus holds 2 documents, at least 3 are needed");
  fails(data, "one document", nothing, "the corpus holds 1 document, at least 3");
  fails(data, chapters(9) + "\xc3(", nothing, "in.txt is not UTF-8: ill-formed character at byte offset");
  fails(
      data, chapters(9), [](PrepareOptions& o) { o.vocab = 100'000; }, "vocabulary of 100000 pieces cannot be trained");
  fails(
      data, chapters(9), [](PrepareOptions& o) { o.tokenizer = "/none.model"; }, "/none.model");
  fails(
      data, chapters(9), [](PrepareOptions& o) { o.tokenizer = "/none.h5"; }, "/none.h5");
  fails(
      data, chapters(9), [](PrepareOptions& o) { o.corpus.document_start = "(["; }, "is malformed");
  fails(
      data, chapters(9), [](PrepareOptions& o) { o.corpus.files.push_back("/none.txt"); }, "cannot read /none.txt");
  fails(
      usage, chapters(9), [](PrepareOptions& o) { o.validation_fraction = o.test_fraction = 0.5; },
      "nothing to train on");
  fails(
      usage, chapters(9), [](PrepareOptions& o) { o.validation_fraction = -0.1; }, "nothing to train on");
  fails(
      usage, chapters(9), [](PrepareOptions& o) { o.corpus.files.clear(); }, "no input files");
  fails(
      usage, chapters(9), [](PrepareOptions& o) { o.tokenizer_bytes = 0; }, "0 bytes");
  fails(
      usage, chapters(9), [](PrepareOptions& o) { o.output = "/none/there/out.h5"; }, "there is no folder /none/there");
  fails(
      usage, chapters(9), [](PrepareOptions& o) { o.output = o.corpus.files[0]; },
      "exists already; --force replaces it");
  fails(
      usage, chapters(9),
      [](PrepareOptions& o) {
        o.output = o.corpus.files[0];
        o.existing = ExistingFile::replace;
      },
      "is both input and output");
}

TEST(Prepare, FullDiskLeavesNothing) {
  const SmallDisk disk(1);
  if (!disk.mounted()) GTEST_SKIP() << "mounting a small disk needs root";
  const Scratch scratch;
  // With 1 MiB: what is spooled fills the disk; what is spooled fits, but not the file beside it.
  for (const int count : {20'000, 2'500}) {
    PrepareOptions options = options_for(scratch, chapters(count));
    options.tokenizer = "bytes";
    options.output = disk.path("out.h5");
    expect_error<ResourceError>([&] { prepare(options); }, "out.h5: the disk is full", ExitCode::no_resources);
    EXPECT_TRUE(names_in(disk.folder()).empty());
  }
  PrepareOptions options = options_for(scratch, chapters(500));
  options.tokenizer = "bytes";
  options.output = disk.path("out.h5");
  EXPECT_NO_THROW(prepare(options));
  EXPECT_EQ(names_in(disk.folder()), std::vector<std::string>{"out.h5"});
}

TEST(Prepare, ReadByH5py) {
  if (!has_h5py()) GTEST_SKIP() << "needs python3-h5py";
  const Scratch scratch;
  PrepareOptions options = options_for(scratch, chapters(40));
  options.tokenizer = "bytes";
  prepare(options);
  python(R"(
import sys, h5py, numpy as np
text = open(sys.argv[1], 'rb').read()
f = h5py.File(sys.argv[2], 'r')
assert f.attrs['format'] == b'tokenforge-tokens' and f.attrs['vocab'] == 256, dict(f.attrs)
found = []
for split in ('train', 'validation', 'test'):
    g = f[split]
    tokens, offsets = g['tokens'][:], g['offsets'][:]
    assert tokens.dtype == np.uint8 and g['tokens'].chunks is None and g['tokens'].compression is None
    assert offsets[0] == 0 and offsets[-1] == len(tokens) and len(offsets) == len(g['bytes']) + 1
    for a, b, size, words in zip(offsets[:-1], offsets[1:], g['bytes'], g['words']):
        document = tokens[a:b].tobytes()
        assert document in text and len(document) == size and len(document.split()) == words
        found.append(document)
assert len(found) == 40 and sum(map(len, found)) == len(text)
)",
         options.corpus.files[0] + " " + options.output);
}

TEST(Prepare, WikiText) {
  const char* folder = std::getenv("TFORGE_DATA_DIR");
  if (folder == nullptr) GTEST_SKIP() << "TFORGE_DATA_DIR names no folder with wikitext-2/";
  const Scratch scratch;
  PrepareOptions options;
  options.corpus.files = {std::string(folder) + "/wikitext-2/wiki.train.tokens"};
  options.corpus.document_start = "^ = [^=]";
  options.output = scratch.path("wiki.h5");
  options.vocab = 4096;
  options.tokenizer_bytes = 4'000'000;
  prepare(options);
  const TokenDataset dataset(options.output);
  const auto found = contents(dataset);
  const auto expected = documents_of(options.corpus);
  EXPECT_EQ(expected.size(), 629U);  // the articles of WikiText-2's training text
  std::size_t bytes = 0;
  for (const std::string& document : expected) {
    EXPECT_TRUE(found.contains(document));
    bytes += document.size();
  }
  EXPECT_EQ(bytes, 10'797'148U);
}

}  // namespace
}  // namespace tforge
