#pragma once
// What a run is between two steps, and its way into and out of a checkpoint: parameters, moments, ages, counters.
#include <cstdint>
#include <string>
#include <vector>

#include "checkpoint/reader.h"
#include "checkpoint/writer.h"
#include "data/tokenizer.h"
#include "model/language_model.h"
#include "parallel/mesh.h"
#include "train/config.h"
#include "train/optimizer.h"

namespace tforge {

/// The counters of a run. All ranks hold the same.
struct RunState {
  std::int64_t step = 0;             // updates done or skipped
  std::int64_t tokens = 0;           // training tokens seen
  std::int64_t samples = 0;          // samples drawn: the sampler's position
  std::int64_t schedule_start = 0;   // step at which the learning-rate schedule began
  std::int64_t skipped_steps = 0;    // updates skipped for non-finite numbers, in all
  std::int64_t growths_applied = 0;  // growth records whose start-of-stage actions have happened
  std::string dataset_fingerprint;
  std::string salvaged;  // what was given up when the run went on from a damaged checkpoint; empty: never
};

/// The number of the stage under way: 0 at birth, one more with each growth.
std::int64_t stage_of(const std::vector<GrowthRecord>& history);

/// The dataset's tokenizer, as a checkpoint stores it.
StoredTokenizer stored(const Tokenizer& tokenizer);
/// Throws CheckpointError when the stored tokenizer is not what its fingerprint says.
Tokenizer restored(const StoredTokenizer& tokenizer, const std::string& checkpoint_path);

/// Everything that save() needs beside the tensors.
struct SaveInfo {
  RunConfig config;
  StoredTokenizer tokenizer;
  std::vector<GrowthRecord> history;
  std::string parent_uuid;
  Retention retention = Retention::rolling;
};

/// The contents of a checkpoint: every rank names the rows that it owns, and the first of the ranks that hold the same
/// names what they share. The tensors' memory is that of model and optimizer.
CheckpointContents contents_of(const LanguageModel& model, const AdamW& optimizer, const RunState& state,
                               const SaveInfo& info, const Mesh& mesh);

/// The configuration in a checkpoint. Throws ConfigError when it is none, CheckpointError when its model has not as
/// many numbers as the tensors hold: whoever takes memory by the configuration takes no more than the file is worth.
RunConfig stored_config(const CheckpointReader& reader);
/// Throws CheckpointError for counters that no run can have.
RunState load_state(const CheckpointReader& reader);
/// Fills this rank's rows of the parameters, and the numbers and permutations of the model's state. Throws
/// CheckpointError when the checkpoint's tensors are not those of the model, DataError for a permutation that is none.
void load_parameters(const CheckpointReader& reader, LanguageModel& model);
/// Fills the moments that this rank owns, and all ages. A parameter with damaged() moments begins with none: zero, at
/// age 0.
void load_optimizer(const CheckpointReader& reader, const LanguageModel& model, AdamW& optimizer);

/// By axis of the model's kind, the rows that the ranks which wrote the checkpoint owned: what "append" keeps in place.
std::vector<ShardBorders> stored_borders(const CheckpointReader& reader);

/// The ages of a parameter of `rows` rows. Throws CheckpointError for anything but its segments.
std::vector<AgeSegment> stored_ages(const CheckpointReader& reader, const std::string& parameter, std::int64_t rows);

}  // namespace tforge
