#pragma once
// run.dir/algorithms.json: the device and the library that a run computes with, and the algorithms that were chosen by
// measurement (run.products = "measured"). Another one of these changes bits, so a later start uses the same.
#include <map>
#include <string>

#include "parallel/communicator.h"
#include "train/config.h"

namespace tforge {

namespace kernels {
class DeviceLibraries;
}

/// Of a run on devices; on the CPU it does nothing. The library of the collectives (NCCL) counts as one of the
/// device's.
class AlgorithmRecord {
 public:
  /// Has `libraries`, which outlive it, use what run.dir keeps. Where it was kept for another device or library, and
  /// where nothing was kept for a run that `goes_on`, a warning says that bits are no longer those of an uninterrupted
  /// run. Throws DataError for a damaged record, ConfigError when algorithms are to be measured on devices of several
  /// kinds. Collective.
  AlgorithmRecord(Communicator& world, const RunConfig& config, kernels::DeviceLibraries& libraries, bool goes_on);

  /// Behind an update: all ranks use what the lowest rank has measured for a product, and keep it in run.dir; nothing
  /// from the second time on. A record that cannot be written is a warning. Collective.
  void settle();

 private:
  void write(const std::map<std::string, std::string>& algorithms) const;

  Communicator& world_;
  kernels::DeviceLibraries& libraries_;
  std::string path_;
  std::string depends_on_;  // of rank 0
  bool measures_ = false;
};

}  // namespace tforge
