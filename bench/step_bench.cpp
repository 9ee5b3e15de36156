// One training step of a TokenFormer on random tokens: forward, backward, clip, AdamW. Prints one JSON line, the
// counterpart of bench/pytorch_peer.py: the median over --steps after --warmup steps. Under mpirun the batch is dealt
// to dp = ranks / tp ranks.
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

#include "core/rng.h"
#include "jobs/job.h"
#include "kernels/gemm.h"
#include "model/tokenformer.h"
#include "parallel/grad_sync.h"
#include "parallel/mesh.h"
#include "profile_table.h"
#include "train/config.h"
#include "train/optimizer.h"

using namespace tforge;

int main(int argc, char** argv) {
  std::int64_t dim = 128, layers = 4, heads = 4, tokens_attn = 128, tokens_ffn = 512, vocab = 256, seq = 256,
               batch = 16;
  std::vector<std::string> set;
  std::int64_t steps = 8, warmup = 2, threads = 2, tp = 1;
  bool profile_wanted = false;
  const JobInfo info{.name = "step_bench",
                     .description = "Times a training step on random tokens.",
                     .options = {{"dim", "N", &dim, "width"},
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
                                 {"set", "KEY=VALUE", &set, "a key of [train], as for tf_train"},
                                 {"profile", "", &profile_wanted, "one step more, with a table of its kernels"}}};
  return run_mpi_job(argc, argv, info, [&](Communicator& world) {
    kernels::start_cpu_runtime(static_cast<int>(threads));
    ModelConfig config;
    config.layers = layers;
    config.dim = dim;
    config.heads = heads;
    config.vocab = vocab;
    config.max_seq = seq;
    config.tokens = {tokens_attn, tokens_attn, tokens_attn, tokens_attn, tokens_ffn};
    const TrainConfig train =
        parse_config("[data]\npath = \"random tokens\"\n[run]\ndir = \"none\"", "step_bench", set).config.train;
    Mesh mesh = Mesh::create(world, 0, static_cast<int>(tp));
    const std::int64_t mine = ShardBorders::even(batch, mesh.dp, "batch").count(mesh.dp_index);

    Allocator allocator;
    Stream stream;
    TokenFormer model(allocator, stream, config, DType::f32, *mesh.tp_comm, ShardPlan::even(config, mesh.tp));
    model.initialise(1);
    AdamW optimizer(allocator, model.parameters());
    GradSync sync(*mesh.dp_comm, model.parameters().gradients());
    Tape tape(allocator, stream, TapeMode::training, train.saves);
    Tensor tokens = Tensor::empty(allocator, Shape{mine * seq}, DType::i32, Purpose::activations);
    Tensor targets = Tensor::empty(allocator, Shape{mine * seq}, DType::i32, Purpose::activations);
    const Rng rng(1, "bench");
    const auto token = [&](std::int64_t i) {
      return static_cast<std::int32_t>(rng.below(static_cast<std::uint64_t>(i), static_cast<std::uint64_t>(vocab)));
    };
    for (std::int64_t i = 0; i < mine * seq; ++i) {
      tokens.span<std::int32_t>()[static_cast<std::size_t>(i)] = token(i);
      targets.span<std::int32_t>()[static_cast<std::size_t>(i)] = token(i + 1);
    }
    std::vector<double> milliseconds;
    const auto step = [&] {
      world.barrier();
      const auto start = std::chrono::steady_clock::now();
      model.parameters().clear_gradients();
      HeadLoss loss = model.loss(tape, tokens, targets, mine, 1.0 / static_cast<double>(batch * seq));
      tape.backward(loss.loss);
      model.parameters().finish_gradients();
      sync.finish(stream);
      const double norm = optimizer.gradient_norm(stream, train, 0, mesh);
      optimizer.update(stream, train, 0, 1e-4, norm > 1 ? 1 / norm : 1.0);
      return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    };
    for (std::int64_t i = 0; i < warmup + steps; ++i) {
      const double ms = step();
      if (i >= warmup) milliseconds.push_back(ms);
    }
    std::ranges::sort(milliseconds);
    const double median = milliseconds[milliseconds.size() / 2];
    rusage usage{};
    ::getrusage(RUSAGE_SELF, &usage);
    double resident_mb = 0;  // of all ranks
    for (const std::string& kib : world.all_gather_bytes(std::to_string(usage.ru_maxrss))) {
      resident_mb += std::stod(kib) * 1024 / 1e6;
    }
    if (world.rank() == 0) {
      std::printf(
          "{\"what\": \"tokenforge\", \"parameters\": %lld, \"ranks\": %d, \"tokens_per_s\": %.1f, "
          "\"ms_per_step\": %.3f, \"ms_min\": %.3f, \"ms_max\": %.3f, \"peak_rss_mb\": %.1f, "
          "\"peak_tensor_mb\": %.1f, \"reserved_mb\": %.1f}\n",
          static_cast<long long>(config.parameters()), world.size(), static_cast<double>(batch * seq) / median * 1e3,
          median, milliseconds.front(), milliseconds.back(), resident_mb,
          static_cast<double>(allocator.report().total_peak) / 1e6,
          static_cast<double>(allocator.report().reserved) / 1e6);
    }
    if (profile_wanted) {
      Profile profile;
      stream.set_profile(&profile);
      const double ms = step();
      stream.set_profile(nullptr);
      if (world.rank() == 0) bench::print_profile(stderr, profile, ms / 1e3, bench::measure_ceilings(allocator));
    }
    return ExitCode::done;
  });
}
