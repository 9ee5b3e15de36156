#pragma once
// Growing a checkpoint by the rules of its kind of model, with the change of the output measured on a probe.
#include <cstdint>
#include <string>
#include <vector>

#include "model/growth.h"
#include "parallel/communicator.h"
#include "train/config.h"

namespace tforge {

struct ExpandRequest {
  std::string checkpoint;
  std::string output;
  GrowthRequest growth;   // its `model` is the checkpoint
  double max_change = 0;  // an exact growth is refused when the probe changes more; 0: 1e-5 in f32, 1e-12 in f64
  std::int64_t probe_sequences = 4;
};

struct ExpandResult {
  double probe_change = 0;  // max |change of logits| / max |logits| on the probe batch
  double max_change = 0;    // the bound that an exact growth had to meet; infinite for another
  std::int64_t parameters_before = 0, parameters_after = 0;
  std::vector<GrowthGroup> groups;  // all that the kind can grow
};

/// Writes the grown checkpoint: parameters and state as the kind's rule says (ModelKind::growth), moments of old rows
/// kept and of new rows zero, a new age segment, one growth record for each group that grew, and the shard borders of
/// the parent. The same bytes of parameters come out on any number of ranks. The probe is `probe_sequences` sequences
/// of random tokens, the model sharded over all ranks. Collective over `world`.
/// Throws UsageError for shrinking, growing nothing, an impossible rule; and when an exact growth changes the probe by
/// more than max_change (naming the layer whose output changed most): then nothing is written.
ExpandResult expand_checkpoint(Communicator& world, const ExpandRequest& request);

/// What can grow, before and after, and the parameters: a line each.
std::string growth_text(const std::vector<GrowthGroup>& groups, std::int64_t parameters_before,
                        std::int64_t parameters_after);

/// What a growth would make of the model of a configuration, without a checkpoint: growth_text(), then the keys that
/// change, as diff() says them. Throws what expand_checkpoint() throws for a growth that cannot be.
std::string planned_growth_text(const RunConfig& config, const GrowthRequest& request);

}  // namespace tforge
