#include "data/tokenizer.h"

#include <gtest/gtest.h>
#include <sentencepiece_processor.h>

#include <fstream>
#include <random>

#include "support/corpus.h"
#include "support/scratch.h"

namespace tforge {
namespace {

using namespace test;

const std::vector<std::string>& sentences() {
  static const std::vector<std::string> text = generated_lines(2000, 1);
  return text;
}

const Tokenizer& trained() {
  static const Tokenizer tokenizer = Tokenizer::train_bpe(sentences(), 500);
  return tokenizer;
}

std::vector<std::int32_t> encode(const Tokenizer& tokenizer, std::string_view text) {
  std::vector<std::int32_t> tokens;
  tokenizer.encode(text, tokens);
  return tokens;
}

std::vector<std::string> awkward_texts() {
  std::string all_characters;
  for (char32_t c = 0; c < 0x110000; c += c < 0x3000 ? 1 : 97) {
    if (c < 0xd800 || c > 0xdfff) append_utf8(all_characters, c);
  }
  return {"",
          "\n",
          "\n\n\n",
          "plain words",
          " leading and trailing ",
          "  two  spaces   three    ",
          "tab\tand\vand\f",
          "CRLF\r\nlines\r\n",
          "no newline at the end\nof this",
          "mark \xe2\x96\x81 and \xe2\x96\x81\xe2\x96\x81 twice\xe2\x96\x81",
          "\xe2\x96\x81",
          " \xe2\x96\x81 ",
          "almost the mark \xe2\x96\x82 \xe2\x96\x80 \xe2\x97\x81",
          "emoji \xf0\x9f\x98\x80\xf0\x9f\x91\xa8\xe2\x80\x8d\xf0\x9f\x91\xa9 and e\xcc\x81 \xef\xac\x81",
          "<unk> <s> </s> <0x0A> \xe2\x81\x87",
          std::string("nul \0 inside", 12),
          std::string(200'000, 'x'),
          std::string(200'000, ' '),
          std::string(70'000, ' ') + "\n" + std::string(70'000, 'y') + " end",
          all_characters};
}

TEST(Tokenizer, BytesAreBytes) {
  const Tokenizer tokenizer = Tokenizer::bytes();
  EXPECT_EQ(tokenizer.vocab_size(), 256);
  EXPECT_EQ(tokenizer.serialized(), "");
  EXPECT_EQ(encode(tokenizer, "a\n\xff"), (std::vector<std::int32_t>{97, 10, 255}));
  EXPECT_EQ(tokenizer.decode(std::vector<std::int32_t>{97, 10, 255}), "a\n\xff");
}

TEST(Tokenizer, BpeGivesEveryTextBack) {
  EXPECT_EQ(trained().vocab_size(), 500);
  for (const std::string& text : awkward_texts()) {
    EXPECT_TRUE(trained().decode(encode(trained(), text)) == text) << text.substr(0, 60);
  }
  for (const std::string& text : sentences()) EXPECT_EQ(trained().decode(encode(trained(), text)), text);
}

TEST(Tokenizer, BpeCompresses) {
  std::size_t bytes = 0, tokens = 0;
  for (const std::string& text : sentences()) {
    bytes += text.size();
    tokens += encode(trained(), text).size();
  }
  EXPECT_GT(static_cast<double>(bytes) / static_cast<double>(tokens), 2.5);
}

TEST(Tokenizer, NewlineIsATokenOfItsOwn) {
  const auto newline = encode(trained(), "\n");
  ASSERT_EQ(newline.size(), 1U);
  EXPECT_EQ(trained().piece(newline[0]), "\n");
  for (std::int32_t id = 0; id < trained().vocab_size(); ++id) {
    const std::string_view piece = trained().piece(id);
    EXPECT_TRUE(piece == "\n" || piece.find('\n') == std::string_view::npos) << id;
  }
}

// Cutting the text into words, and remembering words, must not change what sentencepiece says of the whole.
TEST(Tokenizer, BpeIsWhatSentencepieceSays) {
  sentencepiece::SentencePieceProcessor processor;
  ASSERT_TRUE(processor.LoadFromSerializedProto(trained().serialized()).ok());
  Encoder encoder(trained());
  std::string text;
  for (const std::string& line : sentences()) text += line + "\n";
  text += " odd\t  spacing   here \r\n\n <unk> 12,345.67 caf\xc3\xa9 \xf0\x9f\x98\x80 \n";
  std::vector<int> expected;
  ASSERT_TRUE(processor.Encode(text, &expected).ok());
  EXPECT_TRUE(encode(trained(), text) == expected);
  for (int round = 0; round < 2; ++round) {
    std::vector<std::int32_t> tokens;
    encoder.encode(text, tokens);
    EXPECT_TRUE(tokens == expected);
  }
}

TEST(Tokenizer, EncoderAgreesWithTokenizer) {
  Encoder encoder(trained());
  for (const std::string& text : awkward_texts()) {
    std::vector<std::int32_t> tokens;
    encoder.encode(text, tokens);
    EXPECT_TRUE(tokens == encode(trained(), text)) << text.substr(0, 60);
  }
}

TEST(Tokenizer, SafeCutChangesNoToken) {
  std::mt19937_64 random(7);
  for (const Tokenizer& tokenizer : {trained(), Tokenizer::bytes()}) {
    for (const std::string& text : awkward_texts()) {
      const auto whole = encode(tokenizer, text);
      std::vector<std::int32_t> parts;
      std::string pending;
      for (std::size_t position = 0; position < text.size();) {
        const std::size_t take = std::min<std::size_t>(1 + random() % 100'000, text.size() - position);
        pending += text.substr(position, take);
        position += take;
        const std::size_t cut = tokenizer.safe_cut(pending);
        EXPECT_TRUE(cut > 0 || pending.size() < 64 * 1024 + 4);
        tokenizer.encode(std::string_view(pending).substr(0, cut), parts);
        pending.erase(0, cut);
      }
      tokenizer.encode(pending, parts);
      EXPECT_TRUE(parts == whole) << text.substr(0, 60);
    }
  }
  EXPECT_EQ(trained().safe_cut("one two thr"), 7U);
  EXPECT_EQ(trained().safe_cut("one\n"), 4U);
  EXPECT_EQ(trained().safe_cut("one"), 0U);
}

TEST(Tokenizer, StreamDecoderGivesWholeCharacters) {
  for (const Tokenizer& tokenizer : {trained(), Tokenizer::bytes()}) {
    const std::string text = "caf\xc3\xa9 \xf0\x9f\x98\x80 \xe2\x96\x81\n";
    StreamDecoder decoder(tokenizer);
    std::string streamed;
    for (const std::int32_t token : encode(tokenizer, text)) {
      const std::string part = decoder.push(token);
      EXPECT_TRUE(part.empty() || (static_cast<unsigned char>(part[0]) & 0xc0) != 0x80);
      streamed += part;
    }
    EXPECT_EQ(streamed, text);
    EXPECT_EQ(decoder.finish(), "");
  }
  // A model may write anything: bytes that make no character are passed on, none is lost.
  StreamDecoder decoder(Tokenizer::bytes());
  EXPECT_EQ(decoder.push(0xf0), "");
  EXPECT_EQ(decoder.push(0x9f), "");
  EXPECT_EQ(decoder.push('a'),
            "\xf0\x9f"
            "a");
  EXPECT_EQ(decoder.push(0x80), "\x80");
  EXPECT_EQ(decoder.push(0xc3), "");
  EXPECT_EQ(decoder.finish(), "\xc3");
}

TEST(Tokenizer, SerializedComesBack) {
  for (const Tokenizer& tokenizer : {trained(), Tokenizer::bytes()}) {
    const Tokenizer again = Tokenizer::from_serialized(tokenizer.kind(), tokenizer.serialized(), "test");
    EXPECT_EQ(again.fingerprint(), tokenizer.fingerprint());
    EXPECT_EQ(again.vocab_size(), tokenizer.vocab_size());
    EXPECT_EQ(encode(again, sentences()[0]), encode(tokenizer, sentences()[0]));
  }
  EXPECT_EQ(trained().fingerprint().size(), 32U);
  EXPECT_NE(trained().fingerprint(), Tokenizer::bytes().fingerprint());
  EXPECT_EQ(Tokenizer::train_bpe(sentences(), 500).fingerprint(), trained().fingerprint());
}

TEST(Tokenizer, SpacesSurviveATextWithoutThem) {
  const std::vector<std::string> text = {"aaaa", "abab", "aabb", "abba"};
  const Tokenizer tokenizer = Tokenizer::train_bpe(text, 262);
  for (const std::string sample : {"a b", " ", "\xe2\x96\x81 \xe2\x96\x81"}) {
    EXPECT_EQ(tokenizer.decode(encode(tokenizer, sample)), sample);
  }
}

TEST(Tokenizer, BadInputIsNamed) {
  const std::vector<std::string> text = {"few words"};
  expect_error<DataError>([&] { Tokenizer::train_bpe(text, 5000); },
                          "a BPE vocabulary of 5000 pieces cannot be trained on 9 bytes");
  expect_error<DataError>([&] { Tokenizer::train_bpe(text, 100); }, "Vocabulary size is smaller than required_chars");
  expect_error<DataError>([&] { Tokenizer::train_bpe({}, 300); }, "empty text");
  expect_error<DataError>([&] { Tokenizer::train_bpe(text, 0); }, "vocabulary of 0");
  expect_error<DataError>([&] { Tokenizer::from_serialized(TokenizerKind::bpe, "not a model", "x.model"); },
                          "x.model is not a sentencepiece model");
  expect_error<DataError>([&] { Tokenizer::from_serialized(TokenizerKind::bpe, "", "x.model"); },
                          "x.model is not a sentencepiece model");
  expect_error<DataError>([&] { Tokenizer::from_serialized(TokenizerKind::bytes, "x", "y"); },
                          "y: a tokenizer of bytes");
  expect_error<DataError>([&] { Tokenizer::from_model_file("/nonexistent.model"); }, "/nonexistent.model");
  expect_error<DataError>([&] { static_cast<void>(trained().decode(std::vector<std::int32_t>{500})); },
                          "token 500 is outside the vocabulary of 500");
  expect_error<DataError>([&] { static_cast<void>(trained().piece(-1)); }, "token -1");
  expect_error<DataError>([&] { tokenizer_kind_from_name("bpee"); }, "bpee");
}

// Models as sentencepiece trains them by default lose text, and are refused by what they do.
TEST(Tokenizer, LossyModelsAreRefused) {
  const test::Scratch scratch;
  const auto train = [&](const std::string& options) {
    std::ofstream text(scratch.path("text"));
    for (const std::string& line : sentences()) text << line << "\n";
    text.close();
    const std::string model = scratch.path("m");
    EXPECT_EQ(std::system(fmt::format("spm_train --input={} --model_prefix={} --model_type=bpe "
                                      "--minloglevel=3 {} >/dev/null 2>&1",
                                      scratch.path("text"), model, options)
                              .c_str()),
              0);
    return model + ".model";
  };
  if (std::system("spm_train --help >/dev/null 2>&1") != 0) GTEST_SKIP() << "needs spm_train (Debian: sentencepiece)";
  expect_error<DataError>(
      [&] { Tokenizer::from_model_file(train("--vocab_size=200 --normalization_rule_name=identity")); },
      "has no piece for byte");
  expect_error<DataError>([&] { Tokenizer::from_model_file(train("--vocab_size=450 --byte_fallback=true")); },
                          "does not give text back");
  expect_error<DataError>(
      [&] {
        Tokenizer::from_model_file(
            train("--vocab_size=450 --byte_fallback=true --normalization_rule_name=identity "
                  "--remove_extra_whitespaces=false"));
      },
      "does not give text back");
  const Tokenizer lossless = Tokenizer::from_model_file(
      train("--vocab_size=450 --byte_fallback=true --normalization_rule_name=identity --remove_extra_whitespaces=false "
            "--add_dummy_prefix=false"));
  for (const std::string& text : awkward_texts()) {
    EXPECT_TRUE(lossless.decode(encode(lossless, text)) == text) << text.substr(0, 60);
  }
  // Pieces of several words forbid cutting at spaces, not the round trip.
  const Tokenizer phrases = Tokenizer::from_model_file(
      train("--vocab_size=450 --byte_fallback=true --normalization_rule_name=identity --remove_extra_whitespaces=false "
            "--add_dummy_prefix=false --split_by_whitespace=false"));
  for (const std::string& text : awkward_texts()) {
    EXPECT_TRUE(phrases.decode(encode(phrases, text)) == text) << text.substr(0, 60);
  }
  EXPECT_EQ(phrases.safe_cut("one two three"), 0U);
}

TEST(Tokenizer, WikiTextRoundTrip) {
  const char* folder = std::getenv("TFORGE_DATA_DIR");
  if (folder == nullptr) GTEST_SKIP() << "TFORGE_DATA_DIR names no folder with wikitext-2/";
  const std::string text = read_whole(std::string(folder) + "/wikitext-2/wiki.train.tokens");
  const Tokenizer tokenizer = Tokenizer::train_bpe(std::vector<std::string>{text.substr(0, 4'000'000)}, 4096);
  Encoder encoder(tokenizer);
  std::vector<std::int32_t> tokens;
  encoder.encode(text, tokens);
  EXPECT_TRUE(tokenizer.decode(tokens) == text);
  EXPECT_GT(static_cast<double>(text.size()) / static_cast<double>(tokens.size()), 3.0);
}

}  // namespace
}  // namespace tforge
