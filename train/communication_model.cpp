#include "train/communication_model.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "autograd/ops/head_cross_entropy.h"
#include "model/models.h"
#include "train/gradient_pass.h"

namespace tforge {

namespace {

std::string_view name_of(Collective kind) {
  constexpr std::array<std::string_view, 3> kNames = {"all_reduce", "all_gather", "reduce_scatter"};
  return kNames[static_cast<std::size_t>(kind)];
}

void add_data_parallel(Exchanges& to, const RunConfig& config, const ShardPlan& plan, std::span<const Bucket> buckets,
                       const MeshPlace& place) {
  const auto e = static_cast<std::int64_t>(size_of(compute_dtype(config.train.dtype)));
  std::int64_t elements = 0;
  for (const Bucket& b : buckets) elements += b.elements();
  const auto pieces = static_cast<std::int64_t>(buckets.size());
  if (config.parallel.zero == 1) {
    std::int64_t owned = 0;
    for (const Bucket& b : buckets) owned += b.elements(place.dp_index);
    if (config.parallel.reduction == Reduction::blocking) {
      to.add("gradients", MeshAxis::dp, Collective::reduce_scatter, pieces, elements * e);
    } else {
      to.add("gradients", MeshAxis::dp, Collective::reduce_scatter, pieces * place.dp, elements * e,
             Timing::during_backward);
    }
    to.add("values", MeshAxis::dp, Collective::all_gather, pieces, owned * e);
    to.add("norm", MeshAxis::dp, Collective::all_reduce, 1, 16);
  } else if (config.parallel.reduction == Reduction::blocking) {
    to.add("gradients", MeshAxis::dp, Collective::all_reduce, 1, elements * e);
  } else {
    to.add("gradients", MeshAxis::dp, Collective::all_reduce, pieces, elements * e, Timing::during_backward);
  }
  if (separate_lookup(config, place.dp, plan.vocab.count(place.tp_index))) {
    const std::int64_t rows =
        last_micro_batches(config, place.dp)[static_cast<std::size_t>(place.dp_index)] * config.seq();
    to.add("looked-up rows", MeshAxis::dp, Collective::all_gather, 2,
           LookupSync::bytes(rows, config.model.dim, config.train.dtype));
  }
  to.add("loss", MeshAxis::dp, Collective::all_reduce, 1, 8);
}

void add_data_parallel_by_shard(Exchanges& to, const RunConfig& config, std::span<const Bucket> buckets,
                                const MeshPlace& place) {
  const auto e = static_cast<std::int64_t>(size_of(compute_dtype(config.train.dtype)));
  const std::int64_t here = deal_shards(config, place.dp).count(place.dp_index);
  const std::int64_t piece = std::max<std::int64_t>(bucket_bytes(config) / e, 1);
  std::int64_t elements = 0, owned = 0;
  for (const Bucket& b : buckets) {
    elements += b.elements();
    owned += b.elements(place.dp_index);
  }
  to.add("gradients", MeshAxis::dp, Collective::all_gather, (elements + piece - 1) / piece, here * elements * e);
  if (config.parallel.zero == 1) {
    to.add("values", MeshAxis::dp, Collective::all_gather, static_cast<std::int64_t>(buckets.size()), owned * e);
  }
  to.add("loss", MeshAxis::dp, Collective::all_gather, 1, 8 * here);
}

/// One micro-batch of T rows.
void add_tensor_parallel(Exchanges& to, const RunConfig& config, const ShardPlan& plan, const MeshPlace& place,
                         std::int64_t T) {
  const std::int64_t te = T * static_cast<std::int64_t>(size_of(config.train.dtype)), d = config.model.dim;
  const std::int64_t row_numbers = 3 * T * static_cast<std::int64_t>(size_of(compute_dtype(config.train.dtype)));
  const BlockPass pass{place.tp, place.tp_index, config.train.dtype, config.train.saves, T};
  if (plan.shards) {
    const std::int64_t kte = plan.shards->deal.count(place.tp_index) * te;
    to.add("lookup", MeshAxis::tp, Collective::all_gather, 1, kte * d);
    kind_of(config.model).add_block_exchanges(to, config.model, plan, pass);
    const std::int64_t chunk = head_chunk_rows(config.run.device, T, config.model.vocab);
    to.add("head", MeshAxis::tp, Collective::all_gather, 3 * ((T + chunk - 1) / chunk),
           plan.shards->deal.count(place.tp_index) * (row_numbers + te * d));
    return;
  }
  to.add("lookup", MeshAxis::tp, Collective::all_reduce, 1, te * d);
  kind_of(config.model).add_block_exchanges(to, config.model, plan, pass);
  const std::int64_t chunk = head_chunk_rows(config.run.device, T, plan.vocab.count(place.tp_index));
  to.add("head", MeshAxis::tp, Collective::all_reduce, 2 * ((T + chunk - 1) / chunk) + 1, row_numbers + te * d);
}

}  // namespace

std::vector<Exchange> step_exchanges(const RunConfig& config, const ShardPlan& plan, std::span<const Bucket> buckets,
                                     const MeshPlace& place) {
  Exchanges all;
  const bool by_shard = plan.shards.has_value();
  if (place.dp > 1) {
    if (by_shard) add_data_parallel_by_shard(all, config, buckets, place);
    else add_data_parallel(all, config, plan, buckets, place);
  }
  if (place.tp > 1) {
    for (const MicroRange& micro : micro_batches(config, place.dp, place.dp_index)) {
      add_tensor_parallel(all, config, plan, place, micro.count * config.seq());
    }
    if (by_shard) {
      all.add("norm", MeshAxis::tp, Collective::all_gather, 1, 8 * plan.shards->deal.count(place.tp_index));
    } else {
      all.add("norm", MeshAxis::tp, Collective::all_reduce, 1, 8);
    }
  }
  return all.take();
}

Volume volume_of(std::span<const Exchange> exchanges, MeshAxis axis) {
  Volume volume;
  for (const Exchange& x : exchanges) {
    if (x.axis != axis) continue;
    volume.calls += x.calls;
    volume.bytes += x.bytes;
  }
  return volume;
}

double ring_seconds(const Exchange& exchange, int ranks, const Link& link) {
  const double others = ranks - 1, calls = static_cast<double>(exchange.calls);
  const double wire = static_cast<double>(exchange.bytes) / link.bytes_per_second;
  switch (exchange.kind) {
    case Collective::all_reduce: return 2 * others * (calls * link.latency + wire / ranks);
    case Collective::reduce_scatter: return others * (calls * link.latency + wire / ranks);
    case Collective::all_gather: return others * (calls * link.latency + wire);
  }
  return 0;
}

PredictedStep predict(std::span<const Exchange> exchanges, const MeshPlace& place, const Link& link, double backward) {
  PredictedStep step;
  double hidden = 0, last = 0;
  for (const Exchange& x : exchanges) {
    const double seconds = ring_seconds(x, x.axis == MeshAxis::dp ? place.dp : place.tp, link);
    step.communication += seconds;
    if (x.timing == Timing::in_line) {
      step.exposed += seconds;
    } else {
      hidden += seconds;
      last = std::max(last, seconds / static_cast<double>(x.calls));
    }
  }
  step.exposed += std::max(last, hidden - backward);
  return step;
}

std::string communication_text(std::span<const Exchange> exchanges) {
  if (exchanges.empty()) return "  nothing: there is one rank\n";
  std::string text;
  for (const Exchange& x : exchanges) {
    text += fmt::format("  {} {:<18} {:<14} {:>7} calls {:>16} bytes{}\n", x.axis == MeshAxis::dp ? "dp" : "tp", x.what,
                        name_of(x.kind), x.calls, x.bytes,
                        x.timing == Timing::during_backward ? ", while backward runs" : "");
  }
  return text;
}

}  // namespace tforge
