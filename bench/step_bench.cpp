// One training step of a model on random tokens: forward, backward, clip, AdamW. Prints one JSON line, the
// counterpart of bench/pytorch_peer.py: the median over --steps after --warmup steps. Under mpirun the batch is dealt
// to dp = ranks / tp ranks.
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/device_queue.h"
#include "core/rng.h"
#include "jobs/job.h"
#include "kernels/gemm.h"
#include "model/models.h"
#include "parallel/mesh.h"
#include "profile_table.h"
#include "train/communication_model.h"
#include "train/config.h"
#include "train/gradient_pass.h"
#include "train/optimizer.h"
#include "train/plan.h"
#include "train/trainer.h"
#include "train/workplace.h"

using namespace tforge;

namespace {

/// Weak scaling over dp: every rank keeps the sequences and the compute time that it has here. Backward is taken as two
/// thirds of the compute time, two of the three products of each layer.
void print_prediction(RunConfig config, const LanguageModel& model, std::int64_t sequences, int tp, double compute,
                      const Link& link) {
  std::printf("compute %.1f ms a step and rank (measured); link %.3g GB/s, %.3g us; predicted, not measured:\n",
              compute * 1e3, link.bytes_per_second / 1e9, link.latency * 1e6);
  std::printf("%6s %16s %14s %11s %14s %11s\n", "ranks", "MB a rank", "blocking ms", "efficiency", "overlapped ms",
              "efficiency");
  for (const int ranks : {8, 64, 512}) {
    const MeshPlace place{.dp = ranks / tp, .tp = tp};
    if (place.dp < 1) continue;
    config.train.batch = sequences * place.dp;
    const std::vector<Bucket> buckets = model.parameters().buckets(bucket_bytes(config), place.dp);
    const auto exposed = [&](Reduction reduction) {
      config.parallel.reduction = reduction;
      return predict(step_exchanges(config, model.plan(), buckets, place), place, link, compute * 2 / 3).exposed;
    };
    const double blocking = exposed(Reduction::blocking), overlapped = exposed(Reduction::nonblocking);
    const std::vector<Exchange> sent = step_exchanges(config, model.plan(), buckets, place);
    const double bytes = static_cast<double>(volume_of(sent, MeshAxis::dp).bytes + volume_of(sent, MeshAxis::tp).bytes);
    std::printf("%6d %16.1f %14.1f %10.1f%% %14.1f %10.1f%%\n", ranks, bytes / 1e6, blocking * 1e3,
                100 * compute / (compute + blocking), overlapped * 1e3, 100 * compute / (compute + overlapped));
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::int64_t dim = 128, layers = 4, heads = 4, tokens_attn = 128, tokens_ffn = 512, vocab = 256, seq = 256,
               batch = 16;
  std::int64_t steps = 8, warmup = 2, threads = 2, tp = 1;
  std::string kind = "tokenformer";
  std::int64_t ffn_dim = 0, hash_bits = 8;
  std::vector<std::string> set;
  bool profile_wanted = false, ceilings_wanted = false;
  std::optional<double> link_gbs;
  std::optional<std::string> device_path;
  double link_us = 2;
  const JobInfo info{
      .name = "step_bench",
      .description = "Times a training step on random tokens.",
      .options = {{"kind", "NAME", &kind, "tokenformer, transformer or memoryformer"},
                  {"ffn-dim", "N", &ffn_dim, "neurons of a transformer's MLP; 0: 4 * dim"},
                  {"hash-bits", "N", &hash_bits, "bits of a memoryformer's tables; two more in its Memory Block"},
                  {"dim", "N", &dim, "width"},
                  {"layers", "N", &layers, "blocks"},
                  {"heads", "N", &heads, "heads"},
                  {"tokens-attn", "N", &tokens_attn, "parameter tokens of query, key, value and proj"},
                  {"tokens-ffn", "N", &tokens_ffn, "parameter tokens of ffn"},
                  {"vocab", "N", &vocab, "vocabulary"},
                  {"seq", "N", &seq, "tokens of a sequence"},
                  {"batch", "N", &batch, "sequences of a step, over all ranks"},
                  {"steps", "N", &steps, "timed steps"},
                  {"warmup", "N", &warmup, "steps before them"},
                  {"threads", "N", &threads, "OpenMP threads a rank"},
                  {"tp", "N", &tp, "tensor-parallel ranks"},
                  {"set", "KEY=VALUE", &set,
                   "a key of [train] or [parallel], run.deterministic, run.device or run.products, as for tf_train"},
                  {"profile", "", &profile_wanted, "one step more, with a table of its kernels"},
                  {"ceilings", "", &ceilings_wanted, "also the rates of a large product and sum, measured here"},
                  {"link-gbs", "X", &link_gbs, "also predicts 8, 64 and 512 such ranks over links of X GB/s each way"},
                  {"device-profile", "FILE", &device_path,
                   "also says what tf_plan predicts with this profile; several ranks need its [link]"},
                  {"link-us", "X", &link_us, "latency of a message over such a link, microseconds"}}};
  return run_mpi_job(argc, argv, info, [&](Communicator& world) {
    kernels::start_cpu_runtime(static_cast<int>(threads));
    RunConfig config =
        parse_config(
            fmt::format("[model]\nkind = \"{}\"\n[data]\npath = \"random tokens\"\n[run]\ndir = \"none\"", kind),
            "step_bench", set)
            .config;
    config.model.ffn_dim = ffn_dim;
    config.model.hash_bits = {hash_bits, hash_bits, hash_bits + 2};
    config.model.layers = layers;
    config.model.dim = dim;
    config.model.heads = heads;
    config.model.vocab = vocab;
    config.model.max_seq = seq;
    config.model.tokens = {tokens_attn, tokens_attn, tokens_attn, tokens_attn, tokens_ffn};
    config.train.batch = batch;
    Workplace place(world, config);
    Mesh mesh = Mesh::create(place.world(), 0, static_cast<int>(tp));

    Allocator& allocator = place.memory();
    Stream& stream = place.stream();
    const std::unique_ptr<LanguageModel> made = make_model(allocator, stream, config.model, config.train.dtype,
                                                           *mesh.tp_comm, plan_shards(config, mesh.tp, nullptr));
    LanguageModel& model = *made;
    model.initialise(1);
    GradientPass gradients(config, model, mesh, allocator, stream);
    AdamW optimizer = make_optimizer(config, allocator, model.parameters(), gradients.buckets(), mesh);
    const std::int64_t most = deal_sequences(config, mesh.dp).count(0) * seq;
    const Rng rng(1, "bench");
    std::vector<std::int32_t> text;
    for (std::int64_t i = 0; i <= most; ++i) {
      text.push_back(
          static_cast<std::int32_t>(rng.below(static_cast<std::uint64_t>(i), static_cast<std::uint64_t>(vocab))));
    }
    const auto part = [&](std::int64_t first) {
      return Tensor::of<std::int32_t>(
          allocator, Shape{most},
          std::span(text).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(most)),
          Purpose::activations);
    };
    const MicroBatch batch_of_rank{part(0), part(1)};
    const auto next_batch = [&](const MicroRange& now, const MicroRange&) {
      return MicroBatch{batch_of_rank.tokens.rows(0, now.count * seq), batch_of_rank.targets.rows(0, now.count * seq)};
    };
    const auto traffic = [&] {
      const Communicator::Traffic a = mesh.dp_comm->traffic(), b = mesh.tp_comm->traffic();
      return Communicator::Traffic{a.calls + b.calls, a.bytes + b.bytes, a.seconds + b.seconds,
                                   a.exposed_seconds + b.exposed_seconds};
    };
    Communicator::Traffic before;
    std::vector<double> milliseconds;
    const auto step = [&] {
      world.barrier();
      const auto start = std::chrono::steady_clock::now();
      gradients.run(-1, next_batch);
      gradients.loss();
      const double norm = optimizer.gradient_norm(stream, config.train, 0, mesh, model.reducer());
      optimizer.update(stream, config.train, 0, 1e-4, norm > 1 ? 1 / norm : 1.0);
      gradients.share_values();
      wait(stream);
      return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    };
    for (std::int64_t i = 0; i < warmup + steps; ++i) {
      if (i == warmup) before = traffic();
      const double ms = step();
      if (i >= warmup) milliseconds.push_back(ms);
    }
    std::ranges::sort(milliseconds);
    const double median = milliseconds[milliseconds.size() / 2];
    const Communicator::Traffic after = traffic();
    const double per_step = 1.0 / static_cast<double>(steps);
    rusage usage{};
    ::getrusage(RUSAGE_SELF, &usage);
    double resident_mb = 0;  // of all ranks
    for (const std::string& kib : world.all_gather_bytes(std::to_string(usage.ru_maxrss))) {
      resident_mb += std::stod(kib) * 1024 / 1e6;
    }
    const MemoryReport memory = allocator.report();
    std::string rates;
    if (ceilings_wanted) {
      const bench::Ceilings c = bench::measure_ceilings(stream, allocator, config.train.dtype);
      rates = fmt::format(", \"gemm_gflops\": {:.1f}, \"memory_gbytes\": {:.1f}", c.flops_per_second / 1e9,
                          c.bytes_per_second / 1e9);
    }
    if (world.rank() == 0) {
      std::printf(
          "{\"what\": \"tokenforge\", \"parameters\": %lld, \"ranks\": %d, \"tokens_per_s\": %.1f, "
          "\"ms_per_step\": %.3f, \"ms_min\": %.3f, \"ms_max\": %.3f, \"peak_rss_mb\": %.1f, "
          "\"peak_tensor_mb\": %.1f, \"reserved_mb\": %.1f, \"communication_ms\": %.3f, \"exposed_ms\": %.3f, "
          "\"communication_bytes\": %.0f%s}\n",
          static_cast<long long>(config.model.parameters()), world.size(),
          static_cast<double>(batch * seq) / median * 1e3, median, milliseconds.front(), milliseconds.back(),
          resident_mb, static_cast<double>(memory.total_peak) / 1e6, static_cast<double>(memory.reserved) / 1e6,
          (after.seconds - before.seconds) * per_step * 1e3,
          (after.exposed_seconds - before.exposed_seconds) * per_step * 1e3,
          static_cast<double>(after.bytes - before.bytes) * per_step, rates.c_str());
    }
    if (device_path && world.rank() == 0) {
      const DeviceProfile device = load_device_profile(*device_path);
      const StepPlan plan = plan_step(config, model.plan(), {mesh.dp, mesh.tp});
      const StepTime time = predict(config, plan, device, device.link);
      std::printf(
          "{\"what\": \"plan\", \"predicted_ms\": %.3f, \"predicted_exposed_ms\": %.3f, \"planned_tensor_mb\": %.1f}\n",
          time.total() * 1e3, time.exposed * 1e3, (plan.memory[0].total() - plan.memory[0].saving) / 1e6);
    }
    if (link_gbs && world.rank() == 0) {
      const double compute = median / 1e3 - (after.exposed_seconds - before.exposed_seconds) * per_step;
      print_prediction(config, model, deal_sequences(config, mesh.dp).count(0), mesh.tp, compute,
                       {*link_gbs * 1e9, link_us / 1e6});
    }
    if (profile_wanted) {
      Profile profile;
      stream.set_profile(&profile);
      const double ms = step();
      stream.set_profile(nullptr);
      if (world.rank() == 0) {
        bench::print_profile(stderr, profile, ms / 1e3, bench::measure_ceilings(stream, allocator, config.train.dtype));
      }
    }
    return ExitCode::done;
  });
}
