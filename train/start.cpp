#include "train/start.h"

#include <cstdlib>
#include <filesystem>

#include "checkpoint/folder.h"
#include "core/log.h"
#include "core/version.h"
#include "storage/digest.h"

namespace tforge {

namespace {

/// Rank 0's value of a text, on every rank.
std::string from_rank_0(Communicator& world, const std::string& text) {
  return world.all_gather_bytes(world.rank() == 0 ? text : std::string())[0];
}

/// The checkpoint that the run goes on from; empty for a new model.
std::string starting_checkpoint(Communicator& world, const RunRequest& request) {
  const RunSettings& run = request.asked.config.run;
  std::string path;
  if (world.rank() == 0) {
    const auto latest = latest_checkpoint(run.dir);
    if (run.resume == "never") {
      if (latest) {
        throw ConfigError(
            "run.dir = \"{}\" holds {} already, and run.resume is \"never\"; choose another run.dir or "
            "run.resume = \"auto\"",
            run.dir, latest->path);
      }
      path = request.init.value_or("");
    } else if (run.resume == "auto") {
      path = latest ? latest->path : request.init.value_or("");
    } else {
      path = run.resume;
    }
  }
  return from_rank_0(world, path);
}

}  // namespace

Start prepare_start(Communicator& world, const RunRequest& request, const TokenDataset& dataset) {
  Start start;
  const std::string path = start.path = starting_checkpoint(world, request);
  if (path.empty()) {
    start.config = request.asked.config;
    adopt_vocab(start.config, dataset.vocab(), dataset.path());
  } else {
    start.reader = CheckpointReader::open(world, path);
    const RunConfig before = parse_config(start.reader->config(), path).config;
    start.config = resumed(before, request.asked);
    if (start.reader->tokenizer().fingerprint != dataset.tokenizer().fingerprint()) {
      throw DataError("{} was made with another tokenizer than {}; prepare the text again with --tokenizer {}",
                      dataset.path(), path, path);
    }
    const std::string trained_on = load_state(*start.reader).dataset_fingerprint;
    if (trained_on != dataset.fingerprint() && request.dataset == DatasetChange::refuse) {
      throw DataError(
          "{} is not the dataset that {} was trained on (fingerprints {} and {}); --new-dataset goes on with "
          "it from its first sample",
          dataset.path(), path, dataset.fingerprint(), trained_on);
    }
    log::info("goes on from {} (step {})", path, start.reader->info().step);
    for (const std::string& line : diff(before, start.config)) log::info("changed: {}", line);
  }
  start.config.model.validate();
  return start;
}

bool finished(const TrainConfig& train, const RunState& state) {
  return state.step >= train.steps || (train.max_tokens > 0 && state.tokens >= train.max_tokens);
}

bool nothing_left(const Start& start) {
  return start.reader && start.reader->info().retention == Retention::stage_end &&
         start.path == start.config.run.dir + "/" + checkpoint_name(start.reader->info().step) &&
         finished(start.config.train, load_state(*start.reader));
}

std::unique_ptr<Trainer> make_trainer(Start& start, const TokenDataset& dataset, Mesh& mesh, Allocator& allocator,
                                      Stream& stream) {
  if (!start.reader) return std::make_unique<Trainer>(start.config, dataset, mesh, allocator, stream);
  auto trainer = std::make_unique<Trainer>(start.config, dataset, mesh, allocator, stream, *start.reader);
  if (load_state(*start.reader).dataset_fingerprint != dataset.fingerprint()) {
    log::warning("{} is another dataset than before; its samples begin anew", dataset.path());
    trainer->restart_samples();
  }
  start.reader.reset();
  return trainer;
}

StartRecord prepare_folder(const Start& start) {
  const std::string& folder = start.config.run.dir;
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) throw ResourceError("cannot make run.dir = \"{}\": {}", folder, error.message());
  for (const std::string& left : remove_temporaries(folder)) log::info("removed {}, left by a killed save", left);
  const std::int64_t step = start.reader ? start.reader->info().step : 0;
  const std::string fingerprint = digest128(to_toml(start.config) + version_text());
  const StartRecord record = StartRecord::count(folder, step, fingerprint, start.config.run.max_restarts);
  if (const char* restarts = std::getenv("SLURM_RESTART_COUNT")) log::info("restart {} of this SLURM job", restarts);
  if (record.starts() > 1) log::info("start {} of the run from step {}", record.starts(), step);
  return record;
}

}  // namespace tforge
