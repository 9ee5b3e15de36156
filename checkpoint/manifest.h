#pragma once
// The manifest beside a checkpoint: how long the file is and a digest of each 4 MiB of it. It is committed last, so a
// checkpoint without a manifest was never finished, and it is checked before HDF5 opens the file.
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "storage/atomic_file.h"

namespace tforge {

/// Where a tensor and the digests of its rows lie in the file, so that damage can be named without HDF5.
struct ManifestRegion {
  std::string path;
  std::uint64_t offset = 0;
  std::uint64_t rows = 0;
  std::uint64_t row_bytes = 0;
  std::uint64_t digests = 0;  // offset of one u64 a row
};

struct Manifest {
  static constexpr std::uint64_t kBlockBytes = 4U << 20;

  std::string file;  // name of the checkpoint without its folder
  std::string uuid;
  std::int64_t step = 0;
  Retention retention = Retention::rolling;
  std::uint64_t bytes = 0;
  std::vector<std::uint64_t> blocks;  // XXH3-64 of bytes [i * 4 MiB, (i + 1) * 4 MiB)
  std::vector<ManifestRegion> regions;
  std::string rest;    // XXH3-128 of all bytes outside the regions; empty where an older version wrote the manifest
  std::string digest;  // XXH3-128 of the rest of the manifest

  static std::uint64_t blocks_of(std::uint64_t bytes) { return (bytes + kBlockBytes - 1) / kBlockBytes; }
};

/// PATH + ".manifest"
std::string manifest_path(const std::string& checkpoint);

/// Fills `manifest.digest` and returns the JSON text.
std::string manifest_text(Manifest& manifest);

/// The manifest of `checkpoint`. Throws DataError when the checkpoint is not there, either of both cannot be opened or
/// the manifest is of a newer format, CheckpointError when the manifest is missing, damaged or that of a file of
/// another name.
Manifest read_manifest(const std::string& checkpoint);
/// The same for files that have other names: the manifest at `path`, of a checkpoint called `name`.
Manifest read_manifest(const std::string& checkpoint, const std::string& path, const std::string& name);

/// The range of blocks that rank `part` of `parts` looks after.
struct BlockRange {
  std::uint64_t first = 0;
  std::uint64_t last = 0;  // exclusive
};
BlockRange block_share(std::uint64_t blocks, int part, int parts);

/// XXH3-64 of each block in `range` of a file of `bytes` bytes.
std::vector<std::uint64_t> digest_blocks(const PlainFile& file, std::uint64_t bytes, BlockRange range);

/// XXH3-128 of the bytes outside the rows of the tensors and their digests: what HDF5 keeps for itself, attributes,
/// configuration, tokenizer, digests of other kinds.
std::string digest_rest(const PlainFile& file, const Manifest& manifest);

/// Rows first .. last of a tensor that do not match their digests.
struct DamagedRows {
  const ManifestRegion* region = nullptr;
  std::uint64_t first = 0;
  std::uint64_t last = 0;  // inclusive
};
/// A block that does not match its digest.
struct DamagedBlock {
  std::uint64_t begin = 0;  // bytes of the file
  std::uint64_t end = 0;
  std::vector<DamagedRows> rows;  // empty: the damage is outside the tensors' rows, or also there
};
/// Compares the blocks of `range` with the manifest. A file that cannot be read there is a CheckpointError.
std::vector<DamagedBlock> find_damage(const PlainFile& file, const Manifest& manifest, BlockRange range);
/// One line: file, byte range, and the tensor and rows where there are some.
std::string damage_text(const PlainFile& file, const std::vector<DamagedBlock>& damage);

/// Throws CheckpointError with that line when there is damage.
void verify_blocks(const PlainFile& file, const Manifest& manifest, BlockRange range);

}  // namespace tforge
