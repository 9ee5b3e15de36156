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

struct Start {
  RunConfig config;                        // of the run: what was asked, with the checkpoint's model
  std::string path;                        // of the checkpoint; empty for a new model
  std::optional<CheckpointReader> reader;  // open until the trainer has what it needs
};

/// Chooses the checkpoint that run.resume, run.dir and --init stand for, and checks that configuration, checkpoint and
/// dataset belong together. Writes nothing. Throws ConfigError, DataError, CheckpointError. Collective.
Start prepare_start(Communicator& world, const RunRequest& request, const TokenDataset& dataset);

/// Whether train.steps or train.max_tokens is reached.
bool finished(const TrainConfig& train, const RunState& state);

/// Whether the run goes on from its own last checkpoint. Saving that again would give it a new identity, which no
/// checkpoint grown from it knows.
bool nothing_left(const Start& start);

/// The model as `start` says it begins; closes start.reader. Collective.
std::unique_ptr<Trainer> make_trainer(Start& start, const TokenDataset& dataset, Mesh& mesh, Allocator& allocator,
                                      Stream& stream);

/// Makes run.dir where it is missing, removes what a killed save left in it, and counts this start of the run. For one
/// rank. Throws ResourceError, CrashLoopError.
StartRecord prepare_folder(const Start& start);

}  // namespace tforge
