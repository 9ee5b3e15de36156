#include "train/plan.h"

#include <algorithm>

#include "kernels/gemm.h"
#include "model/accounting.h"
#include "model/models.h"
#include "train/layout_price.h"
#include "train/lone_rank.h"
#include "train/stage_plan.h"
#include "train/start.h"
#include "train/threads.h"

namespace tforge {

namespace {

double mib(double bytes) { return bytes / (1 << 20); }

/// What decides about the memory of a tp rank.
std::vector<std::int64_t> share_of(const ShardPlan& shards, int rank) {
  std::vector<std::int64_t> share = {shards.vocab.count(rank), shards.heads.count(rank)};
  for (const ShardBorders& units : shards.units) share.push_back(units.count(rank));
  if (shards.shards) share.push_back(shards.shards->deal.count(rank));
  return share;
}

RankMemory memory_of(const RunConfig& config, const MeshSize& mesh, int tp_rank, const FlatLayout& layout,
                     std::int64_t replicated, const MemoryReport& peak) {
  const auto of = [&](Purpose p) { return static_cast<double>(peak.peak[static_cast<std::size_t>(p)]); };
  const auto size = static_cast<double>(size_of(compute_dtype(config.train.dtype)));
  RankMemory memory;
  memory.weights = of(Purpose::weights);
  memory.gradients = of(Purpose::gradients);
  memory.moments = of(Purpose::moments);
  memory.activations = of(Purpose::activations);
  memory.workspace = of(Purpose::workspace);
  memory.communication = of(Purpose::communication);
  memory.step = static_cast<double>(peak.total_peak) - memory.total();
  // What a rank writes is copied first: rank 0 of dp writes the weights, and what is replicated is tp rank 0's. The
  // copies of a device are in the memory of its host.
  double held = 0;
  for (const FlatBlock& block : layout.blocks) held += static_cast<double>(block.elements) * size;
  const double written = held - (tp_rank == 0 ? 0 : static_cast<double>(replicated) * size);
  memory.saving = 3 * written;
  if (config.parallel.zero == 1) {
    std::vector<double> owned(static_cast<std::size_t>(mesh.dp), 0);
    for (const Bucket& bucket : layout.buckets(compute_dtype(config.train.dtype), bucket_bytes(config), mesh.dp)) {
      for (int dp = 0; dp < mesh.dp; ++dp) {
        owned[static_cast<std::size_t>(dp)] += static_cast<double>(bucket.elements(dp)) * size;
      }
    }
    memory.moments += 2 * (std::ranges::max(owned) - owned[0]);
    memory.saving = std::max(written + 2 * owned[0], memory.moments);
  }
  if (config.run.save == SaveMode::blocking || config.run.save_every == 0 || config.run.device != Device::cpu) {
    memory.saving = 0;
  }
  return memory;
}

std::string memory_text(const std::vector<RankMemory>& ranks) {
  std::string text =
      "memory per rank, MiB (tp rank: weights + gradients + moments + activations and workspace of a micro-batch + "
      "copy for saving)\n";
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    const RankMemory& m = ranks[r];
    text += fmt::format("  {}: {:.1f} + {:.1f} + {:.1f} + {:.1f} + {:.1f} = {:.1f}\n", r, mib(m.weights),
                        mib(m.gradients), mib(m.moments), mib(m.step), mib(m.saving), mib(m.total()));
    text += fmt::format("     each at its own peak: activations {:.1f}, workspace {:.1f}, communication {:.1f}\n",
                        mib(m.activations), mib(m.workspace), mib(m.communication));
  }
  return text;
}

/// The configuration's own numbers, what is sent and what is held.
std::string step_text(const RunConfig& config, const StepPlan& plan) {
  std::string text = fmt::format("parameters         {}\n", config.model.parameters());
  text += fmt::format("without the ends   {} (embedding and head)\n",
                      sum_of(model_parts(config.model, config.seq()), Ends::left_out).parameters);
  text += fmt::format("ranks              dp {} x tp {}\n", plan.mesh.dp, plan.mesh.tp);
  text += fmt::format("split over tp      model.heads = {}, model.vocab = {}", config.model.heads, config.model.vocab);
  for (const ShardAxis& axis : kind_of(config.model).axes(config.model)) {
    text += fmt::format(", {} = {}", axis.key, axis.extent);
  }
  text += "\n";
  text += fmt::format("tokens per step    {}\n", plan.tokens);
  text +=
      fmt::format("FLOPs per token    {:.0f} forward, {:.0f} training\n",
                  config.model.forward_flops_per_token(config.seq()), config.model.train_flops_per_token(config.seq()));
  text += fmt::format("FLOPs per step     {:.4g}\n", plan.flops);
  text += "communication of a step, what rank 0 hands over\n";
  text += communication_text(plan.exchanges);
  for (const auto& [axis, name, ranks] :
       {std::tuple{MeshAxis::dp, "dp", plan.mesh.dp}, std::tuple{MeshAxis::tp, "tp", plan.mesh.tp}}) {
    if (ranks == 1) continue;
    const Volume volume = volume_of(plan.exchanges, axis);
    text += fmt::format("  {} {:<33} {:>7} calls {:>16} bytes\n", name, "in all", volume.calls, volume.bytes);
  }
  if (config.run.deterministic == Determinism::layout_independent) {
    text += layout_price_text(config, plan.mesh.dp, plan.mesh.tp) + "\n";
  }
  return text + memory_text(plan.memory);
}

std::string kernels_text(const StepPlan& plan, const DeviceProfile* device) {
  std::vector<Profile::Entry> kernels = plan.kernels;
  if (device != nullptr) {
    for (Profile::Entry& kernel : kernels) kernel.seconds = device->seconds(kernel);
    std::ranges::sort(kernels, std::ranges::greater{}, &Profile::Entry::seconds);
  }
  std::string text = "kernels of a step on rank 0      calls       GFLOP          GB";
  text += device != nullptr ? "          ms\n" : "\n";
  Profile::Entry all{"all", 0, 0, {}};
  const auto line = [&](const Profile::Entry& kernel) {
    text += fmt::format("  {:<28} {:>7} {:>11.3f} {:>11.4f}", kernel.name, kernel.calls, kernel.work.flops / 1e9,
                        kernel.work.bytes / 1e9);
    text += device != nullptr ? fmt::format(" {:>11.3f}\n", kernel.seconds * 1e3) : "\n";
  };
  for (const Profile::Entry& kernel : kernels) {
    line(kernel);
    all.calls += kernel.calls;
    all.seconds += kernel.seconds;
    all.work.flops += kernel.work.flops;
    all.work.bytes += kernel.work.bytes;
  }
  line(all);
  return text;
}

std::string duration_text(double seconds) {
  if (seconds < 120) return fmt::format("{:.4g} s", seconds);
  if (seconds < 7200) return fmt::format("{:.1f} min", seconds / 60);
  if (seconds < 48 * 3600) return fmt::format("{:.1f} h", seconds / 3600);
  return fmt::format("{:.1f} days", seconds / 86400);
}

/// The link that was asked for, or that of the profile.
std::optional<Link> link_of(const PlanRequest& request) {
  return request.link || !request.device ? request.link : request.device->link;
}

std::string time_text(const RunConfig& config, const StepPlan& plan, const PlanRequest& request) {
  const DeviceProfile& device = *request.device;
  const std::optional<Link> link = link_of(request);
  const StepTime time = predict(config, plan, device, link);
  const double seconds = time.total(), rate = plan.flops / seconds / plan.ranks();
  std::string text = fmt::format("predicted for {} ({} {}, {})\n", device.name, device.threads,
                                 device.threads == 1 ? "thread a rank" : "threads a rank", device.date);
  text += fmt::format("  computing          {:.2f} ms a step, {:.2f} ms of it between kernels\n",
                      (time.kernels + time.between) * 1e3, time.between * 1e3);
  if (plan.ranks() > 1) {
    text +=
        fmt::format("  communication      {:.2f} ms, of which {:.2f} ms are not hidden; link {:.3g} GB/s, {:.3g} us\n",
                    time.communication * 1e3, time.exposed * 1e3, link->bytes_per_second / 1e9, link->latency * 1e6);
  }
  text += fmt::format("  step               {:.2f} ms, {:.4g} tokens/s\n", seconds * 1e3,
                      static_cast<double>(plan.tokens) / seconds);
  text += fmt::format(
      "  model FLOPs        {:.4g} GFLOP/s a rank, utilisation {:.1f} % of the {:.4g} GFLOP/s of a large product\n",
      rate / 1e9, 100 * rate / device.flops_per_second, device.flops_per_second / 1e9);
  const auto steps = static_cast<double>(config.train.steps);
  text += fmt::format("  train.steps = {}: {}, {:.4g} tokens, {:.4g} FLOPs\n", config.train.steps,
                      duration_text(steps * seconds), steps * static_cast<double>(plan.tokens), steps * plan.flops);
  if (!time.unknown.empty()) {
    text += fmt::format("  not measured, taken at the rates of a large product and sum: {}\n",
                        fmt::join(time.unknown, ", "));
  }
  return text;
}

MeshSize mesh_size(const RunConfig& config, std::int64_t ranks) {
  const std::int64_t dp = config.parallel.dp, tp = config.parallel.tp;
  if (ranks == 0) ranks = std::max<std::int64_t>(dp, 1) * std::max<std::int64_t>(tp, 1);
  constexpr std::int64_t kMostRanks = 1'000'000;
  if (ranks < 1 || ranks > kMostRanks) throw UsageError("{} ranks: want 1 to {}", ranks, kMostRanks);
  return MeshSize::of(static_cast<int>(ranks), dp, tp);
}

/// Sets the threads of the kernels, whose workspace depends on them. 0 is those of the profile, or 1.
void take_threads(const RunConfig& config, const PlanRequest& request) {
  const std::int64_t threads = config.run.threads > 0 ? config.run.threads
                               : request.device       ? request.device->threads
                                                      : 1;
  kernels::start_cpu_runtime(static_cast<int>(threads));
}

StepPlan plan_new(RunConfig& config, const PlanRequest& request) {
  take_vocab(config);
  config.model.validate();
  take_threads(config, request);
  const MeshSize mesh = mesh_size(config, request.ranks);
  return plan_step(config, plan_shards(config, mesh.tp, nullptr), mesh);
}

}  // namespace

StepPlan plan_step(const RunConfig& config, const ShardPlan& shards, const MeshSize& mesh) {
  StepPlan plan;
  plan.mesh = mesh;
  plan.tokens = config.train.batch * config.seq();
  plan.flops = config.model.train_flops_per_token(config.seq()) * static_cast<double>(plan.tokens);
  const std::vector<ParameterSpec> specs = parameter_specs(config.model, shards);
  std::vector<MemoryReport> peaks;
  for (int r = 0; r < mesh.tp; ++r) {
    const FlatLayout layout = flat_layout(specs, r);
    std::int64_t replicated = 0;
    for (std::size_t i = 0; i < specs.size(); ++i) {
      if (specs[i].placement == Placement::replicated) replicated += layout.blocks[i].elements;
    }
    int same = 0;
    while (same < r && share_of(shards, same) != share_of(shards, r)) ++same;
    if (same < r) {
      peaks.push_back(peaks[static_cast<std::size_t>(same)]);
    } else {
      Rehearsal rehearsal = rehearse(config, shards, {.dp = mesh.dp, .tp = mesh.tp, .tp_index = r});
      peaks.push_back(rehearsal.memory);
      if (r == 0) plan.kernels = std::move(rehearsal.kernels);
    }
    plan.memory.push_back(memory_of(config, mesh, r, layout, replicated, peaks.back()));
  }
  const std::vector<Bucket> buckets =
      flat_layout(specs, 0).buckets(compute_dtype(config.train.dtype), bucket_bytes(config), mesh.dp);
  plan.exchanges = step_exchanges(config, shards, buckets, {.dp = mesh.dp, .tp = mesh.tp});
  return plan;
}

StepTime predict(const RunConfig& config, const StepPlan& plan, const DeviceProfile& device,
                 const std::optional<Link>& link) {
  if (config.run.device != device.device) {
    throw ConfigError("run.device = \"{}\", and the profile of {} is of a \"{}\"", name_of(config.run.device),
                      device.name, name_of(device.device));
  }
  if (config.train.dtype != device.dtype) {
    throw ConfigError("train.dtype = \"{}\", and the profile of {} is of \"{}\"", name_of(config.train.dtype),
                      device.name, device.precision());
  }
  if (config.train.f32_products != device.f32_products) {
    throw ConfigError("train.tf32 = {}, and the profile of {} is of \"{}\"",
                      config.train.f32_products == F32Products::tf32, device.name, device.precision());
  }
  if (config.run.threads > 0 && config.run.threads != device.threads) {
    throw ConfigError("run.threads = {}, and the profile of {} is of {}", config.run.threads, device.name,
                      device.threads);
  }
  if (plan.ranks() > 1 && !link) {
    throw ConfigError("{} ranks need a link: --link-gbs and --link-us, or [link] in the profile of {}", plan.ranks(),
                      device.name);
  }
  StepTime time;
  std::int64_t calls = 0;
  for (const Profile::Entry& kernel : plan.kernels) {
    time.kernels += device.seconds(kernel);
    calls += kernel.calls;
    if (!device.knows(kernel.name)) time.unknown.emplace_back(kernel.name);
  }
  if (device.knows(kBetweenKernels)) time.between = device.seconds({kBetweenKernels, calls, 0, {}});
  if (plan.ranks() > 1) {
    const PredictedStep sent =
        predict(plan.exchanges, {.dp = plan.mesh.dp, .tp = plan.mesh.tp}, *link, (time.kernels + time.between) * 2 / 3);
    time.communication = sent.communication;
    time.exposed = sent.exposed;
  }
  return time;
}

std::string plan_text(Communicator& world, const RunRequest& request) {
  // The kernels' workspace depends on the threads.
  kernels::start_cpu_runtime(threads_per_rank(world, request.asked.config.run.threads));
  const TokenDataset dataset(request.asked.config.data.path);
  const Start start = prepare_start(world, request, dataset);
  const RunConfig& config = start.config;
  const MeshSize mesh = MeshSize::of(world.size(), config.parallel.dp, config.parallel.tp);
  const ShardPlan shards = plan_shards(config, mesh.tp, start.reader ? &*start.reader : nullptr);
  return to_toml(config) + "\n" + step_text(config, plan_step(config, shards, mesh));
}

std::string stages_plan_text(const std::string& path, const PlanRequest& request) {
  struct Cost {
    std::int64_t tokens = 0;
    double flops = 0, seconds = 0, rank_seconds = 0;
    Cost& operator+=(const Cost& other) {
      tokens += other.tokens;
      flops += other.flops;
      seconds += other.seconds;
      rank_seconds += other.rank_seconds;
      return *this;
    }
  };
  std::vector<PlannedStage> stages = load_stages(path);
  std::string text = fmt::format("{:<12} {:>11} {:>6} {:>9} {:>13} {:>12} {:>11} {:>12}{}\n", "stage", "parameters",
                                 "ranks", "updates", "tokens", "FLOPs", "peak MiB", "ms an update",
                                 request.device ? "        time  rank hours" : "");
  const auto times = [&](const Cost& cost) {
    return request.device ? fmt::format(" {:>11} {:>11.4g}", duration_text(cost.seconds), cost.rank_seconds / 3600)
                          : std::string();
  };
  /// A line, and what it comes to.
  const auto cost_of = [&](const std::string& name, PlannedStage stage, std::int64_t tokens) {
    PlanRequest with_ranks = request;
    with_ranks.ranks = stage.ranks;
    const StepPlan plan = plan_new(stage.config, with_ranks);
    const std::int64_t updates = (tokens + plan.tokens - 1) / plan.tokens;
    const double seconds = request.device ? predict(stage.config, plan, *request.device, link_of(request)).total() : 0;
    const auto count = static_cast<double>(updates);
    const Cost cost{updates * plan.tokens, count * plan.flops, count * seconds, count * seconds * plan.ranks()};
    const RankMemory& most = *std::ranges::max_element(plan.memory, {}, &RankMemory::total);
    text += fmt::format("{:<12} {:>11} {:>6} {:>9} {:>13} {:>12.4g} {:>11.1f} {:>12}{}\n", name,
                        stage.config.model.parameters(), plan.ranks(), updates, cost.tokens, cost.flops,
                        mib(most.total()), request.device ? fmt::format("{:.2f}", seconds * 1e3) : "-", times(cost));
    return cost;
  };
  const auto sum_line = [&](const char* name, const Cost& cost) {
    text += fmt::format("{:<12} {:>11} {:>6} {:>9} {:>13} {:>12.4g} {:>11} {:>12}{}\n", name, "", "", "", cost.tokens,
                        cost.flops, "", "", times(cost));
  };
  Cost all;
  for (std::size_t i = 0; i < stages.size(); ++i) {
    all += cost_of(fmt::format("{}", i + 1), stages[i], stages[i].tokens);
  }
  sum_line("all stages", all);
  const Cost whole = cost_of("from scratch", stages.back(), all.tokens);
  text += fmt::format("the plan takes {:.1f} % of the FLOPs of the last stage's model from scratch on as many tokens",
                      100 * all.flops / whole.flops);
  if (request.device) {
    text +=
        fmt::format(", {:.1f} % of its time and {:.1f} % of its rank hours (without expansions, saves and evaluation)",
                    100 * all.seconds / whole.seconds, 100 * all.rank_seconds / whole.rank_seconds);
  }
  return text + "\n";
}

std::string configuration_plan_text(RunConfig config, const PlanRequest& request) {
  const StepPlan plan = plan_new(config, request);
  std::string text = step_text(config, plan) + kernels_text(plan, request.device ? &*request.device : nullptr);
  if (request.device) text += time_text(config, plan, request);
  return text;
}

}  // namespace tforge
