#pragma once
// Names and digests of the file format, shared by writer and reader. Private to checkpoint/.
#include <cstdint>
#include <map>
#include <string>
#include <string_view>

#include "checkpoint/checkpoint.h"

namespace tforge::layout {

inline constexpr const char* kConfig = "/config";
inline constexpr const char* kTokenizer = "/tokenizer";
inline constexpr const char* kState = "/state";
inline constexpr const char* kHistory = "/growth/history";
inline constexpr const char* kRowDigests = "/integrity/rows";
inline constexpr const char* kTensors = "/integrity/tensors";        // paths, one a line
inline constexpr const char* kContent = "/integrity/content";        // u64 a tensor, in that order
inline constexpr const char* kAttributes = "/integrity/attributes";  // "digest path" lines
inline constexpr const char* kBlobs = "/integrity/blobs";            // "digest path" lines

/// XXH3-64 of an attribute set: for each name in byte order the name, a NUL, a letter for the type (i u f s I U F),
/// the number of values or bytes as u64, and the values, all little-endian.
std::uint64_t digest_of(const Attributes& attributes);

/// What row `row` with digest `digest` adds to the content digest of its tensor, which is the sum over all rows
/// modulo 2^64: the same whatever rank wrote which rows in which order.
std::uint64_t content_term(std::uint64_t digest, std::uint64_t row);

/// "0123456789abcdef /path" lines.
std::string index_text(const std::map<std::string, std::uint64_t>& index);
/// Throws CheckpointError for a line of another form.
std::map<std::string, std::uint64_t> parse_index(std::string_view text);

/// The type that stores `dtype` in the file; bf16 is stored as u16.
StoredType stored_type(DType dtype);
/// Throws CheckpointError for a type that no tensor has.
DType dtype_of_stored(StoredType type);

Attributes to_attributes(const GrowthRecord& record);
/// Throws CheckpointError for a missing or wrongly typed value.
GrowthRecord growth_record(const Attributes& attributes);

}  // namespace tforge::layout
