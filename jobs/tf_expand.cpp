// Grows a checkpoint by parameter tokens and proves what that did to its output.
#include <cstdio>

#include <charconv>

#include "core/nearest.h"
#include "jobs/job.h"
#include "kernels/gemm.h"
#include "train/expand.h"
#include "train/threads.h"

using namespace tforge;

namespace {

/// "query=192,ffn=768" into counts by group; `text` is repeated as is in messages.
void parse_tokens(const std::string& text, std::array<std::int64_t, 5>& tokens) {
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
      throw UsageError("--tokens \"{}\": want GROUP=COUNT pairs like query=192,key=192,value=192,proj=192,ffn=768",
                       text);
    }
    const std::string name = item.substr(0, equals);
    bool known = false;
    std::vector<std::string> names;
    for (const TokenGroup group : kTokenGroups) {
      names.emplace_back(name_of(group));
      if (name != name_of(group)) continue;
      tokens[static_cast<std::size_t>(group)] = count;
      known = true;
    }
    if (!known) throw UsageError("--tokens: '{}' is no layer group{}", name, did_you_mean(name, names));
  }
}

}  // namespace

int main(int argc, char** argv) {
  ExpandRequest request;
  std::string tokens, rule = "zero-key";
  std::int64_t seed = 1, threads = 0;
  const JobInfo info{
      .name = "tf_expand",
      .description =
          "Writes a larger checkpoint: more parameter tokens in the layer groups named, old ones untouched. A probe "
          "batch "
          "runs before and after; zero-key growth that changes the logits by more than the bound is refused. Optimizer "
          "moments and ages of old rows are kept, and a growth record is added. Any number of ranks gives the same "
          "file "
          "content.",
      .options = {{"checkpoint", "FILE", &request.checkpoint, "the checkpoint to grow", Need::required},
                  {"output", "FILE", &request.output, "the grown checkpoint; must not exist", Need::required},
                  {"tokens", "GROUP=COUNT,...", &tokens,
                   "parameter tokens a layer after growth, for query, key, value, "
                   "proj, ffn",
                   Need::required},
                  {"rule", "NAME", &rule, "zero-key (exact), public, random-key-zero-value or mirror"},
                  {"seed", "N", &seed, "of the new rows"},
                  {"noise", "SIGMA", &request.noise, "noise on old rows, as a fraction of each row's root mean square"},
                  {"max-change", "X", &request.max_change,
                   "bound of the probe for zero-key; 0: 1e-5 in f32, 1e-12 in f64"},
                  {"probe", "N", &request.probe_sequences, "sequences of the probe batch"},
                  {"threads", "N", &threads, "OpenMP threads a rank; 0: cores / ranks on the node"}},
      .examples = {"tf_expand --checkpoint run/step_00000400.h5 --output grown.h5 --tokens "
                   "query=192,key=192,value=192,proj=192,ffn=768",
                   "mpirun -n 2 tf_expand --checkpoint a.h5 --output b.h5 --tokens ffn=1024 --rule mirror"},
      .world_options = {},
  };
  return run_mpi_job(argc, argv, info, [&](Communicator& world) {
    kernels::start_cpu_runtime(threads_per_rank(world, threads));
    if (seed < 0) throw UsageError("--seed {}: want 0 or more", seed);
    if (request.probe_sequences < 1) throw UsageError("--probe {}: want at least 1", request.probe_sequences);
    request.seed = static_cast<std::uint64_t>(seed);
    request.rule = growth_rule_from_name(rule);
    parse_tokens(tokens, request.tokens);
    const ExpandResult result = expand_checkpoint(world, request);
    if (world.rank() != 0) return ExitCode::done;
    for (const TokenGroup group : kTokenGroups) {
      const auto g = static_cast<std::size_t>(group);
      std::printf("%-6s %6lld -> %6lld tokens a layer\n", std::string(name_of(group)).c_str(),
                  static_cast<long long>(result.tokens_before[g]), static_cast<long long>(result.tokens_after[g]));
    }
    std::printf("parameters %lld -> %lld\n", static_cast<long long>(result.parameters_before),
                static_cast<long long>(result.parameters_after));
    std::printf("probe: max|change of logits| / max|logits| = %.3g (rule %s)\n", result.probe_change, rule.c_str());
    std::printf("wrote %s\n", request.output.c_str());
    return ExitCode::done;
  });
}
