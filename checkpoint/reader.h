#pragma once
// Reading a checkpoint: nothing is handed out that was not compared with its digest.
//
// open() checks the manifest and every 4 MiB of the file before HDF5 sees it, then the format version, names, step and
// uuid, and the digests of all attributes, configuration and tokenizer. Rows are compared with their digests again when
// they are read. Any mesh reads what any mesh wrote.
//
// Throws CheckpointError (exit code 4: file, byte range or tensor and rows, reason) for damage, also for a manifest
// whose file is missing; DataError for a checkpoint that is not there, cannot be opened (it may be whole) or was
// written in a newer format.
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "parallel/communicator.h"
#include "storage/atomic_file.h"

namespace tforge {

class CheckpointReader {
 public:
  /// How much is compared when the file is opened.
  enum class Verify : std::uint8_t {
    everything,      // manifest and all bytes
    rows_when_read,  // no manifest needed: attributes now, rows when read; for salvage and inspection
  };

  /// What may be damaged in a checkpoint that is opened all the same.
  enum class Salvage : std::uint8_t {
    nothing,
    moments,  // rows below "optim/"
  };

  struct Tensor {
    std::string path;
    DType dtype = DType::f32;
    Shape shape;
    Attributes attributes;
    std::uint64_t content_digest = 0;  // equal for equal content, whatever ranks wrote it
    std::uint64_t offset = 0;          // in the file, of the first row and of the row digests
    std::uint64_t digests_offset = 0;
  };

  /// One process reads and checks all of the file.
  static CheckpointReader open(const std::string& path, Verify verify = Verify::everything);
  /// The ranks share the checking; all of them throw when one finds damage beyond what `salvage` allows. Nothing but
  /// rows may be damaged: what HDF5 reads has a digest of its own in the manifest, and without one (an older version
  /// wrote none) any damage is too much. Collective.
  static CheckpointReader open(Communicator& world, const std::string& path, Salvage salvage = Salvage::nothing);

  const CheckpointInfo& info() const { return info_; }
  const std::string& path() const { return file_.path(); }
  const std::string& config() const { return config_; }
  const StoredTokenizer& tokenizer() const { return tokenizer_; }
  /// With "step".
  const Attributes& state() const { return state_; }
  const std::vector<GrowthRecord>& growth_history() const { return history_; }
  /// In the order of saving.
  const std::vector<Tensor>& tensors() const { return tensors_; }
  /// Null when there is none of this path.
  const Tensor* find(const std::string& path) const;
  /// Throws CheckpointError when there is none of this path.
  const Tensor& tensor(const std::string& path) const;

  /// Paths of the tensors with damaged rows, where salvage allowed them; in byte order.
  const std::vector<std::string>& damaged() const { return damaged_; }

  /// Rows [first_row, first_row + rows) into `to`, contiguous, as `dtype`: the stored one, or f32 <-> f64 (rounded to
  /// nearest). Throws ShapeError for rows outside the tensor, DTypeError for another conversion. Any thread.
  void read_rows(const std::string& path, std::int64_t first_row, std::int64_t rows, DType dtype, void* to) const;
  /// Compares all rows and the content digest of a tensor with what is stored, without keeping them.
  void verify(const Tensor& tensor) const;
  /// Compares the rows of all tensors but the damaged() ones with the digests that were taken from memory before they
  /// were written: the ranks share the work, and all of them throw. Collective.
  void verify_rows(Communicator& world) const;

 private:
  explicit CheckpointReader(PlainFile file) : file_(std::move(file)) {}
  void load(const std::string& path);
  /// Reads rows of the stored type in pieces and hands each, once compared, to `use(first row, rows, bytes)`.
  template <class Use>
  void stream_rows(const Tensor& tensor, std::uint64_t first, std::uint64_t rows, Use&& use) const;

  PlainFile file_;
  CheckpointInfo info_;
  std::string config_;
  StoredTokenizer tokenizer_;
  Attributes state_;
  std::vector<GrowthRecord> history_;
  std::vector<Tensor> tensors_;
  std::vector<std::string> damaged_;
};

/// state[name] as T. Throws CheckpointError naming what is missing or of another type.
template <class T>
T state_value(const Attributes& state, const std::string& name) {
  const auto found = state.find(name);
  if (found == state.end()) throw CheckpointError("the checkpoint's state has no '{}'", name);
  const T* value = std::get_if<T>(&found->second);
  if (value == nullptr) throw CheckpointError("the checkpoint's state '{}' is of another type than expected", name);
  return *value;
}

}  // namespace tforge
