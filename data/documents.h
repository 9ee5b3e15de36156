#pragma once
// Reads a corpus document by document, as a stream: no document is ever whole in memory unless it is a JSON string.
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace tforge {

enum class CorpusFormat : std::uint8_t { text, jsonl };

/// text: each file is one document; or, with `document_start`, a document also begins at every line that matches it.
/// jsonl: each line is a JSON object, and its member `field`, a string, is one document.
struct Corpus {
  std::vector<std::string> files = {};
  CorpusFormat format = CorpusFormat::text;
  /// POSIX extended regular expression (as grep -E), searched in the first 4096 bytes of a line without its line end.
  /// What precedes the first match is a document too; a document of white space alone joins the next one.
  std::string document_start = {};
  std::string field = "text";
};

/// Takes the documents in order, each as pieces of text that may end anywhere (also inside a character).
class DocumentHandler {
 public:
  virtual ~DocumentHandler() = default;
  virtual void text(std::string_view piece) = 0;
  virtual void end_document() = 0;
};

struct CorpusCount {
  std::uint64_t documents = 0;
  std::uint64_t empty = 0;  // files or strings of no bytes; they are passed over
};

/// Every byte of a text file reaches the handler, in order. Files are read twice by a preparation, hence regular files.
/// Throws DataError: a file that cannot be read, is not a regular file or is not UTF-8 (byte offset), a malformed
/// regular expression, a line that is not a JSON object or has no string `field` (line).
CorpusCount read_documents(const Corpus& corpus, DocumentHandler& handler);

}  // namespace tforge
