#include "data/prepare.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <filesystem>
#include <mutex>
#include <utility>
#include <vector>

#include "core/errors.h"
#include "core/log.h"
#include "core/rng.h"
#include "data/text.h"
#include "storage/atomic_file.h"

namespace tforge {
namespace {
constexpr std::size_t kSampleLine = 16 * 1024;  // longer lines are drawn in parts
constexpr std::size_t kPiece = 256 * 1024;      // most text that one thread encodes at once; above safe_cut's limit
constexpr std::size_t kBatchPerThread = 1 << 20;
constexpr std::size_t kLeastBatch = 4 << 20;

/// Which document goes to which split.
class SplitRule {
 public:
  SplitRule(const PrepareOptions& options, std::uint64_t documents)
      : order_(options.seed, "split", documents),
        validation_(part(options.validation_fraction, documents, documents - 2)),
        test_(part(options.test_fraction, documents, documents - 1 - validation_)) {}

  Split operator()(std::uint64_t document) const {
    const std::uint64_t place = order_(document);
    if (place < validation_) return Split::validation;
    return place < validation_ + test_ ? Split::test : Split::train;
  }

 private:
  static std::uint64_t part(double fraction, std::uint64_t documents, std::uint64_t most) {
    const auto wanted = static_cast<std::uint64_t>(std::llround(fraction * static_cast<double>(documents)));
    return std::clamp<std::uint64_t>(wanted, 1, most);
  }
  Permutation order_;
  std::uint64_t validation_;
  std::uint64_t test_;
};

/// Pass 1: draws lines. A line is kept while its random number is under a threshold, which falls whenever what is kept
/// outgrows the capacity; so the draw is even over a corpus of unknown size. Which documents are held out is known
/// after the pass, so that somewhat more is kept than is taken.
class LineSample : public DocumentHandler {
 public:
  /// Takes at most `limit` bytes, of which a share `held_out` of what was drawn is not to be taken; 0 draws nothing.
  LineSample(std::uint64_t seed, std::int64_t limit, double held_out)
      : rng_(seed, "tokenizer sample"),
        limit_(static_cast<std::uint64_t>(limit)),
        capacity_(static_cast<std::size_t>(1.25 * static_cast<double>(limit) / (1 - held_out))) {}

  void text(std::string_view piece) override {
    if (limit_ == 0) return;
    while (!piece.empty()) {
      const std::size_t newline = piece.find('\n');
      const std::size_t take = std::min({newline, piece.size(), kSampleLine - line_.size()});
      line_ += piece.substr(0, take);
      if (take == newline) {
        piece.remove_prefix(take + 1);
        draw(line_.size());
      } else {
        piece.remove_prefix(take);
        if (line_.size() == kSampleLine) {
          const std::size_t space = line_.rfind(' ');
          draw(space != std::string::npos && space > 0 ? space : whole_characters(line_));
        }
      }
    }
  }
  void end_document() override {
    draw(line_.size());
    ++document_;
  }

  /// Drawn lines of the train split, in order: those of the smallest numbers, up to the limit. Leaves nothing behind.
  std::string take(const SplitRule& rule) {
    keep([&](const Line& line) { return rule(line.document) == Split::train; });
    std::vector<std::pair<double, std::size_t>> order;
    for (const Line& line : lines_) order.emplace_back(line.number, line.size);
    std::sort(order.begin(), order.end());
    std::uint64_t bytes = 0;
    for (const auto& [number, size] : order) {
      bytes += size;
      if (bytes <= limit_) continue;
      keep([end = number](const Line& line) { return line.number < end; });
      break;
    }
    lines_ = {};
    return std::exchange(text_, {});
  }

 private:
  struct Line {
    double number;
    std::uint64_t document;
    std::size_t size;  // with its newline
  };

  void draw(std::size_t length) {
    const double number = rng_.uniform(drawn_++);
    if (number < threshold_ && length > 0) {
      text_.append(line_, 0, length);
      text_ += '\n';
      lines_.push_back({number, document_, length + 1});
      while (text_.size() > capacity_) {
        threshold_ *= 0.95;
        keep([&](const Line& line) { return line.number < threshold_; });
      }
    }
    line_.erase(0, length);
  }

  /// Drops the lines that `wanted` does not want.
  template <class Wanted>
  void keep(Wanted&& wanted) {
    std::size_t from = 0, to = 0, lines = 0;
    for (const Line line : lines_) {  // a copy: its place may be taken
      if (wanted(line)) {
        std::copy_n(text_.begin() + static_cast<std::ptrdiff_t>(from), line.size,
                    text_.begin() + static_cast<std::ptrdiff_t>(to));
        to += line.size;
        lines_[lines++] = line;
      }
      from += line.size;
    }
    text_.resize(to);
    lines_.resize(lines);
  }

  Rng rng_;
  std::uint64_t limit_;
  std::size_t capacity_;
  std::string line_;         // under way
  std::uint64_t drawn_ = 0;  // lines seen
  std::uint64_t document_ = 0;
  double threshold_ = 1;
  std::string text_;  // the lines kept, one after another
  std::vector<Line> lines_;
};

/// Pass 2: gathers text into batches of pieces that can be encoded apart, encodes each batch on all threads, and
/// writes it in order.
class Encoding : public DocumentHandler {
 public:
  Encoding(const Tokenizer& tokenizer, const SplitRule& rule, std::uint64_t documents, int threads,
           TokenDatasetWriter& writer, PrepareSummary& summary)
      : tokenizer_(tokenizer),
        rule_(rule),
        documents_(documents),
        writer_(writer),
        summary_(summary),
        capacity_(std::max(kLeastBatch, static_cast<std::size_t>(threads) * kBatchPerThread)) {
    for (int i = 0; i < threads; ++i) encoders_.emplace_back(tokenizer);
    batch_.reserve(capacity_ + kPiece);
  }

  void text(std::string_view text) override {
    words_.feed(text);
    bytes_ += text.size();
    while (!text.empty()) {
      const std::size_t take = std::min(text.size(), kPiece - (batch_.size() - begin_));
      batch_ += text.substr(0, take);
      text.remove_prefix(take);
      if (batch_.size() - begin_ == kPiece) {
        const std::size_t cut = tokenizer_.safe_cut(std::string_view(batch_).substr(begin_));
        end_piece(begin_ + cut);
        if (batch_.size() >= capacity_) flush();
      }
    }
  }

  void end_document() override {
    if (document_ == documents_) throw changed();
    end_piece(batch_.size());
    Piece& last = pieces_.back();
    last.ends_document = true;
    last.bytes = std::exchange(bytes_, 0);
    last.words = std::exchange(words_, WordCounter{}).words();
    ++document_;
    if (batch_.size() >= capacity_ || pieces_.size() >= capacity_ / 64) flush();
  }

  void finish() {
    flush();
    if (document_ != documents_) throw changed();
  }

 private:
  struct Piece {
    std::size_t begin = 0;
    std::size_t end = 0;
    bool ends_document = false;
    std::uint64_t bytes = 0;  // of the document
    std::uint64_t words = 0;
  };

  static DataError changed() { return DataError("the input changed while it was read; prepare it again"); }

  void end_piece(std::size_t end) {
    pieces_.push_back({.begin = begin_, .end = end});
    begin_ = end;
  }

  void flush() {
    std::vector<std::vector<std::int32_t>> tokens(pieces_.size());
    std::exception_ptr failure;
    std::mutex mutex;
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast <int>(encoders_.size()))
    for (std::size_t i = 0; i < pieces_.size(); ++i) {
      try {
        const std::string_view piece(batch_.data() + pieces_[i].begin, pieces_[i].end - pieces_[i].begin);
        encoders_[static_cast<std::size_t>(omp_get_thread_num())].encode(piece, tokens[i]);
      } catch (...) {
        const std::lock_guard lock(mutex);
        failure = std::current_exception();
      }
    }
    if (failure) std::rethrow_exception(failure);

    for (std::size_t i = 0; i < pieces_.size(); ++i) {
      const Split split = rule_(written_);
      SplitCount& count = summary_.splits[static_cast<std::size_t>(split)];
      writer_.add(split, tokens[i]);
      count.tokens += tokens[i].size();
      if (!pieces_[i].ends_document) continue;
      writer_.end_document(split, pieces_[i].bytes, pieces_[i].words);
      ++count.documents;
      count.bytes += pieces_[i].bytes;
      count.words += pieces_[i].words;
      ++written_;
    }
    pieces_.clear();
    batch_.erase(0, begin_);
    begin_ = 0;
  }

  const Tokenizer& tokenizer_;
  const SplitRule& rule_;
  std::uint64_t documents_;
  TokenDatasetWriter& writer_;
  PrepareSummary& summary_;
  std::size_t capacity_;
  std::vector<Encoder> encoders_;

  std::string batch_;
  std::vector<Piece> pieces_;
  std::size_t begin_ = 0;       // of the piece under way
  std::uint64_t document_ = 0;  // being read
  std::uint64_t written_ = 0;
  std::uint64_t bytes_ = 0;
  WordCounter words_;
};

void check(const PrepareOptions& options) {
  const auto fraction = [](double value) { return value >= 0 && value < 1; };
  if (!fraction(options.validation_fraction) || !fraction(options.test_fraction) ||
      options.validation_fraction + options.test_fraction >= 1) {
    throw UsageError("validation fraction {} and test fraction {} leave nothing to train on; their sum must be under 1",
                     options.validation_fraction, options.test_fraction);
  }
  if (options.corpus.files.empty()) throw UsageError("no input files are given");
  if (options.tokenizer == "bpe" && options.tokenizer_bytes < 1) {
    throw UsageError("a tokenizer cannot be trained on {} bytes", options.tokenizer_bytes);
  }
  std::error_code ignored;
  if (std::filesystem::exists(options.output, ignored)) {
    if (options.existing == ExistingFile::refuse) {
      throw UsageError("{} exists already; --force replaces it", options.output);
    }
    for (const std::string& file : options.corpus.files) {
      if (std::filesystem::equivalent(file, options.output, ignored)) {
        throw UsageError("{} is both input and output", file);
      }
    }
  }
  const std::string folder = folder_of(options.output);
  if (!std::filesystem::is_directory(folder, ignored)) {
    throw UsageError("cannot write {}: there is no folder {}", options.output, folder);
  }
}
}  // namespace

PrepareSummary prepare(const PrepareOptions& options) {
  check(options);
  const bool train = options.tokenizer == "bpe";
  Tokenizer tokenizer = Tokenizer::bytes();
  if (options.tokenizer.ends_with(".h5")) {
    tokenizer = stored_tokenizer(options.tokenizer);
  } else if (!train && options.tokenizer != "bytes") {
    tokenizer = Tokenizer::from_model_file(options.tokenizer);
  }

  log::info("reading {}{}", options.corpus.files.front(),
            options.corpus.files.size() > 1 ? fmt::format(" and {} more", options.corpus.files.size() - 1) : "");
  LineSample sample(options.seed, train ? options.tokenizer_bytes : 0,
                    options.validation_fraction + options.test_fraction);
  const CorpusCount count = read_documents(options.corpus, sample);
  if (count.documents == 0) throw DataError("the corpus is empty: {} holds no text", options.corpus.files.front());
  if (count.documents < 3) {
    throw DataError(
        "the corpus holds {} document{}, at least 3 are needed for train, validation and test; give more files "
        "or split them with --document-start",
        count.documents, count.documents == 1 ? "" : "s");
  }
  const SplitRule rule(options, count.documents);
  if (train) {
    const std::string text = sample.take(rule);
    log::info("training a tokenizer of {} pieces on {} bytes", options.vocab, text.size());
    tokenizer = Tokenizer::train_bpe(std::span(&text, 1), options.vocab);
  }

  log::info("encoding {} documents", count.documents);
  PrepareSummary summary;
  summary.empty_documents = count.empty;
  summary.kind = tokenizer.kind();
  summary.vocab = tokenizer.vocab_size();
  std::string source;
  for (const std::string& file : options.corpus.files) {
    // The attribute names the corpus for people; of a thousand files the first few do.
    if (source.size() > 1000) {
      source += fmt::format(" ... ({} files)", options.corpus.files.size());
      break;
    }
    if (!source.empty()) source += ' ';
    source += std::filesystem::path(file).filename().string();
  }
  TokenDatasetWriter writer(options.output, tokenizer, source);
  const int threads = options.threads > 0 ? options.threads : omp_get_max_threads();
  Encoding encoding(tokenizer, rule, count.documents, threads, writer, summary);
  read_documents(options.corpus, encoding);
  encoding.finish();
  summary.fingerprint = writer.commit();
  return summary;
}

}  // namespace tforge
