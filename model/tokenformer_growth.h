#pragma once
// Growing a TokenFormer: more parameter tokens, by the rules of model/token_growth.h.
#include <memory>

#include "model/growth.h"

namespace tforge {

/// Groups: query, key, value, proj, ffn. Exact with zero keys and no noise. Throws UsageError.
std::unique_ptr<Growth> tokenformer_growth(const ModelConfig& before, const GrowthRequest& request);

}  // namespace tforge
