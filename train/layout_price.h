#pragma once
// What it costs that no result depends on the layout of the ranks (run.deterministic = "layout_independent").
#include <cstdint>
#include <string>

#include "train/communication_model.h"
#include "train/config.h"

namespace tforge {

/// Of one rank, by formula, beside run.deterministic = "same_layout" on the same ranks.
struct LayoutPrice {
  std::int64_t virtual_dp = 0, virtual_tp = 0;  // shards held here
  std::int64_t memory = 0;                      // bytes more: gradients kept apart, and partial results
  double sent = 0, sent_same_layout = 0;        // bytes that it puts on the wire in a step, by rings
};
LayoutPrice layout_price(const RunConfig& config, const MeshPlace& place);

/// The price of rank 0 as one line.
std::string layout_price_text(const RunConfig& config, int dp, int tp);

}  // namespace tforge
