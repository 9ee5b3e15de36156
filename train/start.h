#pragma once
// What a run is and where it goes on from.
#include <memory>
#include <optional>
#include <string>

#include "checkpoint/reader.h"
#include "core/allocator.h"
#include "data/token_dataset.h"
#include "parallel/mesh.h"
#include "train/config.h"
#include "train/run.h"
#include "train/starts.h"
#include "train/trainer.h"

namespace tforge {

/// A newer checkpoint that the run cannot go on from.
struct DamagedCheckpoint {
  std::string path;
  std::string what;  // one line, with the path
};

struct Start {
  RunConfig config;                        // of the run: what was asked, with the checkpoint's model
  std::string path;                        // of the checkpoint; empty for a new model
  std::optional<CheckpointReader> reader;  // open until the trainer has what it needs
  std::vector<DamagedCheckpoint> damaged;  // newest first
};

/// Chooses the checkpoint that run.resume, run.dir and --init stand for (of run.dir the newest that is whole), and
/// checks that configuration, checkpoint and dataset belong together. Every byte of the checkpoint is verified, the
/// ranks sharing the work; those of the dataset are not, which would cost a pass over all of it at each start: its head
/// says which dataset it is, and a token outside the vocabulary is found when it is read (`tf_inspect --verify` reads
/// it all). Writes nothing. Throws ConfigError, DataError, CheckpointError (also when run.dir has checkpoints and none
/// is whole). Collective.
Start prepare_start(Communicator& world, const RunRequest& request, const TokenDataset& dataset);

/// Whether train.steps or train.max_tokens is reached.
bool finished(const TrainConfig& train, const RunState& state);

/// Whether the run goes on from its own last checkpoint. Saving that again would give it a new identity, which no
/// checkpoint grown from it knows.
bool nothing_left(const Start& start);

/// The model as `start` says it begins; closes start.reader. Collective.
std::unique_ptr<Trainer> make_trainer(Start& start, const TokenDataset& dataset, Mesh& mesh, Allocator& allocator,
                                      Stream& stream);

/// Ends the commits that a killed save left in run.dir. For one rank, before prepare_start().
void recover_folder(const std::string& folder);

/// Makes run.dir where it is missing, removes what a killed save left in it, sets damaged checkpoints aside, and counts
/// this start of the run. For one rank. Throws ResourceError when there can be no folder, CrashLoopError.
StartRecord prepare_folder(const Start& start);

}  // namespace tforge
