#include "train/layout_price.h"

#include <fmt/format.h>

#include "model/models.h"
#include "train/gradient_pass.h"
#include "train/lone_rank.h"
#include "train/trainer.h"

namespace tforge {

namespace {

struct Cost {
  std::int64_t memory = 0;
  double sent = 0;
};

Cost cost_of(const RunConfig& config, const MeshPlace& place) {
  const ShardPlan plan = plan_shards(config, place.tp, nullptr);
  const FlatLayout layout = flat_layout(parameter_specs(config.model, plan), place.tp_index);
  const auto buckets = layout.buckets(compute_dtype(config.train.dtype), bucket_bytes(config), place.dp);
  Cost cost;
  const MemoryReport memory = rehearse(config, plan, place).memory;
  // Weights and moments are the same in both modes.
  cost.memory = static_cast<std::int64_t>(memory.total_peak);
  for (const Exchange& exchange : step_exchanges(config, plan, buckets, place)) {
    // At a byte a second and without latency, seconds are bytes.
    cost.sent += ring_seconds(exchange, exchange.axis == MeshAxis::dp ? place.dp : place.tp, {1, 0});
  }
  return cost;
}

}  // namespace

LayoutPrice layout_price(const RunConfig& config, const MeshPlace& place) {
  RunConfig same_layout = config;
  same_layout.run.deterministic = Determinism::same_layout;
  const Cost with = cost_of(config, place), without = cost_of(same_layout, place);
  return {deal_shards(config, place.dp).count(place.dp_index),
          plan_shards(config, place.tp, nullptr).shards->deal.count(place.tp_index), with.memory - without.memory,
          with.sent, without.sent};
}

std::string layout_price_text(const RunConfig& config, int dp, int tp) {
  const LayoutPrice price = layout_price(config, {.dp = dp, .tp = tp});
  return fmt::format(
      "layout independent: {} x {} virtual shards, {} x {} of them on rank 0; it holds {:+.1f} MiB beside the ordinary "
      "mode and sends {:.2f} MB a step instead of {:.2f}",
      config.parallel.virtual_dp, config.parallel.virtual_tp, price.virtual_dp, price.virtual_tp,
      static_cast<double>(price.memory) / (1 << 20), price.sent / 1e6, price.sent_same_layout / 1e6);
}

}  // namespace tforge
