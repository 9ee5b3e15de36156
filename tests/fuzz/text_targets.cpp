// Targets whose input is text or a model: configuration, corpus, tokenizer.
#include "data/documents.h"
#include "data/text.h"
#include "data/tokenizer.h"
#include "fuzz/all_targets.h"
#include "fuzz/input.h"
#include "support/corpus.h"
#include "train/config.h"

namespace tforge::fuzz {

// ---- configuration: a file, then overrides, each after a NUL

void config(Input input) {
  const std::string all = text_of(input);
  const std::size_t end = std::min(all.find('\0'), all.size());
  std::vector<std::string> overrides;
  for (std::size_t begin = end + 1; begin <= all.size();) {
    const std::size_t stop = std::min(all.find('\0', begin), all.size());
    overrides.push_back(all.substr(begin, stop - begin));
    begin = stop + 1;
  }
  refuse_or([&] {
    const RunConfig read = parse_config(all.substr(0, end), "input.toml", overrides).config;
    if (read.model.vocab > 0 && read.model.parameters() < 0) throw Finding("a number of parameters that overflows");
    const std::string text = to_toml(read);
    RunConfig again;
    try {
      again = parse_config(text, "written.toml").config;
    } catch (const Error& error) {
      throw Finding(std::string("what was accepted is refused when it comes back: ") + error.what());
    }
    if (to_toml(again) != text || !diff(read, again).empty()) throw Finding("another configuration comes back");
  });
}

std::vector<std::string> config_seeds() {
  RunConfig c;
  c.data.path = "data.h5";
  c.run.dir = "run";
  const std::string required = "[data]\npath = \"data.h5\"\n[run]\ndir = 'run'\n";
  return {to_toml(c),
          required + "[model]\nlayers = 3\ntokens.query = 12\n[train]\nmax_time = \"1h30m\"\nlr = 3e-4 # peak\n",
          required + std::string("\0train.lr=1e-3\0run.resume = never\0train.max_time=90", 51),
          required + "[train.growth]\nold_rows = \"rate\"\nold_rows_rate = 0.5\nmoments = \"\"\"reset\"\"\"\n"};
}

// ---- corpus: a letter for the format, then the file

namespace {

struct Collector final : DocumentHandler {
  void text(std::string_view piece) override { all += piece; }
  void end_document() override { ++documents; }
  std::string all;
  std::uint64_t documents = 0;
};

}  // namespace

void documents(Input input) {
  const std::string all = text_of(input);
  if (all.empty()) return;
  const std::string body = all.substr(1);
  write_bytes(input_path(), body);
  Corpus corpus;
  corpus.files = {input_path()};
  if (all[0] == 'j') corpus.format = CorpusFormat::jsonl;
  if (all[0] == 'd') corpus.document_start = "^(Chapter [0-9]+|=+ .* =+)$";
  refuse_or([&] {
    Collector collector;
    const CorpusCount count = read_documents(corpus, collector);
    if (count.documents != collector.documents) throw Finding("documents are counted wrongly");
    if (corpus.format == CorpusFormat::text && collector.all != body) throw Finding("a byte of the text is lost");
    Utf8Checker utf8;
    if (utf8.feed(collector.all) || utf8.finish()) throw Finding("text that is not UTF-8 was passed on");
  });
}

std::vector<std::string> documents_seeds() {
  return {"ta text\nof caf\xc3\xa9\n", "dbefore\nChapter 1\none\nChapter 2\ntwo\n",
          "j{\"text\": \"one\"}\n{\"id\": [1, {\"text\": 2}], \"text\": \"\\u00e9\\ud83d\\ude00\"}\n"};
}

// ---- tokenizer: a sentencepiece model, or after an 'm' changes of a sound one

namespace {

const std::string& sound_model() {
  static const std::string model = Tokenizer::train_bpe(test::generated_lines(50, 1), 300).serialized();
  return model;
}

std::string model_of(Input input) {
  const std::string text = text_of(input);
  if (!text.starts_with('m')) return text;
  std::string model = sound_model();
  std::string_view rest = std::string_view(text).substr(1);
  while (const std::optional<Change> change = Change::next(rest)) {
    const std::size_t at = change->offset % model.size();
    model.replace(at, change->bytes.size(), change->bytes);
  }
  return model;
}

}  // namespace

void tokenizer(Input input) {
  refuse_or([&] {
    const Tokenizer read = Tokenizer::from_serialized(TokenizerKind::bpe, model_of(input), "input.model");
    Encoder encoder(read);
    for (const char* text :
         {"the model learns again", "  caf\xc3\xa9 \xe2\x96\x81 \n\n1,024 x", "\xf0\x9f\x98\x80\t"}) {
      refuse_or([&] {
        std::vector<std::int32_t> tokens, same;
        read.encode(text, tokens);
        encoder.encode(text, same);
        if (read.decode(tokens) != text) throw Finding("the text does not come back");
        if (same != tokens) throw Finding("the encoder gives other tokens");
      });
    }
  });
}

std::vector<std::string> tokenizer_seeds() {
  // NormalizerSpec: neither add_dummy_prefix nor remove_extra_whitespaces.
  const std::string spec("\x18\0\x20\0", 4);
  const std::size_t at = sound_model().find(spec);
  if (at == std::string::npos) throw std::logic_error("another model than expected");
  const auto offset = static_cast<std::uint16_t>(at);
  return {sound_model(), Tokenizer::train_bpe(std::vector<std::string>{"ab abc abcd\n"}, 270).serialized(),
          "m" + Change{3000, false, "abc"}.text(), "m" + Change{offset, false, "\x18\1"}.text(),
          "m" + Change{offset, false, std::string("\x18\0\x20\1", 4)}.text()};
}

}  // namespace tforge::fuzz
