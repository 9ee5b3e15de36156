// Trains a model from a configuration, or goes on from a checkpoint.
#include <cstdio>

#include "core/log.h"
#include "jobs/job.h"
#include "train/plan.h"
#include "train/run.h"
#include "train/stop_request.h"

using namespace tforge;

int main(int argc, char** argv) {
  std::string config_path;
  std::vector<std::string> overrides;
  std::optional<std::string> init;
  bool dry_run = false, new_dataset = false, salvage = false, quiet = false;
  std::optional<LoadedConfig> config;
  const JobInfo info{
      .name = "tf_train",
      .description =
          "Trains a model from a TOML configuration on any dp x tp layout of MPI ranks. It resumes from the latest "
          "checkpoint in run.dir by itself, writes checkpoints there and one JSON line a step to metrics.jsonl.",
      .options =
          {{"config", "FILE", &config_path, "configuration (TOML)", Need::required},
           {"set", "KEY=VALUE", &overrides, "overrides a key of the configuration; may be repeated"},
           {"init", "CHECKPOINT", &init, "starts from this checkpoint when run.dir has none yet (after tf_expand)"},
           {"new-dataset", "", &new_dataset, "accepts another dataset than the checkpoint was trained on"},
           {"salvage", "", &salvage,
            "accepts a checkpoint whose moments alone are damaged; those begin anew, and later checkpoints say so"},
           {"dry-run", "", &dry_run, "prints the resolved run, its memory and FLOPs, and writes nothing"},
           {"quiet", "", &quiet, "logs warnings and errors only"}},
      .examples = {"tf_train --config configs/demo.toml --set data.path=data.h5 --set run.dir=run",
                   "mpirun -n 4 tf_train --config configs/demo.toml --set parallel.tp=2",
                   "mpirun -n 2 tf_train --config configs/demo.toml --init grown.h5 --set run.dir=stage2",
                   "srun tf_train --config configs/tokenformer_150m.toml --set train.lr=3e-4"},
      .world_options =
          [&] {
            config = load_config(config_path, overrides);
            catch_stop_signals(config->config.run.grace_s);
            return WorldOptions{.timeout_seconds = config->config.parallel.timeout_s,
                                .heartbeat = config->config.parallel.heartbeat,
                                .expect_ranks = static_cast<int>(config->config.run.expect_ranks)};
          },
  };
  return run_mpi_job(argc, argv, info, [&](Communicator& world) {
    catch_stop_signals(config->config.run.grace_s);  // MPI may have taken them
    if (quiet) log::set_level(log::Level::warning);
    const RunRequest request{*config, init, new_dataset ? DatasetChange::accept : DatasetChange::refuse,
                             salvage ? CheckpointReader::Salvage::moments : CheckpointReader::Salvage::nothing};
    if (dry_run) {
      const std::string text = plan_text(world, request);
      if (world.rank() == 0) std::fputs(text.c_str(), stdout);
      return ExitCode::done;
    }
    return run_training(world, request);
  });
}
