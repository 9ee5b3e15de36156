#include "train/plan.h"

#include <algorithm>

#include "kernels/gemm.h"
#include "model/accounting.h"
#include "model/activation_memory.h"
#include "model/models.h"
#include "train/communication_model.h"
#include "train/layout_price.h"
#include "train/start.h"
#include "train/threads.h"

namespace tforge {

namespace {

std::string memory_text(const RunConfig& config, const ShardPlan& plan, const Mesh& mesh) {
  std::string text =
      "memory per rank, MiB (tp rank: weights + gradients + moments + activations and workspace of a micro-batch + "
      "copy for saving)\n";
  const auto mib = [](double bytes) { return bytes / (1 << 20); };
  const double size = static_cast<double>(size_of(config.train.dtype));
  const std::int64_t micro = micro_batch(config, deal_sequences(config, mesh.dp).count(0));
  for (int r = 0; r < mesh.tp; ++r) {
    const std::vector<ParameterSpec> specs = parameter_specs(config.model, plan);
    const FlatLayout layout = flat_layout(specs, r);
    std::int64_t held = 0, replicated = 0;
    for (std::size_t i = 0; i < specs.size(); ++i) {
      held += layout.blocks[i].elements;
      if (specs[i].placement == Placement::replicated) replicated += layout.blocks[i].elements;
    }
    const double weights = static_cast<double>(held) * size;
    const ShardGradientBytes shards = shard_gradient_bytes(config, mesh.dp, 0, static_cast<std::int64_t>(weights));
    const double gradients = weights + static_cast<double>(shards.kept);
    // With ZeRO-1 those of the rank of dp that owns most.
    double moments = 2 * weights;
    // What this rank writes is copied first: rank 0 of dp writes the weights, and what is replicated is tp rank 0's.
    const double shared = r == 0 ? 0 : static_cast<double>(replicated) * size;
    double copied = 3 * (weights - shared);
    if (config.parallel.zero == 1) {
      std::vector<std::int64_t> owned(static_cast<std::size_t>(mesh.dp), 0);
      for (const Bucket& bucket : layout.buckets(config.train.dtype, bucket_bytes(config), mesh.dp)) {
        for (int dp = 0; dp < mesh.dp; ++dp) owned[static_cast<std::size_t>(dp)] += bucket.elements(dp);
      }
      moments = 2 * static_cast<double>(std::ranges::max(owned)) * size;
      copied = std::max(weights - shared + 2 * static_cast<double>(owned[0]) * size, moments);
    }
    if (config.run.save == SaveMode::blocking || config.run.save_every == 0) copied = 0;
    double activations = static_cast<double>(
        activation_bytes(config.model, plan, r, config.train.dtype, config.train.saves, micro, config.seq()));
    if (separate_lookup(config, mesh.dp, plan.vocab.count(r))) {
      activations +=
          static_cast<double>(LookupSync::bytes(lookup_rows(config, mesh.dp), config.model.dim, config.train.dtype));
    }
    activations = std::max(activations, static_cast<double>(shards.pieces));
    text += fmt::format("  {}: {:.1f} + {:.1f} + {:.1f} + {:.1f} + {:.1f} = {:.1f}\n", r, mib(weights), mib(gradients),
                        mib(moments), mib(activations), mib(copied),
                        mib(weights + gradients + moments + activations + copied));
  }
  return text;
}

}  // namespace

std::string plan_text(Communicator& world, const RunRequest& request) {
  // The kernels' workspace depends on the threads.
  kernels::start_cpu_runtime(threads_per_rank(world, request.asked.config.run.threads));
  const TokenDataset dataset(request.asked.config.data.path);
  const Start start = prepare_start(world, request, dataset);
  const RunConfig& config = start.config;
  const Mesh mesh = Mesh::create(world, static_cast<int>(config.parallel.dp), static_cast<int>(config.parallel.tp));
  const ShardPlan plan = plan_shards(config, mesh.tp, start.reader ? &*start.reader : nullptr);
  std::string text = to_toml(config);
  text += fmt::format("\nparameters         {}\n", config.model.parameters());
  text += fmt::format("without the ends   {} (embedding and head)\n",
                      sum_of(model_parts(config.model, config.seq()), Ends::left_out).parameters);
  text += fmt::format("ranks              dp {} x tp {}\n", mesh.dp, mesh.tp);
  text += fmt::format("split over tp      model.heads = {}, model.vocab = {}", config.model.heads, config.model.vocab);
  for (const ShardAxis& axis : kind_of(config.model).axes(config.model)) {
    text += fmt::format(", {} = {}", axis.key, axis.extent);
  }
  text += "\n";
  text += fmt::format("tokens per step    {}\n", config.train.batch * config.seq());
  text +=
      fmt::format("FLOPs per token    {:.0f} forward, {:.0f} training\n",
                  config.model.forward_flops_per_token(config.seq()), config.model.train_flops_per_token(config.seq()));
  text += fmt::format("FLOPs per step     {:.4g}\n", config.model.train_flops_per_token(config.seq()) *
                                                         static_cast<double>(config.train.batch * config.seq()));
  const std::vector<Bucket> buckets =
      flat_layout(parameter_specs(config.model, plan), 0).buckets(config.train.dtype, bucket_bytes(config), mesh.dp);
  text += "communication of a step, what rank 0 hands over\n";
  text += communication_text(step_exchanges(config, plan, buckets, {.dp = mesh.dp, .tp = mesh.tp}));
  if (config.run.deterministic == Determinism::layout_independent) {
    text += layout_price_text(config, mesh.dp, mesh.tp) + "\n";
  }
  return text + memory_text(config, plan, mesh);
}

}  // namespace tforge
