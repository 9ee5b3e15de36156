#pragma once
// Growing a MemoryFormer: more tables, and more bits of their hashes.
#include <memory>

#include "model/growth.h"

namespace tforge {

/// Groups: attention.tables, ffn_in.tables, ffn_out.tables, attention.bits, ffn_in.bits, ffn_out.bits.
///   tables   new ones are zero and look at other coordinates (memory_coordinates(), with the request's seed where they
///            are the model's first added ones): exact, and their gradient is not zero
///   bits     each row becomes two equal ones with equal moments; by the rule "keep-weight" (the default) the weight
///            looks at the coordinates that it looked at: exact; by "extend-weight" at the new ones too: not exact
/// Throws UsageError, also for noise, which it has no use for.
std::unique_ptr<Growth> memoryformer_growth(const ModelConfig& before, const GrowthRequest& request);

}  // namespace tforge
