#include "checkpoint/integrity.h"

#include <charconv>

#include "storage/digest.h"

namespace tforge::layout {
namespace {

void append(std::string& bytes, const void* value, std::size_t size) {
  bytes.append(static_cast<const char*>(value), size);
}

struct Serialise {
  std::string& bytes;
  template <class T>
  void values(char letter, const T* first, std::uint64_t count) const {
    bytes += letter;
    append(bytes, &count, sizeof count);
    append(bytes, first, count * sizeof(T));
  }
  void operator()(std::int64_t v) const { values('i', &v, 1); }
  void operator()(std::uint64_t v) const { values('u', &v, 1); }
  void operator()(double v) const { values('f', &v, 1); }
  void operator()(const std::string& v) const { values('s', v.data(), v.size()); }
  void operator()(const std::vector<std::int64_t>& v) const { values('I', v.data(), v.size()); }
  void operator()(const std::vector<std::uint64_t>& v) const { values('U', v.data(), v.size()); }
  void operator()(const std::vector<double>& v) const { values('F', v.data(), v.size()); }
};

}  // namespace

std::uint64_t digest_of(const Attributes& attributes) {
  std::string bytes;
  for (const auto& [name, value] : attributes) {
    bytes += name;
    bytes += '\0';
    std::visit(Serialise{bytes}, value);
  }
  return digest64(bytes.data(), bytes.size());
}

std::uint64_t content_term(std::uint64_t digest, std::uint64_t row) { return digest64(&digest, sizeof digest, row); }

std::string index_text(const std::map<std::string, std::uint64_t>& index) {
  std::string text;
  for (const auto& [path, digest] : index) text += hex(digest) + " " + path + "\n";
  return text;
}

std::map<std::string, std::uint64_t> parse_index(std::string_view text) {
  constexpr std::size_t kDigits = 16;
  std::map<std::string, std::uint64_t> index;
  while (!text.empty()) {
    const std::size_t end = text.find('\n');
    const std::string_view line = text.substr(0, end);
    std::uint64_t digest = 0;
    const bool well = end != std::string_view::npos && line.size() > kDigits + 1 && line[kDigits] == ' ' &&
                      std::from_chars(line.data(), line.data() + kDigits, digest, 16).ptr == line.data() + kDigits;
    if (!well) throw CheckpointError("a line of the digest index is damaged");
    index.emplace(line.substr(kDigits + 1), digest);
    text.remove_prefix(end + 1);
  }
  return index;
}

StoredType stored_type(DType dtype) {
  switch (dtype) {
    case DType::f32: return StoredType::f32;
    case DType::f64: return StoredType::f64;
    case DType::bf16: return StoredType::u16;
    case DType::i32: return StoredType::i32;
  }
  throw InternalError("DType {} is none", static_cast<int>(dtype));
}

DType dtype_of_stored(StoredType type) {
  switch (type) {
    case StoredType::f32: return DType::f32;
    case StoredType::f64: return DType::f64;
    case StoredType::u16: return DType::bf16;
    case StoredType::i32: return DType::i32;
    default: throw CheckpointError("holds {}, which is no type of a tensor", name_of(type));
  }
}

namespace {

/// The fields of a record under their stored names, in one place for both directions.
template <class Record, class Visit>
void each_field(Record& r, Visit&& visit) {
  visit("stage", r.stage);
  visit("step", r.step);
  visit("tokens", r.tokens);
  visit("layer_group", r.layer_group);
  visit("tokens_before", r.tokens_before);
  visit("tokens_after", r.tokens_after);
  visit("rule", r.rule);
  visit("seed", r.seed);
  visit("scale_before", r.scale_before);
  visit("scale_after", r.scale_after);
  visit("parent_uuid", r.parent_uuid);
  visit("parent_digest", r.parent_digest);
  visit("probe_error", r.probe_error);
  visit("layout", r.layout);
  visit("code_version", r.code_version);
  visit("created", r.created);
}

}  // namespace

Attributes to_attributes(const GrowthRecord& record) {
  Attributes attributes = record.extra;
  each_field(record, [&](const char* name, const auto& value) { attributes[name] = value; });
  return attributes;
}

GrowthRecord growth_record(const Attributes& attributes) {
  GrowthRecord record;
  record.extra = attributes;
  each_field(record, [&]<class T>(const char* name, T& field) {
    const auto found = attributes.find(name);
    const T* value = found == attributes.end() ? nullptr : std::get_if<T>(&found->second);
    if (value == nullptr) throw CheckpointError("a growth record without a proper '{}'", name);
    field = *value;
    record.extra.erase(name);
  });
  return record;
}

}  // namespace tforge::layout
