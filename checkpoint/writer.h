#pragma once
// Saving a checkpoint: layout, rows, seal, block digests, commit.
//
// Rank 0 lays the file out with HDF5 under a temporary name; every rank then writes its own rows with plain writes at
// known offsets. The two long steps, write_rows() and digest_blocks(), use neither MPI nor HDF5 and may run on another
// thread; the others are collective and short.
//
// Until commit() nothing is visible under the target's name, and a writer destroyed before it removes the temporary.
// Errors are agreed: a collective step throws the same error on every rank (ResourceError for a full disk).
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "checkpoint/manifest.h"
#include "parallel/communicator.h"
#include "storage/atomic_file.h"

namespace tforge {

/// What happens to a whole checkpoint that is already there under the name.
enum class OnExisting : std::uint8_t {
  refuse,   // DataError
  replace,  // its manifest is removed once the new one is on the disk: recover_commits() ends a commit cut short there
};

class CheckpointWriter {
 public:
  /// Lays out the file. Reads no tensor data. Throws InternalError (same text on every rank) when the ranks disagree
  /// about the tensors or their blocks do not cover every row exactly once. Collective.
  CheckpointWriter(Communicator& world, std::string path, const CheckpointContents& contents,
                   OnExisting existing = OnExisting::refuse);

  /// Writes and syncs this rank's rows and their digests, which are taken from memory before the write. The tensors are
  /// those of the constructor; only the blocks' `data` may have moved. Local; any thread.
  void write_rows(std::span<const CheckpointTensor> tensors);
  /// Stores the content digests once all ranks have written. Collective.
  void seal();
  /// Digests this rank's share of the file's blocks, and on rank 0 what is not rows. Local; any thread.
  void digest_blocks();
  /// Renames the file to its name, then the manifest. Returns once both are durable. Collective.
  CheckpointInfo commit();

 private:
  std::string lay_out(const CheckpointContents& contents);
  std::string lay_out_with_hdf5(const CheckpointContents& contents);
  void adopt(const std::string& layout);
  void publish(const std::vector<std::string>& digests);

  Communicator& world_;
  std::string path_;
  OnExisting existing_;
  std::optional<AtomicFile> temporary_;  // rank 0
  PlainFile other_;                      // the other ranks
  CheckpointInfo info_;
  Manifest manifest_;  // digests are filled by digest_blocks() and commit()
  std::uint64_t content_offset_ = 0;
  std::vector<std::uint64_t> content_;    // this rank's part of each tensor's content digest
  std::vector<std::uint64_t> my_blocks_;  // digests of this rank's share

  const PlainFile& file() const { return temporary_ ? temporary_->file() : other_; }
};

/// All steps in a row. Collective; returns when the checkpoint is durable.
CheckpointInfo save_checkpoint(Communicator& world, const std::string& path, const CheckpointContents& contents,
                               OnExisting existing = OnExisting::refuse);

}  // namespace tforge
