// What a run would take, on any layout, without doing it.
#include <cstdio>

#include "jobs/job.h"
#include "train/plan.h"

using namespace tforge;

namespace {

std::optional<Link> link_of(const std::optional<double>& gbs, const std::optional<double>& us) {
  if (!gbs && !us) return {};
  if (!gbs || !us) throw UsageError("--link-gbs and --link-us belong together");
  if (!(*gbs > 0 && *us > 0)) throw UsageError("--link-gbs {} --link-us {}: want more than 0", *gbs, *us);
  return Link{*gbs * 1e9, *us / 1e6};
}

}  // namespace

int main(int argc, char** argv) {
  std::optional<std::string> config, stages, device;
  std::vector<std::string> overrides;
  std::optional<std::int64_t> ranks;
  std::optional<double> link_gbs, link_us;
  const JobInfo info{
      .name = "tf_plan",
      .description =
          "Says what a training would take, on any dp x tp and in one process: memory of a rank by purpose, FLOPs and "
          "bytes of a step, what the ranks send; with the profile of a device also the time of a step and the model "
          "FLOP utilisation. With a growth plan, the cost of each stage beside training the last model from scratch. "
          "Nothing is computed and nothing is written (docs/planning.md).",
      .options = {{"config", "FILE", &config, "configuration (TOML), as for tf_train"},
                  {"set", "KEY=VALUE", &overrides, "overrides a key of the configuration; may be repeated"},
                  {"stages", "FILE", &stages, "growth plan (TOML), as for slurm/submit_stages, in place of --config"},
                  {"ranks", "N", &ranks, "ranks, from which parallel.dp or parallel.tp = 0 follow; else each is 1"},
                  {"device", "FILE", &device, "profile of a device (TOML), measured by bench/device_bench or typed in"},
                  {"link-gbs", "X", &link_gbs, "link between ranks, GB/s each way, in place of the profile's"},
                  {"link-us", "X", &link_us, "its latency, microseconds a message"}},
      .examples = {"tf_plan --config configs/demo.toml --set model.vocab=4096",
                   "tf_plan --config configs/tokenformer_150m.toml --set parallel.dp=8 --set parallel.tp=4 --device "
                   "cpu.toml --link-gbs 12.5 --link-us 5",
                   "tf_plan --stages configs/stages_demo.toml --device cpu.toml"},
  };
  return run_job(argc, argv, info, [&] {
    if (config.has_value() == stages.has_value()) {
      throw UsageError("give --config or --stages (tf_plan --help lists all)");
    }
    if (stages && (ranks || !overrides.empty())) {
      throw UsageError("--stages takes ranks and settings from the plan: leave out --ranks and --set");
    }
    if (ranks && *ranks < 1) throw UsageError("--ranks {}: want 1 or more", *ranks);
    PlanRequest request{ranks.value_or(0), {}, link_of(link_gbs, link_us)};
    if (device) request.device = load_device_profile(*device);
    const std::string text = stages ? stages_plan_text(*stages, request)
                                    : configuration_plan_text(load_config(*config, overrides).config, request);
    std::fputs(text.c_str(), stdout);
    return ExitCode::done;
  });
}
