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
  std::string digest;  // XXH3-128 of the rest of the manifest

  static std::uint64_t blocks_of(std::uint64_t bytes) { return (bytes + kBlockBytes - 1) / kBlockBytes; }
};

/// PATH + ".manifest"
std::string manifest_path(const std::string& checkpoint);

/// Fills `manifest.digest` and returns the JSON text.
std::string manifest_text(Manifest& manifest);

/// The manifest of `checkpoint`. Throws DataError when the checkpoint is not there or the manifest is of a newer
/// format, CheckpointError when the manifest is missing, damaged or that of a file of another name.
Manifest read_manifest(const std::string& checkpoint);

/// The range of blocks that rank `part` of `parts` looks after.
struct BlockRange {
  std::uint64_t first = 0;
  std::uint64_t last = 0;  // exclusive
};
BlockRange block_share(std::uint64_t blocks, int part, int parts);

/// XXH3-64 of each block in `range` of a file of `bytes` bytes.
std::vector<std::uint64_t> digest_blocks(const PlainFile& file, std::uint64_t bytes, BlockRange range);

/// Compares the file with its manifest, blocks of `range` only. Throws CheckpointError naming file, byte range, and
/// the tensor and rows where there are some.
void verify_blocks(const PlainFile& file, const Manifest& manifest, BlockRange range);

}  // namespace tforge
