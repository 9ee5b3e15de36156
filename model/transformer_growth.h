#pragma once
// Growing a Transformer: wider by copies of its units (Net2WiderNet, Chen et al., arXiv 1511.05641), deeper by blocks
// that begin as the identity (Net2DeeperNet).
//
// Unit i of a grown axis (column of the residual stream, with its heads; neuron) is a copy of old unit i mod n_old.
// What produces units is copied; what consumes them has its weights divided among the k copies of a unit:
//   W'[r, c] = W[r mod R, c mod C] / k(consumed unit)
// The divided weights of a tied head are those of the final LayerNorm. So the function stays the same whenever every
// LayerNorm sees each column equally often: when dim grows by a whole factor (HyperCloning, Samragh et al., arXiv
// 2409.12903, is this case), whatever happens to the neurons. Another factor changes what the LayerNorms see.
// With noise s the copies get unequal shares, (1 + s (z - mean of the copies' z)) / k with normal z: their sum, and the
// function, stay what they were, while their gradients begin to differ. Without noise nothing but the moments that old
// rows keep tells copies apart.
#include <memory>

#include "model/growth.h"

namespace tforge {

/// Groups: dim (by heads of the same size), ffn_dim, layers; what is not named stays. The one rule is "net2net".
/// Moments of old rows are those that the copies' gradients would have given, m / k and v / k^2, k being how often the
/// unit is there now that a weight produces. New blocks stand behind the old ones; the layers that end on the stream
/// are zero, the others as at birth. Throws UsageError.
std::unique_ptr<Growth> transformer_growth(const ModelConfig& before, const GrowthRequest& request);

}  // namespace tforge
