#pragma once
// What a checkpoint holds. docs/checkpoint_format.md describes the file for its readers.
//
// The model is not known here: tensors have paths ("model/layers.0.attention.query.keys", "optim/<path>/m"), dtypes,
// full logical shapes and attributes, and each rank names the rows that it owns. A row is a slice along the last axis
// (Shape::rows() of them), so a vector is one row.
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/device.h"
#include "core/dtype.h"
#include "core/shape.h"
#include "storage/hdf5_file.h"

namespace tforge {

/// Readers accept this version and every older one, and refuse a newer one by name.
inline constexpr std::int64_t kCheckpointFormat = 1;

using Attributes = std::map<std::string, AttributeValue>;

/// Whether prune_checkpoints may remove a checkpoint once newer ones exist.
enum class Retention : std::uint8_t { rolling, stage_end };
std::string_view name_of(Retention retention);
std::optional<Retention> retention_from_name(std::string_view name);

/// Rows [first_row, first_row + rows) of a tensor, contiguous in memory. What is written lies in host memory; Staging
/// brings there what does not.
struct RowBlock {
  std::int64_t first_row = 0;
  std::int64_t rows = 0;
  const void* data = nullptr;
  Device device = Device::cpu;
};

/// One tensor as one rank sees it. Path, dtype and shape are the same on every rank; over all ranks the blocks cover
/// each row exactly once (a replicated tensor is written by one rank; the others pass no blocks).
struct CheckpointTensor {
  std::string path;  // below "model/", "optim/" or "hash/"
  DType dtype = DType::f32;
  Shape shape;
  std::vector<RowBlock> blocks;
  Attributes attributes;  // rank 0's are stored: scale, age_segments, shard_borders, ...
};

/// What one growth did to one layer group. Stored as attributes of /growth/history/<index>.
struct GrowthRecord {
  std::int64_t stage = 0;          // the stage that begins with this growth
  std::int64_t step = 0;           // optimiser steps done before it
  std::int64_t tokens = 0;         // training tokens seen before it
  std::string layer_group;         // what grew: "ffn", "dim"
  std::int64_t tokens_before = 0;  // of the group: parameter tokens a layer, columns, neurons, blocks
  std::int64_t tokens_after = 0;
  std::string rule;
  std::uint64_t seed = 0;
  double scale_before = 0;
  double scale_after = 0;
  std::string parent_uuid;
  std::string parent_digest;  // CheckpointInfo::digest of the parent
  double probe_error = 0;     // max|change of logits| / max|logits| on the probe batch
  std::string layout;         // of the ranks that grew it, for example "1x2 append"
  std::string code_version;
  std::string created;  // UTC, "2026-01-31T12:00:00Z"
  Attributes extra;     // anything else, under names of its own
  bool operator==(const GrowthRecord&) const = default;
};

struct StoredTokenizer {
  std::string kind;  // "bytes", "sentencepiece"
  std::string fingerprint;
  std::string bytes;
};

/// Everything a checkpoint holds. Except for the tensors' blocks only rank 0's values count.
struct CheckpointContents {
  std::string model_kind;  // "tokenformer"
  std::string code_version;
  std::string parent_uuid;  // of the checkpoint this run continues or grew from; empty at the start
  std::int64_t step = 0;
  Retention retention = Retention::rolling;
  std::string config;  // resolved TOML
  StoredTokenizer tokenizer;
  Attributes state;  // tokens seen, schedule, sampler position, fingerprints, counters; "step" is added by the writer
  std::vector<GrowthRecord> growth_history;
  std::vector<CheckpointTensor> tensors;
};

/// Identity of a stored checkpoint.
struct CheckpointInfo {
  std::int64_t format = kCheckpointFormat;
  std::string uuid;
  std::string parent_uuid;
  std::string created;
  std::string code_version;
  std::string model_kind;
  std::int64_t step = 0;
  Retention retention = Retention::rolling;
  std::uint64_t file_bytes = 0;
  std::string digest;  // of the manifest, hence of every byte of the file; 32 hexadecimal digits
};

/// Now, in UTC: "2026-01-31T12:00:00Z".
std::string timestamp();
/// A random (version 4) UUID. Throws ResourceError when the system has no random numbers.
std::string random_uuid();

}  // namespace tforge
