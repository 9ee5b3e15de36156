#include "data/documents.h"

#include <fcntl.h>
#include <regex.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iterator>
#include <nlohmann/json.hpp>
#include <optional>

#include "core/errors.h"
#include "data/text.h"

namespace tforge {
namespace {
constexpr std::size_t kBlock = 1 << 20;
constexpr std::size_t kLineHead = 4096;

/// A regular file read once from front to back through a window of one block.
class FileReader {
 public:
  explicit FileReader(const std::string& path)
      : path_(path), fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
    if (fd_ < 0) throw DataError("cannot read {}: {}", path, std::strerror(errno));
    struct stat status {};
    if (::fstat(fd_, &status) != 0 || !S_ISREG(status.st_mode)) {
      ::close(fd_);
      throw DataError("cannot read {}: it is not a regular file", path);
    }
    buffer_.resize(kBlock);
  }
  ~FileReader() { ::close(fd_); }
  FileReader(const FileReader&) = delete;
  FileReader& operator=(const FileReader&) = delete;

  const std::string& path() const { return path_; }
  std::string_view window() const { return {buffer_.data() + begin_, end_ - begin_}; }
  /// Offset in the file of the window's first byte.
  std::uint64_t offset() const { return offset_; }
  void advance(std::size_t bytes) {
    begin_ += bytes;
    offset_ += bytes;
  }
  /// Adds to the window what fits; false at the end of the file.
  bool refill() {
    std::copy(buffer_.begin() + static_cast<std::ptrdiff_t>(begin_),
              buffer_.begin() + static_cast<std::ptrdiff_t>(end_), buffer_.begin());
    end_ -= begin_;
    begin_ = 0;
    ssize_t got = 0;
    do got = ::read(fd_, buffer_.data() + end_, buffer_.size() - end_);
    while (got < 0 && errno == EINTR);
    if (got < 0) throw DataError("cannot read {}: {}", path_, std::strerror(errno));
    end_ += static_cast<std::size_t>(got);
    return got > 0;
  }
  /// The next byte; nothing at the end of the file.
  std::optional<char> peek() {
    if (begin_ == end_ && !refill()) return std::nullopt;
    return buffer_[begin_];
  }

 private:
  std::string path_;
  int fd_;
  std::vector<char> buffer_;
  std::size_t begin_ = 0;
  std::size_t end_ = 0;
  std::uint64_t offset_ = 0;
};

/// A compiled POSIX extended regular expression. The process stays in the C locale, where characters are bytes.
class Regex {
 public:
  explicit Regex(const std::string& pattern) {
    const int error = ::regcomp(&regex_, pattern.c_str(), REG_EXTENDED | REG_NOSUB);
    if (error != 0) {
      char text[256];
      ::regerror(error, &regex_, text, sizeof text);
      throw DataError("the regular expression '{}' is malformed: {}", pattern, text);
    }
  }
  ~Regex() { ::regfree(&regex_); }
  Regex(const Regex&) = delete;
  Regex& operator=(const Regex&) = delete;

  bool found_in(std::string_view head, bool whole_line) {
    head_ = head;  // sanitizers want a NUL at the end; REG_STARTEND lets one be in the middle
    regmatch_t range{0, static_cast<regoff_t>(head_.size())};
    return ::regexec(&regex_, head_.c_str(), 1, &range, REG_STARTEND | (whole_line ? 0 : REG_NOTEOL)) == 0;
  }

 private:
  std::string head_;
  regex_t regex_{};
};

/// Passes the text of one file on, and knows whether the document under way is empty or white space so far.
class Documents {
 public:
  Documents(const std::string& path, DocumentHandler& handler, CorpusCount& count)
      : path_(path), handler_(handler), count_(count) {}

  void text(std::string_view piece) {
    if (piece.empty()) return;
    if (const auto offset = utf8_.feed(piece)) throw not_utf8(*offset);
    if (blank_) blank_ = piece.find_first_not_of(" \t\n\v\f\r") == std::string_view::npos;
    empty_ = false;
    handler_.text(piece);
  }
  bool blank() const { return blank_; }
  void end() {
    if (empty_) {
      ++count_.empty;
      return;
    }
    handler_.end_document();
    ++count_.documents;
    blank_ = empty_ = true;
  }
  void finish() {
    if (const auto offset = utf8_.finish()) throw not_utf8(*offset);
    end();
  }

 private:
  DataError not_utf8(std::uint64_t offset) const {
    return DataError("{} is not UTF-8: ill-formed character at byte offset {}; convert the file first", path_, offset);
  }
  const std::string& path_;
  DocumentHandler& handler_;
  CorpusCount& count_;
  Utf8Checker utf8_;
  bool blank_ = true;
  bool empty_ = true;
};

void read_text(FileReader& file, Regex* document_start, Documents& documents) {
  if (document_start == nullptr) {
    while (file.refill()) {
      documents.text(file.window());
      file.advance(file.window().size());
    }
    documents.finish();
    return;
  }
  bool more = file.refill();
  bool line_begins = true;
  std::size_t scanned = 0;  // bytes of the window that belong to the document under way and are not passed on yet
  const auto pass_on = [&] {
    documents.text(file.window().substr(0, scanned));
    file.advance(scanned);
    scanned = 0;
  };
  while (true) {
    const std::string_view rest = file.window().substr(scanned);
    const std::size_t newline = rest.find('\n');
    const bool known = newline != std::string_view::npos || rest.size() >= kLineHead || !more;
    if (rest.empty() || (line_begins && !known)) {
      pass_on();
      if (!more) break;
      more = file.refill();
      continue;
    }
    if (line_begins) {
      const bool whole_line = newline < kLineHead || rest.size() < kLineHead;
      std::string_view head = rest.substr(0, std::min(newline, kLineHead));
      if (whole_line && head.ends_with('\r')) head.remove_suffix(1);
      if (document_start->found_in(head, whole_line)) {
        pass_on();
        if (!documents.blank()) documents.end();
      }
    }
    // pass_on() may have moved the window, so `rest` is not used below.
    line_begins = newline != std::string_view::npos;
    scanned = line_begins ? scanned + newline + 1 : file.window().size();
  }
  documents.finish();
}

/// The bytes of a file up to the next newline, as the iterator pair that the JSON parser wants.
class LineIterator {
 public:
  using iterator_category = std::input_iterator_tag;
  using value_type = char;
  using difference_type = std::ptrdiff_t;
  using pointer = const char*;
  using reference = char;
  explicit LineIterator(FileReader* file = nullptr) : file_(file) {}
  char operator*() const { return *file_->peek(); }
  LineIterator& operator++() {
    file_->advance(1);
    return *this;
  }
  /// Compared with the end of the line only.
  bool operator!=(const LineIterator&) const {
    const auto next = file_->peek();
    return next.has_value() && *next != '\n';
  }
  bool operator==(const LineIterator& other) const { return !(*this != other); }

 private:
  FileReader* file_;
};

/// Passes the field of a line's object on and ignores the rest.
class FieldHandler : public nlohmann::json_sax<nlohmann::json> {
 public:
  FieldHandler(const std::string& path, const std::string& field, DocumentHandler& handler)
      : path_(path), field_(field), handler_(handler) {}

  void begin_line(std::uint64_t line, std::uint64_t offset) {
    line_ = line;
    offset_ = offset;
    depth_ = 0;
    wanted_ = found_ = empty_ = false;
  }
  bool found() const { return found_; }
  bool empty() const { return empty_; }

  bool null() override { return other("null"); }
  bool boolean(bool) override { return other("a boolean"); }
  bool number_integer(number_integer_t) override { return other("a number"); }
  bool number_unsigned(number_unsigned_t) override { return other("a number"); }
  bool number_float(number_float_t, const string_t&) override { return other("a number"); }
  bool binary(binary_t&) override { return other("binary"); }
  bool start_array(std::size_t) override { return other("an array") && ++depth_ > 0; }
  bool end_array() override { return --depth_, true; }
  bool start_object(std::size_t) override {
    if (depth_ > 0) return other("an object") && ++depth_ > 0;
    ++depth_;
    return true;
  }
  bool end_object() override { return --depth_, true; }
  bool key(string_t& name) override {
    wanted_ = depth_ == 1 && name == field_;
    return true;
  }
  bool string(string_t& value) override {
    if (!wanted_) return other("a string");
    if (found_) throw DataError("{}: line {} has the field \"{}\" twice", path_, line_, field_);
    wanted_ = false;
    found_ = true;
    empty_ = value.empty();
    if (!empty_) handler_.text(value);
    return true;
  }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::json::exception& error) override {
    std::string text = error.what();  // "[json.exception.parse_error.101] parse error at line 1, column 8: ..."
    const std::size_t colon = text.find(": ");
    if (colon != std::string::npos) text.erase(0, colon + 2);
    text.resize(whole_characters(std::string_view(text).substr(0, 160)));
    throw DataError("{}: line {} is not JSON at byte offset {} of the file: {}", path_, line_,
                    offset_ + (position > 0 ? position - 1 : 0), text);
  }

 private:
  bool other(const char* what) {
    if (depth_ == 0) throw DataError("{}: line {} is {}, want an object", path_, line_, what);
    if (wanted_) throw DataError("{}: line {}: the field \"{}\" is {}, want a string", path_, line_, field_, what);
    return true;
  }
  const std::string& path_;
  const std::string& field_;
  DocumentHandler& handler_;
  std::uint64_t line_ = 0;
  std::uint64_t offset_ = 0;
  int depth_ = 0;
  bool wanted_ = false;
  bool found_ = false;
  bool empty_ = false;
};

void read_jsonl(FileReader& file, const std::string& field, DocumentHandler& handler, CorpusCount& count) {
  FieldHandler fields(file.path(), field, handler);
  for (std::uint64_t line = 1;; ++line) {
    auto next = file.peek();
    while (next == ' ' || next == '\t' || next == '\r') {
      file.advance(1);
      next = file.peek();
    }
    if (!next) return;
    if (next != '\n') {
      fields.begin_line(line, file.offset());
      nlohmann::json::sax_parse(LineIterator(&file), LineIterator(), &fields);
      if (!fields.found()) throw DataError("{}: line {} has no field \"{}\"", file.path(), line, field);
      if (fields.empty()) {
        ++count.empty;
      } else {
        handler.end_document();
        ++count.documents;
      }
    }
    if (file.peek() == '\n') file.advance(1);
  }
}
}  // namespace

CorpusCount read_documents(const Corpus& corpus, DocumentHandler& handler) {
  CorpusCount count;
  std::optional<Regex> document_start;
  if (!corpus.document_start.empty()) document_start.emplace(corpus.document_start);
  for (const std::string& path : corpus.files) {
    FileReader file(path);
    if (corpus.format == CorpusFormat::jsonl) {
      read_jsonl(file, corpus.field, handler, count);
    } else {
      Documents documents(path, handler, count);
      read_text(file, document_start ? &*document_start : nullptr, documents);
    }
  }
  return count;
}

}  // namespace tforge
