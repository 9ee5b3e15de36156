#pragma once
// One rank of a layout without the others: what a step takes of it, by doing the step.
#include <memory>
#include <vector>

#include "core/allocator.h"
#include "core/device_queue.h"
#include "core/profile.h"
#include "model/language_model.h"
#include "parallel/mesh.h"
#include "train/communication_model.h"
#include "train/config.h"
#include "train/gradient_pass.h"
#include "train/optimizer.h"

namespace tforge {

namespace kernels {
class DeviceLibraries;
}

/// The model, gradient pass and optimizer that a Trainer at `place` has, and micro-batches as large as its; the ranks
/// beside it exist in number alone (create_lone()), so that what is computed means nothing. In a rehearsal nothing is
/// computed at all, and memory is counted but not touched: any layout of any size fits anywhere.
class LoneRank {
 public:
  /// `plan` is for place.tp ranks; run.device says where the memory would be; model.vocab is set. With Execution::real
  /// the model is initialised, and the tokens are random. Throws ConfigError for what the layout cannot be.
  LoneRank(const RunConfig& config, const ShardPlan& plan, const MeshPlace& place, Execution execution);
  LoneRank(const LoneRank&) = delete;
  LoneRank& operator=(const LoneRank&) = delete;
  ~LoneRank();

  /// Forward, backward, reduction, norm and update.
  void step();

  Stream& stream() { return stream_; }
  const MemoryReport& memory() const { return allocator_.report(); }
  /// Of what the collectives were handed over dp and over tp.
  Communicator::Traffic traffic(MeshAxis axis) const {
    return (axis == MeshAxis::dp ? mesh_.dp_comm : mesh_.tp_comm)->traffic();
  }

 private:
  RunConfig config_;
  std::unique_ptr<DeviceQueue> queue_;  // where something is computed
  Stream stream_;
  Allocator allocator_;
  std::unique_ptr<kernels::DeviceLibraries> libraries_;
  Mesh mesh_;
  std::unique_ptr<LanguageModel> model_;
  GradientPass gradients_;
  AdamW optimizer_;
  std::vector<std::int32_t> tokens_;
};

/// What a step takes of one rank.
struct Rehearsal {
  MemoryReport memory;                  // of weights, gradients, moments and a step
  std::vector<Profile::Entry> kernels;  // of a step: calls and work, no seconds
  Communicator::Traffic dp, tp;         // of a step: calls and bytes
};
/// The second of two steps; the kernels' workspace is that of the threads (OpenMP) of this process.
Rehearsal rehearse(const RunConfig& config, const ShardPlan& plan, const MeshPlace& place);

}  // namespace tforge
