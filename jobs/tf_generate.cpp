// Samples text from a checkpoint.
#include <chrono>
#include <cstdio>

#include "checkpoint/reader.h"
#include "core/log.h"
#include "jobs/job.h"
#include "kernels/gemm.h"
#include "model/generator.h"
#include "model/models.h"
#include "train/run_state.h"
#include "train/threads.h"
#include "train/workplace.h"

using namespace tforge;

int main(int argc, char** argv) {
  std::string checkpoint, prompt = "\n", device = "cpu";
  GenerateOptions options;
  std::int64_t seed = 0, threads = 0;
  bool no_cache = false, slide = false, greedy = false, share_device = false;
  const JobInfo info{
      .name = "tf_generate",
      .description =
          "Continues a prompt with text sampled from a checkpoint, printing it as it comes. A key-value cache holds "
          "the "
          "positions seen. At the length the model was trained on it stops with a message, or slides its window. "
          "Several samples are computed side by side and printed one after the other at the end.",
      .options = {{"checkpoint", "FILE", &checkpoint, "the model", Need::required},
                  {"prompt", "TEXT", &prompt, "text to continue"},
                  {"tokens", "N", &options.tokens, "tokens to add at most"},
                  {"samples", "N", &options.samples,
                   "continuations of the prompt, each with random numbers of its own"},
                  {"temperature", "T", &options.sampling.temperature, "divides the logits; 0 is greedy"},
                  {"greedy", "", &greedy, "the most likely token each time (temperature 0)"},
                  {"top-k", "K", &options.sampling.top_k, "samples among the K most likely tokens; 0: all"},
                  {"top-p", "P", &options.sampling.top_p, "then among the fewest that hold this probability"},
                  {"seed", "N", &seed, "of the random numbers"},
                  {"slide", "", &slide, "past the trained length: keeps the last half of the window and goes on"},
                  {"no-cache", "", &no_cache, "computes every position anew for each token (to compare)"},
                  {"device", "NAME", &device, "cpu, or cuda: an NVIDIA device for each rank"},
                  {"share-device", "", &share_device, "ranks may use one device; sums go through the host's memory"},
                  {"threads", "N", &threads, "OpenMP threads a rank; 0: cores / ranks on the node"}},
      .examples =
          {"tf_generate --checkpoint run/step_00000400.h5 --prompt \"In the beginning\" --tokens 100",
           "tf_generate --checkpoint run/step_00000400.h5 --prompt \"And\" --temperature 0.8 --top-k 50 --seed 1",
           "tf_generate --checkpoint run/step_00000400.h5 --prompt \"And\" --samples 16 --top-p 0.9"},
      .world_options = {},
  };
  return run_mpi_job(argc, argv, info, [&](Communicator& world) {
    kernels::start_cpu_runtime(threads_per_rank(world, threads));
    if (seed < 0) throw UsageError("--seed {}: want 0 or more", seed);
    if (options.tokens < 0) throw UsageError("--tokens {}: want 0 or more", options.tokens);
    options.sampling.seed = static_cast<std::uint64_t>(seed);
    if (greedy) options.sampling.temperature = 0;
    options.cache = no_cache ? CacheUse::recomputed : CacheUse::cached;
    options.past_end = slide ? PastEnd::slide : PastEnd::stop;

    const CheckpointReader reader = CheckpointReader::open(world, checkpoint);
    const Tokenizer tokenizer = restored(reader.tokenizer(), checkpoint);
    const RunConfig config = placed(stored_config(reader), device, share_device);
    Workplace place(world, config);
    const std::unique_ptr<LanguageModel> model =
        make_model(place.memory(), place.stream(), config.model, config.train.dtype, place.world(),
                   ShardPlan::even(config.model, world.size()));
    load_parameters(reader, *model);

    std::vector<std::int32_t> tokens;
    tokenizer.encode(prompt, tokens);
    const bool streams = options.samples == 1;  // prints tokens as they come
    StreamDecoder decoder(tokenizer);
    const auto show = [&](const std::string& text) {
      if (world.rank() != 0) return;
      std::fwrite(text.data(), 1, text.size(), stdout);
      std::fflush(stdout);
    };
    bool begun = false;  // the prompt is shown once nothing is wrong with it
    const auto begin = [&] {
      if (!begun) show(prompt);
      begun = true;
    };
    const auto start = std::chrono::steady_clock::now();
    const std::vector<std::vector<std::int32_t>> samples =
        generate(*model, place.memory(), place.stream(), tokens, options, [&](std::int64_t, std::int32_t token) {
          if (!streams) return;
          begin();
          show(decoder.push(token));
        });
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (streams) {
      begin();
      show(decoder.finish() + "\n");
    } else {
      for (std::size_t s = 0; s < samples.size(); ++s) {
        std::string text = fmt::format("{}--- sample {} of {}\n{}", s > 0 ? "\n" : "", s + 1, samples.size(), prompt);
        StreamDecoder whole(tokenizer);
        for (const std::int32_t token : samples[s]) text += whole.push(token);
        show(text + whole.finish() + "\n");
      }
    }
    const auto added = static_cast<std::int64_t>(samples[0].size());
    log::info("{} tokens in {:.2f} s, {:.1f} tokens/s", added * options.samples, seconds,
              static_cast<double>(added * options.samples) / seconds);
    if (added < options.tokens) {
      log::warning("stopped at {} tokens, the length that the model was trained on; --slide goes on past it",
                   config.model.max_seq);
    }
    return ExitCode::done;
  });
}
