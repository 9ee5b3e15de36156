// Perplexity of a checkpoint on a split of a token dataset.
#include <chrono>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "checkpoint/reader.h"
#include "core/log.h"
#include "core/version.h"
#include "jobs/job.h"
#include "kernels/gemm.h"
#include "model/models.h"
#include "storage/atomic_file.h"
#include "train/evaluate.h"
#include "train/run_state.h"
#include "train/threads.h"
#include "train/workplace.h"

using namespace tforge;

namespace {

Split split_from_name(const std::string& name) {
  for (const Split split : kSplits) {
    if (name == name_of(split)) return split;
  }
  throw UsageError("'{}' is no split; there are train, validation and test", name);
}

}  // namespace

int main(int argc, char** argv) {
  std::string checkpoint, data, split_name = "validation", device = "cpu";
  std::optional<std::string> json_path;
  EvalOptions options;
  std::int64_t tp = 1, threads = 0;
  bool unigram = false, share_device = false;
  const JobInfo info{
      .name = "tf_eval",
      .description =
          "Token and word perplexity and bits per byte of a checkpoint. Every token of a document but its first is "
          "scored exactly once, with at least context - stride tokens of the document before it (or all there are); "
          "sums are taken in f64, and the result is the same on any number of ranks and for any batch.",
      .options = {{"checkpoint", "FILE", &checkpoint, "the model", Need::required},
                  {"data", "FILE", &data, "token dataset written by tf_prepare with the model's tokenizer",
                   Need::required},
                  {"split", "NAME", &split_name, "train, validation or test"},
                  {"context", "N", &options.context, "tokens of a window; 0: the trained length"},
                  {"stride", "N", &options.stride, "scored tokens from one window to the next; 0: half of the context"},
                  {"batch", "N", &options.batch, "windows at a time on each rank"},
                  {"max-tokens", "N", &options.max_tokens, "stops after about this many tokens; 0: all"},
                  {"tp", "N", &tp, "ranks that share one copy of the model; the others share the windows"},
                  {"device", "NAME", &device, "cpu, or cuda: an NVIDIA device for each rank"},
                  {"share-device", "", &share_device, "ranks may use one device; sums go through the host's memory"},
                  {"threads", "N", &threads, "OpenMP threads a rank; 0: cores / ranks on the node"},
                  {"unigram", "", &unigram, "also scores the same tokens with the train split's token frequencies"},
                  {"json", "FILE", &json_path, "writes the result there too"}},
      .examples = {"tf_eval --checkpoint run/step_00000400.h5 --data data.h5 --split test",
                   "mpirun -n 4 tf_eval --checkpoint run/step_00000400.h5 --data data.h5 --json result.json"},
      .world_options = {},
  };
  return run_mpi_job(argc, argv, info, [&](Communicator& world) {
    kernels::start_cpu_runtime(threads_per_rank(world, threads));
    const Split split = split_from_name(split_name);
    const TokenDataset dataset(data);
    const CheckpointReader reader = CheckpointReader::open(world, checkpoint);
    if (reader.tokenizer().fingerprint != dataset.tokenizer().fingerprint()) {
      throw DataError("{} was made with another tokenizer than {}; prepare the text again with --tokenizer {}", data,
                      checkpoint, checkpoint);
    }
    const RunConfig config = placed(stored_config(reader), device, share_device);
    Workplace place(world, config);
    Mesh mesh = Mesh::create(place.world(), 0, static_cast<int>(tp));
    const std::unique_ptr<LanguageModel> model =
        make_model(place.memory(), place.stream(), config.model, config.train.dtype, *mesh.tp_comm,
                   ShardPlan::even(config.model, mesh.tp));
    load_parameters(reader, *model);
    const auto start = std::chrono::steady_clock::now();
    const EvalResult result = evaluate(*model, dataset.split(split), options, mesh, place.memory(), place.stream());
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (world.rank() != 0) return ExitCode::done;
    log::info("{} tokens scored in {:.2f} s, {:.1f} tokens/s", result.tokens, seconds,
              static_cast<double>(result.tokens) / seconds);

    nlohmann::ordered_json json = {{"checkpoint", checkpoint},
                                   {"uuid", reader.info().uuid},
                                   {"step", reader.info().step},
                                   {"data", data},
                                   {"dataset_fingerprint", dataset.fingerprint()},
                                   {"split", split_name},
                                   {"documents", result.documents},
                                   {"scored_tokens", result.tokens},
                                   {"bytes", result.bytes},
                                   {"words", result.words},
                                   {"nll", result.nll()},
                                   {"nll_sum", result.nll_sum},
                                   {"token_perplexity", result.token_perplexity()},
                                   {"word_perplexity", result.word_perplexity()},
                                   {"bits_per_byte", result.bits_per_byte()}};
    if (unigram) {
      if (options.max_tokens > 0) throw UsageError("--unigram scores whole documents; leave --max-tokens out");
      const EvalResult base = evaluate_unigram(dataset.split(Split::train), dataset.split(split), dataset.vocab());
      json["unigram_nll"] = base.nll();
      json["unigram_bits_per_byte"] = base.bits_per_byte();
    }
    json["version"] = version_text();
    const std::string text = json.dump(2) + "\n";
    if (json_path) {
      AtomicFile file(*json_path);
      file.file().write_at(0, text.data(), text.size());
      file.commit();
    }
    std::fputs(text.c_str(), stdout);
    return ExitCode::done;
  });
}
