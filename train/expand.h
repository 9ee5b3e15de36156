#pragma once
// Growing a checkpoint: more parameter tokens in some layer groups, with the change of the output measured on a probe.
#include <array>
#include <cstdint>
#include <string>

#include "model/config.h"
#include "model/growth.h"
#include "parallel/communicator.h"

namespace tforge {

struct ExpandRequest {
  std::string checkpoint;
  std::string output;
  std::array<std::int64_t, 5> tokens{};  // wanted by TokenGroup; 0 keeps a group as it is
  GrowthRule rule = GrowthRule::zero_key;
  std::uint64_t seed = 1;
  double noise = 0;       // on old rows, relative (GrowthPlan::noise)
  double max_change = 0;  // zero-key refuses when the probe changes more; 0: 1e-5 in f32, 1e-12 in f64
  std::int64_t probe_sequences = 4;
};

struct ExpandResult {
  double probe_change = 0;  // max |change of logits| / max |logits| on the probe batch
  double max_change = 0;    // the bound that zero-key had to meet; infinite for the other rules
  std::int64_t parameters_before = 0, parameters_after = 0;
  std::array<std::int64_t, 5> tokens_before{}, tokens_after{};
};

/// Writes the grown checkpoint: old rows as they were (with noise if asked for), new rows by the rule, scales by the
/// rule, moments of old rows kept and of new rows zero, a new age segment, one growth record for each group that grew,
/// and the shard borders of the parent. The same bytes of parameters come out on any number of ranks. The probe is
/// `probe_sequences` sequences of random tokens, the model sharded over all ranks. Collective over `world`.
/// Throws UsageError for shrinking, growing nothing, an impossible rule; and when zero-key changes the probe by more
/// than max_change (naming the layer whose output changed most): then nothing is written.
ExpandResult expand_checkpoint(Communicator& world, const ExpandRequest& request);

}  // namespace tforge
