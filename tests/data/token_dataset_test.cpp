#include "data/token_dataset.h"

#include <gtest/gtest.h>

#include <cstring>

#include "storage/hdf5_file.h"
#include "support/corpus.h"
#include "support/scratch.h"

namespace tforge {
namespace {

using namespace test;

struct Document {
  Split split;
  std::string text;
  std::uint64_t words;
};

const std::vector<Document> kDocuments = {{Split::train, "alpha beta", 2},
                                          {Split::test, "x", 1},
                                          {Split::train, " gamma\n", 1},
                                          {Split::validation, "\xff\x80 ok", 2},
                                          {Split::train, "delta", 1}};

std::string write(const std::string& path, const Tokenizer& tokenizer = Tokenizer::bytes()) {
  TokenDatasetWriter writer(path, tokenizer, "test text");
  for (const Document& document : kDocuments) {
    std::vector<std::int32_t> tokens;
    Tokenizer::bytes().encode(document.text, tokens);
    // In two parts, as a long document arrives.
    const auto half = static_cast<std::ptrdiff_t>(tokens.size() / 2);
    writer.add(document.split, std::span(tokens.begin(), tokens.begin() + half));
    writer.add(document.split, std::span(tokens.begin() + half, tokens.end()));
    writer.end_document(document.split, document.text.size(), document.words);
  }
  return writer.commit();
}

TEST(TokenDataset, ComesBackDocumentByDocument) {
  const test::Scratch scratch;
  const std::string fingerprint = write(scratch.path("a.h5"));
  EXPECT_EQ(names_in(scratch.folder()), std::vector<std::string>{"a.h5"});
  const TokenDataset dataset(scratch.path("a.h5"));
  EXPECT_EQ(dataset.vocab(), 256);
  EXPECT_EQ(dataset.fingerprint(), fingerprint);
  EXPECT_EQ(dataset.tokenizer().fingerprint(), Tokenizer::bytes().fingerprint());
  EXPECT_NO_THROW(dataset.verify());
  for (const Split which : kSplits) {
    const TokenSplit& split = dataset.split(which);
    std::uint64_t index = 0, first = 0;
    for (const Document& document : kDocuments) {
      if (document.split != which) continue;
      const DocumentInfo info = split.document(index++);
      EXPECT_EQ(info.first_token, first);
      EXPECT_EQ(info.bytes, document.text.size());
      EXPECT_EQ(info.words, document.words);
      std::vector<std::int32_t> tokens(info.tokens);
      split.copy(info.first_token, info.tokens, tokens.data());
      EXPECT_EQ(dataset.tokenizer().decode(tokens), document.text);
      first += info.tokens;
    }
    EXPECT_EQ(split.documents(), index);
    EXPECT_EQ(split.tokens(), first);
  }
}

TEST(TokenDataset, SplitOutlivesDataset) {
  const test::Scratch scratch;
  write(scratch.path("a.h5"));
  const TokenSplit train = TokenDataset(scratch.path("a.h5")).split(Split::train);
  std::int32_t token = 0;
  train.copy(0, 1, &token);
  EXPECT_EQ(token, 'a');
}

TEST(TokenDataset, FingerprintNamesContentNotFile) {
  const test::Scratch scratch;
  EXPECT_EQ(write(scratch.path("a.h5")), write(scratch.path("b.h5")));
  TokenDatasetWriter writer(scratch.path("c.h5"), Tokenizer::bytes(), "");
  for (const Split split : kSplits) {
    writer.add(split, std::vector<std::int32_t>{1});
    writer.end_document(split, 1, 1);
  }
  EXPECT_NE(writer.commit(), write(scratch.path("a.h5")));
}

TEST(TokenDataset, SmallestSufficientType) {
  const test::Scratch scratch;
  const auto type_for = [&](const Tokenizer& tokenizer) {
    write(scratch.path("t.h5"), tokenizer);
    return Hdf5File::open(scratch.path("t.h5")).info("/train/tokens").type;
  };
  EXPECT_EQ(type_for(Tokenizer::bytes()), StoredType::u8);
  EXPECT_EQ(type_for(Tokenizer::train_bpe(generated_lines(300, 2), 400)), StoredType::u16);
}

TEST(TokenDataset, WideTokensComeBack) {
  const test::Scratch scratch;
  const Tokenizer tokenizer = Tokenizer::train_bpe(generated_lines(300, 2), 400);
  std::vector<std::int32_t> tokens;
  for (int i = 0; i < 1'500'000; ++i) tokens.push_back((i * 7) % 400);  // more than one block
  {
    TokenDatasetWriter writer(scratch.path("w.h5"), tokenizer, "");
    for (const Split split : kSplits) {
      writer.add(split, tokens);
      writer.end_document(split, 10, 2);
    }
    writer.commit();
  }
  const TokenDataset dataset(scratch.path("w.h5"));
  dataset.verify();
  std::vector<std::int32_t> back(tokens.size());
  dataset.split(Split::test).copy(0, back.size(), back.data());
  EXPECT_TRUE(back == tokens);
}

TEST(TokenDataset, UncommittedLeavesNothing) {
  const test::Scratch scratch;
  {
    TokenDatasetWriter writer(scratch.path("a.h5"), Tokenizer::bytes(), "");
    writer.add(Split::train, std::vector<std::int32_t>(3'000'000, 1));
  }
  EXPECT_TRUE(names_in(scratch.folder()).empty());
}

TEST(TokenDataset, OutOfRangeIsADefect) {
  const test::Scratch scratch;
  write(scratch.path("a.h5"));
  const TokenDataset dataset(scratch.path("a.h5"));
  const TokenSplit& train = dataset.split(Split::train);
  std::int32_t out[4];
  expect_error<InternalError>([&] { train.copy(train.tokens() - 1, 2, out); }, "of 22", ExitCode::internal);
  expect_error<InternalError>([&] { train.copy(~0ULL, 2, out); }, "of 22", ExitCode::internal);
  expect_error<InternalError>([&] { static_cast<void>(train.document(3)); }, "document 3 of 3", ExitCode::internal);
}

TEST(TokenDataset, WrongFilesAreNamed) {
  const test::Scratch scratch;
  const auto open = [&](const std::string& name) { TokenDataset dataset(scratch.path(name)); };
  expect_error<DataError>([&] { open("none.h5"); }, "none.h5");
  write_whole(scratch.path("text.h5"), "this is text, not HDF5");
  expect_error<DataError>([&] { open("text.h5"); }, "not an HDF5 file");
  {
    Hdf5File file = Hdf5File::create(scratch.path("foreign.h5"));
    file.write_text("/x", "y");
    file.close();
  }
  expect_error<DataError>([&] { open("foreign.h5"); }, "foreign.h5 is not a token dataset");

  write(scratch.path("a.h5"));
  const std::string whole = read_whole(scratch.path("a.h5"));
  for (const double part : {0.1, 0.5, 0.9, 0.999}) {
    write_whole(scratch.path("cut.h5"),
                whole.substr(0, static_cast<std::size_t>(static_cast<double>(whole.size()) * part)));
    expect_error<DataError>([&] { open("cut.h5"); }, "cut.h5");
  }
}

TEST(TokenDataset, DamageIsFound) {
  const test::Scratch scratch;
  const auto damaged = [&](auto&& damage) {
    write(scratch.path("d.h5"));
    Hdf5File file = Hdf5File::open(scratch.path("d.h5"), Hdf5File::Access::modify);
    damage(file);
    file.close();
    TokenDataset(scratch.path("d.h5")).verify();
  };
  EXPECT_NO_THROW(damaged([](Hdf5File&) {}));
  using Values = std::vector<std::uint64_t>;
  expect_error<DataError>(
      [&] { damaged([](Hdf5File& f) { f.set_attribute("/", "format_version", std::int64_t{2}); }); },
      "format version 2");
  expect_error<DataError>([&] { damaged([](Hdf5File& f) { f.set_attribute("/", "vocab", std::int64_t{255}); }); },
                          "is damaged: its tokenizer");
  expect_error<DataError>(
      [&] {
        damaged(
            [](Hdf5File& f) { f.set_attribute("/tokenizer", "fingerprint", Tokenizer::bytes().fingerprint() + "0"); });
      },
      "is damaged: its tokenizer");
  expect_error<DataError>(
      [&] {
        damaged([](Hdf5File& f) { f.write_rows("/train/offsets", 1, std::span<const std::uint64_t>(Values{900})); });
      },
      "document offsets do not fit its 22 tokens");
  expect_error<DataError>(
      [&] {
        damaged([](Hdf5File& f) { f.write_rows("/train/offsets", 3, std::span<const std::uint64_t>(Values{23})); });
      },
      "document offsets do not fit its 22 tokens");
  expect_error<DataError>(
      [&] {
        damaged([](Hdf5File& f) {
          f.write_rows("/train/tokens", 3, std::span<const std::uint8_t>(std::vector<std::uint8_t>{1}));
        });
      },
      "is damaged: its content has fingerprint");
  expect_error<DataError>(
      [&] { damaged([](Hdf5File& f) { f.write_rows("/test/words", 0, std::span<const std::uint64_t>(Values{9})); }); },
      "is damaged: its content has fingerprint");
}

TEST(TokenDataset, TokenOutsideTheVocabularyIsFoundWhenCopied) {
  const test::Scratch scratch;
  write(scratch.path("a.h5"), Tokenizer::train_bpe(generated_lines(300, 2), 400));
  {
    Hdf5File file = Hdf5File::open(scratch.path("a.h5"), Hdf5File::Access::modify);
    file.write_rows("/train/tokens", 5, std::span<const std::uint16_t>(std::vector<std::uint16_t>{400}));
    file.close();
  }
  const TokenDataset dataset(scratch.path("a.h5"));
  std::int32_t out[22];
  EXPECT_NO_THROW(dataset.split(Split::train).copy(0, 5, out));
  expect_error<DataError>([&] { dataset.split(Split::train).copy(0, 6, out); },
                          "token 400 is outside the vocabulary of 400");
}

}  // namespace
}  // namespace tforge
