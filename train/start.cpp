#include "train/start.h"

#include <cstdlib>
#include <filesystem>
#include <functional>

#include "checkpoint/agreement.h"
#include "checkpoint/folder.h"
#include "core/log.h"
#include "core/version.h"
#include "storage/digest.h"

namespace tforge {

namespace {

/// Lines of rank 0, on every rank.
std::vector<std::string> lines_of_rank_0(Communicator& world, const std::function<std::string()>& text) {
  const std::string all = together(world, [&] { return world.rank() == 0 ? text() : std::string(); })[0];
  std::vector<std::string> lines;
  for (std::size_t begin = 0; begin < all.size();) {
    const std::size_t end = std::min(all.find('\n', begin), all.size());
    lines.push_back(all.substr(begin, end - begin));
    begin = end + 1;
  }
  return lines;
}

/// The checkpoints of run.dir, newest first.
std::vector<std::string> checkpoints_of_run(Communicator& world, const RunSettings& run) {
  return lines_of_rank_0(world, [&] {
    std::string text;
    const std::vector<CheckpointFile> files = checkpoint_files(run.dir);
    if (run.resume == "never" && !files.empty()) {
      throw ConfigError(
          "run.dir = \"{}\" holds {} already, and run.resume is \"never\"; choose another run.dir or "
          "run.resume = \"auto\"",
          run.dir, files.back().path);
    }
    for (const CheckpointFile& file : files) text = file.path + "\n" + text;
    return text;
  });
}

/// Opens a checkpoint, whole or as far damaged as the request allows. Throws CheckpointError for any other.
CheckpointReader open_verified(Communicator& world, const std::string& path, CheckpointReader::Salvage salvage) {
  try {
    CheckpointReader reader = CheckpointReader::open(world, path);
    reader.verify_rows(world);
    return reader;
  } catch (const CheckpointError&) {
    if (salvage == CheckpointReader::Salvage::nothing) throw;
  }
  CheckpointReader reader = CheckpointReader::open(world, path, salvage);
  reader.verify_rows(world);
  if (world.rank() == 0) {
    for (const std::string& tensor : reader.damaged()) {
      log::warning("SALVAGE of {}: {} is damaged; the moments of this parameter begin anew", path, tensor);
    }
  }
  return reader;
}

/// Fills in where `start` goes on from; nothing for a new model.
void choose_checkpoint(Communicator& world, const RunRequest& request, Start& start) {
  const RunSettings& run = request.asked.config.run;
  const auto take = [&](const std::string& path) {
    start.reader = open_verified(world, path, request.salvage);
    start.path = path;
  };
  if (run.resume != "auto" && run.resume != "never") return take(run.resume);
  const std::vector<std::string> candidates = checkpoints_of_run(world, run);
  for (const std::string& path : candidates) {
    try {
      return take(path);
    } catch (const CheckpointError& error) {
      start.damaged.push_back({path, error.what()});
    } catch (const DataError& error) {
      throw DataError(
          "{}; nothing was trained: mend that, or move the checkpoint and its manifest away to go on from an older one",
          error.what());
    }
  }
  if (!start.damaged.empty()) {
    std::string all;
    for (const DamagedCheckpoint& d : start.damaged) all += d.what + "; ";
    throw CheckpointError(
        "{}no checkpoint of run.dir = \"{}\" is whole, and nothing was trained; mend or move them, or choose another "
        "run.dir",
        all, run.dir);
  }
  if (request.init) take(*request.init);
}

}  // namespace

Start prepare_start(Communicator& world, const RunRequest& request, const TokenDataset& dataset) {
  Start start;
  choose_checkpoint(world, request, start);
  const std::string& path = start.path;
  if (!start.reader) {
    start.config = request.asked.config;
    adopt_vocab(start.config, dataset.vocab(), dataset.path());
  } else {
    const RunConfig before = stored_config(*start.reader);
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
    if (world.rank() == 0) {
      for (const DamagedCheckpoint& d : start.damaged) log::warning("DAMAGED CHECKPOINT: {}", d.what);
      if (!start.damaged.empty()) {
        log::warning("goes on from the OLDER {} (step {}); the steps after it are trained again", path,
                     start.reader->info().step);
      }
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
  return start.reader && start.reader->damaged().empty() && start.reader->info().retention == Retention::stage_end &&
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

void recover_folder(const std::string& folder) {
  try {
    for (const std::string& path : recover_commits(folder)) {
      log::info("{}: its save was cut short when all was written, and is complete now", path);
    }
  } catch (const Error& error) {
    log::warning("what a killed save left stays: {}", error.what());
  }
}

StartRecord prepare_folder(const Start& start) {
  const std::string& folder = start.config.run.dir;
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) throw ResourceError("cannot make run.dir = \"{}\": {}", folder, error.message());
  try {
    for (const std::string& left : remove_temporaries(folder)) log::info("removed {}, left by a killed save", left);
    for (const DamagedCheckpoint& damaged : start.damaged) {
      log::warning("{} is kept as {}", damaged.path, set_aside(damaged.path));
    }
  } catch (const Error& refused) {
    log::warning("a file stays where it is: {}", refused.what());
  }
  const std::int64_t step = start.reader ? start.reader->info().step : 0;
  const std::string fingerprint = digest128(to_toml(start.config) + version_text());
  const StartRecord record = StartRecord::count(folder, step, fingerprint, start.config.run.max_restarts);
  if (const char* restarts = std::getenv("SLURM_RESTART_COUNT")) log::info("restart {} of this SLURM job", restarts);
  if (record.starts() > 1) log::info("start {} of the run from step {}", record.starts(), step);
  return record;
}

}  // namespace tforge
