// Generation with a cache and evaluation of a model on random tokens. Prints one JSON line, the counterpart of
// bench/pytorch_generate.py: the median over --rounds after one that is not timed.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <vector>

#include "core/rng.h"
#include "jobs/job.h"
#include "kernels/gemm.h"
#include "model/generator.h"
#include "model/models.h"

using namespace tforge;

int main(int argc, char** argv) {
  std::int64_t dim = 256, layers = 6, heads = 8, tokens_attn = 256, tokens_ffn = 1024, vocab = 4096, seq = 256;
  std::int64_t batch = 1, prompt_tokens = 32, tokens = 224, rounds = 3, threads = 2;
  std::int64_t ffn_dim = 0;
  std::string what = "generate", kind = "tokenformer";
  double temperature = 0;
  const JobInfo info{
      .name = "generate_bench",
      .description = "Times generation, or evaluation, on random tokens.",
      .options = {{"what", "NAME", &what, "generate or evaluate (forward and loss of --batch sequences)"},
                  {"kind", "NAME", &kind, "tokenformer or transformer"},
                  {"ffn-dim", "N", &ffn_dim, "neurons of a transformer's MLP; 0: 4 * dim"},
                  {"dim", "N", &dim, "width"},
                  {"layers", "N", &layers, "blocks"},
                  {"heads", "N", &heads, "heads"},
                  {"tokens-attn", "N", &tokens_attn, "parameter tokens of query, key, value and proj"},
                  {"tokens-ffn", "N", &tokens_ffn, "parameter tokens of ffn"},
                  {"vocab", "N", &vocab, "vocabulary"},
                  {"seq", "N", &seq, "positions of the model; tokens of a sequence to evaluate"},
                  {"batch", "N", &batch, "samples, or sequences"},
                  {"prompt", "N", &prompt_tokens, "tokens of the prompt"},
                  {"tokens", "N", &tokens, "tokens to add"},
                  {"temperature", "T", &temperature, "of the sampling; 0 is greedy"},
                  {"rounds", "N", &rounds, "timed rounds"},
                  {"threads", "N", &threads, "OpenMP threads"}}};
  return run_mpi_job(argc, argv, info, [&](Communicator& world) {
    if (what != "generate" && what != "evaluate") throw UsageError("--what {}: want generate or evaluate", what);
    kernels::start_cpu_runtime(static_cast<int>(threads));
    ModelConfig config;
    config.kind = kind;
    config.ffn_dim = ffn_dim;
    config.layers = layers;
    config.dim = dim;
    config.heads = heads;
    config.vocab = vocab;
    config.max_seq = seq;
    config.tokens = {tokens_attn, tokens_attn, tokens_attn, tokens_attn, tokens_ffn};
    Allocator allocator;
    Stream stream;
    const std::unique_ptr<LanguageModel> model =
        make_model(allocator, stream, config, DType::f32, world, ShardPlan::even(config, world.size()));
    model->initialise(1);
    const Rng rng(1, "bench");
    const auto random_tokens = [&](std::int64_t count, std::uint64_t first) {
      std::vector<std::int32_t> list;
      for (std::int64_t i = 0; i < count; ++i) {
        list.push_back(static_cast<std::int32_t>(
            rng.below(first + static_cast<std::uint64_t>(i), static_cast<std::uint64_t>(vocab))));
      }
      return list;
    };
    const std::vector<std::int32_t> text = random_tokens(batch * seq + 1, 0);
    const std::span<const std::int32_t> all(text);
    const auto count = static_cast<std::size_t>(batch * seq);
    const Tensor inputs = Tensor::of(allocator, Shape{batch * seq}, all.first(count), Purpose::activations);
    const Tensor targets = Tensor::of(allocator, Shape{batch * seq}, all.last(count), Purpose::activations);
    Tape tape(allocator, stream, TapeMode::inference);
    GenerateOptions options;
    options.sampling.temperature = temperature;
    options.tokens = tokens;
    options.samples = batch;

    std::vector<double> seconds, cpu_seconds;
    for (std::int64_t round = 0; round < 1 + rounds; ++round) {
      const auto start = std::chrono::steady_clock::now();
      const std::clock_t cpu_start = std::clock();
      if (what == "generate") {
        generate(*model, allocator, stream, all.first(static_cast<std::size_t>(prompt_tokens)), options);
      } else {
        model->nll(tape, inputs, targets, batch);
      }
      if (round == 0) continue;
      seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
      cpu_seconds.push_back(static_cast<double>(std::clock() - cpu_start) / CLOCKS_PER_SEC);
    }
    const auto median = [](std::vector<double> values) {
      std::ranges::sort(values);
      return values[values.size() / 2];
    };
    const double produced = static_cast<double>(batch * (what == "generate" ? tokens : seq));
    if (world.rank() == 0) {
      std::printf(
          "{\"what\": \"tokenforge\", \"tokens_per_s\": %.1f, \"tokens_per_cpu_s\": %.1f, \"parameters\": %lld, "
          "\"threads\": %lld}\n",
          produced / median(seconds), produced / median(cpu_seconds), static_cast<long long>(config.parameters()),
          static_cast<long long>(threads));
    }
    return ExitCode::done;
  });
}
