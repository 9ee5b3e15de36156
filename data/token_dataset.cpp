#include "data/token_dataset.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <utility>
#include <vector>

#include "core/errors.h"
#include "storage/atomic_file.h"
#include "storage/digest.h"
#include "storage/hdf5_file.h"

namespace tforge {
namespace {
constexpr const char* kFormat = "tokenforge-tokens";
constexpr std::int64_t kFormatVersion = 1;
constexpr std::size_t kBlock = 1 << 20;

StoredType token_type(std::int64_t vocab) {
  return vocab <= 0x100 ? StoredType::u8 : vocab <= 0x10000 ? StoredType::u16 : StoredType::u32;
}

/// Calls `f(T{})` with the type that tokens are stored as.
template <class F>
void with_token_type(std::size_t size, F&& f) {
  if (size == 1) return f(std::uint8_t{});
  if (size == 2) return f(std::uint16_t{});
  f(std::uint32_t{});
}

/// Datasets under 4 KiB may lie at any byte of the file, so that nothing is read through a typed pointer.
template <class T>
T load(const std::byte* base, std::uint64_t index) {
  T value;
  std::memcpy(&value, base + index * sizeof(T), sizeof value);
  return value;
}

std::shared_ptr<const void> map_file(const std::string& path, std::uint64_t size) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat status {};
  if (fd < 0 || ::fstat(fd, &status) != 0) {
    const int error = errno;
    if (fd >= 0) ::close(fd);
    throw DataError("cannot read {}: {}", path, std::strerror(error));
  }
  const bool changed = static_cast<std::uint64_t>(status.st_size) != size;
  void* address = changed ? MAP_FAILED : ::mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0);
  const int error = errno;
  ::close(fd);
  if (changed) throw DataError("{} changed while it was opened", path);
  if (address == MAP_FAILED) throw ResourceError("{} cannot be mapped into memory: {}", path, std::strerror(error));
  return {address, [size](const void* mapped) { ::munmap(const_cast<void*>(mapped), size); }};
}

/// Where the fingerprint of a dataset begins.
Digest fingerprint_of(const Tokenizer& tokenizer) {
  Digest digest;
  digest.add(kFormat);
  digest.add(tokenizer.fingerprint());
  return digest;
}

bool is_token_dataset(const Hdf5File& file) {
  return file.has_attribute("/", "format") && file.attribute<std::string>("/", "format") == kFormat;
}

/// The tokenizer whose model is the dataset `model`.
Tokenizer tokenizer_at(const Hdf5File& file, const std::string& model) {
  const auto kind = tokenizer_kind_from_name(file.attribute<std::string>("/tokenizer", "kind"));
  Tokenizer tokenizer = Tokenizer::from_serialized(kind, file.read_bytes(model), file.file_path() + ": /tokenizer");
  const auto expected = file.attribute<std::string>("/tokenizer", "fingerprint");
  if (tokenizer.fingerprint() != expected) {
    throw DataError("{} is damaged: its tokenizer has fingerprint {}, the file says {}", file.file_path(),
                    tokenizer.fingerprint(), expected);
  }
  return tokenizer;
}

Tokenizer read_tokenizer(const Hdf5File& file) {
  if (!is_token_dataset(file)) {
    throw DataError("{} is not a token dataset; make one with tf_prepare", file.file_path());
  }
  const auto version = file.attribute<std::int64_t>("/", "format_version");
  if (version > kFormatVersion) {
    throw DataError("{} is a token dataset of format version {}, this program reads up to version {}; use a newer one",
                    file.file_path(), version, kFormatVersion);
  }
  Tokenizer tokenizer = tokenizer_at(file, "/tokenizer/model");
  const auto vocab = file.attribute<std::int64_t>("/", "vocab");
  if (tokenizer.vocab_size() != vocab) {
    throw DataError("{} is damaged: its tokenizer has {} pieces, the file says {}", file.file_path(),
                    tokenizer.vocab_size(), vocab);
  }
  return tokenizer;
}
}  // namespace

Tokenizer stored_tokenizer(const std::string& path) {
  const Hdf5File file = Hdf5File::open(path);
  if (is_token_dataset(file)) return read_tokenizer(file);
  if (!file.exists("/tokenizer") || !file.has_attribute("/tokenizer", "fingerprint")) {
    throw DataError("{} holds no tokenizer; name a token dataset or a checkpoint", path);
  }
  return tokenizer_at(file, "/tokenizer");
}

std::string_view name_of(Split split) {
  switch (split) {
    case Split::train: return "train";
    case Split::validation: return "validation";
    case Split::test: return "test";
  }
  return "?";
}

// ---- reading

DocumentInfo TokenSplit::document(std::uint64_t index) const {
  if (index >= documents_) throw InternalError("{}: document {} of {}", name_, index, documents_);
  const auto first = load<std::uint64_t>(offsets_, index);
  return {first, load<std::uint64_t>(offsets_, index + 1) - first, load<std::uint64_t>(bytes_, index),
          load<std::uint64_t>(words_, index)};
}

void TokenSplit::copy(std::uint64_t first, std::uint64_t count, std::int32_t* out) const {
  if (first > tokens_ || count > tokens_ - first) {
    throw InternalError("{}: tokens {} to {} of {}", name_, first, first + count, tokens_);
  }
  std::uint32_t largest = 0;
  with_token_type(token_size_, [&]<class T>(T) {
    const std::byte* from = token_bytes_ + first * sizeof(T);
    for (std::uint64_t i = 0; i < count; ++i) {
      const std::uint32_t token = load<T>(from, i);
      largest = std::max(largest, token);
      out[i] = static_cast<std::int32_t>(token);
    }
  });
  if (largest >= vocab_ && count > 0) {
    throw DataError("{} is damaged: token {} is outside the vocabulary of {}", name_, largest, vocab_);
  }
}

TokenDataset::TokenDataset(const std::string& path) : path_(path), tokenizer_(Tokenizer::bytes()) {
  const Hdf5File file = Hdf5File::open(path);
  tokenizer_ = read_tokenizer(file);
  fingerprint_ = file.attribute<std::string>("/", "fingerprint");
  const auto mapping = map_file(path, file.file_bytes());
  const auto* base = static_cast<const std::byte*>(mapping.get());

  const auto locate = [&](const std::string& name, StoredType type) {
    const DatasetInfo info = file.info(name);
    if (info.type != type || info.shape.size() != 1 || (info.bytes > 0 && !info.mappable)) {
      throw DataError("{}: {} is {}, want {} of one dimension, contiguous", path, name, info.text(), name_of(type));
    }
    return std::pair(base + info.offset, info.elements());
  };
  for (const Split which : kSplits) {
    TokenSplit& split = splits_[static_cast<std::size_t>(which)];
    const std::string group = fmt::format("/{}/", name_of(which));
    const StoredType type = token_type(vocab());
    split.mapping_ = mapping;
    split.name_ = fmt::format("{}: {}", path, name_of(which));
    split.token_size_ = size_of(type);
    split.vocab_ = static_cast<std::uint32_t>(vocab());
    std::tie(split.token_bytes_, split.tokens_) = locate(group + "tokens", type);
    std::tie(split.bytes_, split.documents_) = locate(group + "bytes", StoredType::u64);
    const auto [words, words_count] = locate(group + "words", StoredType::u64);
    const auto [offsets, offsets_count] = locate(group + "offsets", StoredType::u64);
    split.words_ = words;
    split.offsets_ = offsets;
    bool sound = words_count == split.documents_ && offsets_count == split.documents_ + 1 &&
                 load<std::uint64_t>(offsets, 0) == 0 &&
                 load<std::uint64_t>(offsets, split.documents_) == split.tokens_;
    for (std::uint64_t i = 0; sound && i < split.documents_; ++i) {
      sound = load<std::uint64_t>(offsets, i) <= load<std::uint64_t>(offsets, i + 1);
    }
    if (!sound)
      throw DataError("{} is damaged: its document offsets do not fit its {} tokens", split.name_, split.tokens_);
  }
}

void TokenDataset::verify() const {
  Digest digest = fingerprint_of(tokenizer_);
  for (const TokenSplit& split : splits_) {
    digest.add(split.token_bytes_, split.tokens_ * split.token_size_);
    digest.add(split.offsets_, (split.documents_ + 1) * sizeof(std::uint64_t));
    digest.add(split.bytes_, split.documents_ * sizeof(std::uint64_t));
    digest.add(split.words_, split.documents_ * sizeof(std::uint64_t));
  }
  if (digest.text() != fingerprint_) {
    throw DataError("{} is damaged: its content has fingerprint {}, the file says {}; make it again with tf_prepare",
                    path_, digest.text(), fingerprint_);
  }
}

// ---- writing

namespace {
/// A file without a name that is written once from front to back and then read.
class Spool {
 public:
  explicit Spool(const std::string& beside) : file_(beside) {
    ::unlink(file_.temporary().c_str());  // the space is given back however the process ends
    buffer_.reserve(kBlock);
  }
  template <class T>
  void write(const T& value) {
    const auto* bytes = reinterpret_cast<const std::byte*>(&value);
    buffer_.insert(buffer_.end(), bytes, bytes + sizeof value);
    if (buffer_.size() + sizeof(T) > kBlock) flush();
  }
  void flush() {
    file_.file().write_at(size_, buffer_.data(), buffer_.size());
    size_ += buffer_.size();
    buffer_.clear();
  }
  std::uint64_t size() const { return size_; }
  /// Calls `f(first index, values)` block by block for all values, which must be what was written.
  template <class T, class F>
  void read(F&& f) const {
    std::vector<T> block(kBlock / sizeof(T));
    const std::uint64_t count = size_ / sizeof(T);
    for (std::uint64_t first = 0; first < count; first += block.size()) {
      const auto part = std::min<std::uint64_t>(block.size(), count - first);
      file_.file().read_at(first * sizeof(T), block.data(), part * sizeof(T));
      f(first, std::span<const T>(block.data(), part));
    }
  }

 private:
  AtomicFile file_;
  std::vector<std::byte> buffer_;
  std::uint64_t size_ = 0;
};

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  std::tm calendar{};
  ::gmtime_r(&now, &calendar);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &calendar);
  return text;
}
}  // namespace

class TokenDatasetWriter::Impl {
 public:
  Impl(std::string path, const Tokenizer& tokenizer, std::string source)
      : path_(std::move(path)),
        tokenizer_(tokenizer),
        source_(std::move(source)),
        type_(token_type(tokenizer.vocab_size())),
        parts_{Part(path_), Part(path_), Part(path_)} {
    remove_temporaries_of(path_);
  }

  void add(Split split, std::span<const std::int32_t> tokens) {
    Part& part = parts_[static_cast<std::size_t>(split)];
    with_token_type(size_of(type_), [&]<class T>(T) {
      for (const std::int32_t token : tokens) part.tokens.write(static_cast<T>(token));
    });
    part.document_tokens += tokens.size();
  }

  void end_document(Split split, std::uint64_t bytes, std::uint64_t words) {
    Part& part = parts_[static_cast<std::size_t>(split)];
    part.documents.write(DocumentInfo{part.first_token, part.document_tokens, bytes, words});
    part.first_token += std::exchange(part.document_tokens, 0);
  }

  std::string commit() {
    AtomicFile target(path_);
    Hdf5File file = Hdf5File::create(target.temporary());
    file.set_attribute("/", "format", std::string(kFormat));
    file.set_attribute("/", "format_version", kFormatVersion);
    file.set_attribute("/", "vocab", std::int64_t{tokenizer_.vocab_size()});
    file.set_attribute("/", "created", utc_now());
    file.set_attribute("/", "source", source_);
    file.write_bytes("/tokenizer/model", tokenizer_.serialized());
    file.set_attribute("/tokenizer", "kind", std::string(name_of(tokenizer_.kind())));
    file.set_attribute("/tokenizer", "fingerprint", tokenizer_.fingerprint());
    Digest digest = fingerprint_of(tokenizer_);
    for (const Split split : kSplits) write_split(file, split, digest);
    const std::string fingerprint = digest.text();
    file.set_attribute("/", "fingerprint", fingerprint);
    file.close();
    target.commit();
    return fingerprint;
  }

  /// Runs `f`, and names the target when the disk is full: the temporary files are gone by then.
  template <class F>
  auto guard(F&& f) {
    try {
      return f();
    } catch (const ResourceError&) {
      throw ResourceError("{}: the disk is full; free space or write elsewhere", path_);
    }
  }

 private:
  struct Part {
    explicit Part(const std::string& path) : tokens(path), documents(path) {}
    Spool tokens;
    Spool documents;
    std::uint64_t first_token = 0;
    std::uint64_t document_tokens = 0;
  };

  void write_split(Hdf5File& file, Split split, Digest& digest) {
    Part& part = parts_[static_cast<std::size_t>(split)];
    if (part.document_tokens > 0)
      throw InternalError("{}: the last document of {} was not ended", path_, name_of(split));
    part.tokens.flush();
    part.documents.flush();
    const std::string group = fmt::format("/{}/", name_of(split));
    const std::uint64_t documents = part.documents.size() / sizeof(DocumentInfo);

    create(file, group + "tokens", type_, part.tokens.size() / size_of(type_));
    with_token_type(size_of(type_), [&]<class T>(T) {
      part.tokens.read<T>([&](std::uint64_t first, std::span<const T> tokens) {
        file.write_rows(group + "tokens", first, tokens);
        digest.add(tokens.data(), tokens.size_bytes());
      });
    });
    const auto column = [&](const std::string& name, std::uint64_t rows, std::uint64_t DocumentInfo::*member) {
      std::vector<std::uint64_t> values;
      part.documents.read<DocumentInfo>([&](std::uint64_t first, std::span<const DocumentInfo> block) {
        values.clear();
        for (const DocumentInfo& document : block) values.push_back(document.*member);
        if (first + block.size() == documents && rows > documents) values.push_back(part.first_token);
        file.write_rows(name, first, std::span<const std::uint64_t>(values));
        digest.add(values.data(), values.size() * sizeof(std::uint64_t));
      });
    };
    create(file, group + "offsets", StoredType::u64, documents + 1);
    column(group + "offsets", documents + 1, &DocumentInfo::first_token);
    create(file, group + "bytes", StoredType::u64, documents);
    column(group + "bytes", documents, &DocumentInfo::bytes);
    create(file, group + "words", StoredType::u64, documents);
    column(group + "words", documents, &DocumentInfo::words);
  }

  static void create(Hdf5File& file, const std::string& name, StoredType type, std::uint64_t count) {
    const std::uint64_t shape[] = {count};
    file.create_dataset(name, type, shape);
  }

  std::string path_;
  Tokenizer tokenizer_;
  std::string source_;
  StoredType type_;
  std::array<Part, kSplits.size()> parts_;
};

TokenDatasetWriter::TokenDatasetWriter(std::string path, const Tokenizer& tokenizer, std::string source)
    : impl_(std::make_unique<Impl>(std::move(path), tokenizer, std::move(source))) {}
TokenDatasetWriter::~TokenDatasetWriter() = default;

void TokenDatasetWriter::add(Split split, std::span<const std::int32_t> tokens) {
  impl_->guard([&] { impl_->add(split, tokens); });
}
void TokenDatasetWriter::end_document(Split split, std::uint64_t bytes, std::uint64_t words) {
  impl_->guard([&] { impl_->end_document(split, bytes, words); });
}
std::string TokenDatasetWriter::commit() {
  return impl_->guard([&] { return impl_->commit(); });
}

}  // namespace tforge
