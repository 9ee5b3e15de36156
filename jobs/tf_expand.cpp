// Grows a checkpoint and proves what that did to its output.
#include <cstdio>

#include <charconv>

#include "data/token_dataset.h"
#include "jobs/job.h"
#include "kernels/gemm.h"
#include "train/expand.h"
#include "train/threads.h"

using namespace tforge;

namespace {

/// "query=192,ffn=768"; option and text are repeated as they are in messages.
std::map<std::string, std::int64_t> counts_from(const char* option, const std::string& text) {
  std::map<std::string, std::int64_t> counts;
  std::size_t at = 0;
  while (at <= text.size()) {
    const std::size_t end = std::min(text.find(',', at), text.size());
    const std::string item = text.substr(at, end - at);
    at = end + 1;
    const std::size_t equals = item.find('=');
    std::int64_t count = 0;
    const char* const last = item.data() + item.size();
    if (equals == std::string::npos || std::from_chars(item.data() + equals + 1, last, count).ptr != last ||
        count < 1) {
      throw UsageError("--{} \"{}\": want NAME=COUNT pairs like query=192,key=192,value=192,proj=192,ffn=768", option,
                       text);
    }
    counts[item.substr(0, equals)] = count;
  }
  return counts;
}

}  // namespace

int main(int argc, char** argv) {
  ExpandRequest request;
  std::string config_path, grow, tokens;
  std::vector<std::string> overrides;
  std::int64_t seed = 1, threads = 0;
  const JobInfo info{
      .name = "tf_expand",
      .description =
          "Writes a larger checkpoint. A probe batch runs before and after; a growth that should be exact and changes "
          "the "
          "logits by more than the bound is refused. Optimizer moments and ages of old rows are kept, and a growth "
          "record is added. Any number of ranks gives the same file content.",
      .options =
          {{"checkpoint", "FILE", &request.checkpoint, "the checkpoint to grow"},
           {"output", "FILE", &request.output, "the grown checkpoint; must not exist"},
           {"config", "FILE", &config_path,
            "instead of a checkpoint a configuration of tf_train: only says what its model would become"},
           {"set", "KEY=VALUE", &overrides, "overrides a key of the configuration; may be repeated"},
           {"grow", "NAME=COUNT,...", &grow,
            "counts after growth; of a tokenformer the parameter tokens a layer of query, key, value, proj, ffn; "
            "of a transformer dim (by whole heads), ffn_dim, layers; of a memoryformer tables a layer of "
            "attention.tables, ffn_in.tables, ffn_out.tables, and hash bits of attention.bits, ffn_in.bits, "
            "ffn_out.bits"},
           {"tokens", "NAME=COUNT,...", &tokens, "the same under its older name"},
           {"rule", "NAME", &request.growth.rule,
            "tokenformer: zero-key (exact, the default), public, random-key-zero-value or mirror; transformer: "
            "net2net; memoryformer, for bits: keep-weight (exact, the default) or extend-weight"},
           {"seed", "N", &seed, "of the new rows"},
           {"noise", "SIGMA", &request.growth.noise,
            "tokenformer: on old rows, as a fraction of each row's root mean square; transformer: of the shares of "
            "a unit's copies, the function kept"},
           {"max-change", "X", &request.max_change,
            "bound of the probe for an exact growth; 0: 1e-5 in f32, 1e-12 in f64"},
           {"probe", "N", &request.probe_sequences, "sequences of the probe batch"},
           {"threads", "N", &threads, "OpenMP threads a rank; 0: cores / ranks on the node"}},
      .examples = {"tf_expand --checkpoint run/step_00000400.h5 --output grown.h5 --grow query=192,key=192,ffn=768",
                   "mpirun -n 2 tf_expand --checkpoint a.h5 --output b.h5 --grow ffn=1024 --rule mirror",
                   "tf_expand --checkpoint transformer.h5 --output wider.h5 --grow dim=256,ffn_dim=1024 --noise 0.1",
                   "tf_expand --checkpoint memory.h5 --output more.h5 --grow attention.tables=80,ffn_out.bits=11",
                   "tf_expand --config configs/demo.toml --grow ffn=1024"},
      .world_options = {},
  };
  return run_mpi_job(argc, argv, info, [&](Communicator& world) {
    kernels::start_cpu_runtime(threads_per_rank(world, threads));
    if (seed < 0) throw UsageError("--seed {}: want 0 or more", seed);
    if (request.probe_sequences < 1) throw UsageError("--probe {}: want at least 1", request.probe_sequences);
    if (!grow.empty() && !tokens.empty()) throw UsageError("--grow and --tokens are two names of the same; give one");
    if (grow.empty() && tokens.empty()) throw UsageError("--grow is missing: what grows, and to how much");
    request.growth.seed = static_cast<std::uint64_t>(seed);
    request.growth.counts = tokens.empty() ? counts_from("grow", grow) : counts_from("tokens", tokens);
    if (!config_path.empty()) {
      if (!request.checkpoint.empty() || !request.output.empty()) {
        throw UsageError("--config only says what would grow; --checkpoint and --output are not for it");
      }
      RunConfig config = load_config(config_path, overrides).config;
      adopt_vocab(config, TokenDataset(config.data.path).vocab(), config.data.path);
      request.growth.model = "the model";
      const std::string text = planned_growth_text(config, request.growth);
      if (world.rank() == 0) std::fputs(text.c_str(), stdout);
      return ExitCode::done;
    }
    if (!overrides.empty()) throw UsageError("--set overrides keys of --config, which is missing");
    if (request.checkpoint.empty()) throw UsageError("--checkpoint is missing");
    if (request.output.empty()) throw UsageError("--output is missing");
    const ExpandResult result = expand_checkpoint(world, request);
    if (world.rank() != 0) return ExitCode::done;
    std::string rules;
    for (const GrowthGroup& group : result.groups) {
      if (group.after == group.before || rules.find(group.rule) != rules.npos) continue;
      rules += (rules.empty() ? "" : ", ") + group.rule;
    }
    std::fputs(growth_text(result.groups, result.parameters_before, result.parameters_after).c_str(), stdout);
    std::printf("probe: max|change of logits| / max|logits| = %.3g (rule %s)\n", result.probe_change, rules.c_str());
    std::printf("wrote %s\n", request.output.c_str());
    return ExitCode::done;
  });
}
