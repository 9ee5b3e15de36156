#pragma once
// The configuration of a training run. Its keys, types, defaults, limits and descriptions are one table,
// train/config_schema.cpp; everything below is derived from it.
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "autograd/saved.h"
#include "core/device.h"
#include "core/dtype.h"
#include "model/config.h"
#include "parallel/device_world.h"
#include "parallel/grad_sync.h"

namespace tforge {

enum class ScheduleKind : std::uint8_t { cosine, wsd, constant };
/// What the learning-rate schedule does when the model has grown.
enum class GrowthSchedule : std::uint8_t { restart, continues };
/// What happens to the moments and ages of the rows that were there before a growth.
enum class OldMoments : std::uint8_t { keep, reset };
/// How the rows that were there before a growth are updated after it: like new ones; not at all (no update, decay,
/// age or share in the clip norm); with a learning rate of their own.
enum class OldRows : std::uint8_t { train, freeze, rate };
/// What AdamW does with rows of tables that no token of an update hit, whose gradient is 0: what it does with all rows
/// (they decay, and move by what is left of their first moment), or nothing.
enum class IdleRows : std::uint8_t { update, skip };
/// Which tensor-parallel rank owns which parameter tokens (parallel/shard.h).
enum class TokenShards : std::uint8_t { even, append };

/// What gives the same bits: the same layout of ranks, or any (docs/conventions.md).
enum class Determinism : std::uint8_t { same_layout, layout_independent };

struct DataConfig {
  std::string path;
};

struct GrowthConfig {
  GrowthSchedule schedule = GrowthSchedule::restart;
  double restart_peak_fraction = 1.0;
  OldMoments moments = OldMoments::keep;
  OldRows old_rows = OldRows::train;
  double old_rows_rate = 1.0;
  std::int64_t new_rows_warmup_steps = 0;
};

struct TrainConfig {
  std::int64_t seq = 0;  // 0: model.max_seq
  std::int64_t batch = 16;
  std::int64_t micro_batch = 0;  // 0: all sequences of the rank at once
  std::int64_t steps = 1000;
  std::int64_t max_tokens = 0;  // 0: no limit
  double max_time = 0;          // seconds of this process; 0: no limit
  double lr = 6e-4;
  ScheduleKind schedule = ScheduleKind::cosine;
  std::int64_t warmup_steps = 10;
  std::int64_t decay_steps = 0;
  double final_lr_fraction = 0.1;
  double beta1 = 0.9;
  double beta2 = 0.95;
  double eps = 1e-8;
  double weight_decay = 0.1;
  IdleRows idle_rows = IdleRows::update;  // of a memoryformer's tables
  double clip = 1.0;
  std::int64_t eval_every = 100;
  std::int64_t eval_tokens = 65536;
  std::int64_t max_bad_steps = 10;
  std::int64_t seed = 1;
  DType dtype = DType::f32;
  F32Products f32_products = F32Products::exact;
  SavePolicy saves;
  GrowthConfig growth;
};

/// Whether training goes on while a checkpoint is written.
enum class SaveMode : std::uint8_t { async, blocking };

struct RunSettings {
  std::string dir;
  std::string name;
  std::int64_t save_every = 500;
  std::int64_t keep_last = 2;
  SaveMode save = SaveMode::async;
  double save_retry_s = 30;
  std::int64_t log_every = 10;
  std::int64_t threads = 0;       // 0: cores of the affinity mask / ranks on the node
  std::string resume = "auto";    // "auto", "never" or the path of a checkpoint
  std::int64_t expect_ranks = 0;  // 0: only what the launcher says
  Determinism deterministic = Determinism::same_layout;
  Device device = Device::cpu;
  Choosing products = Choosing::rule;
  double grace_s = 30;            // seconds from SIGTERM to SIGKILL
  std::int64_t max_restarts = 3;  // without a new step; 0: any number
};

struct ParallelConfig {
  std::int64_t dp = 0;  // 0: derived from the number of ranks
  std::int64_t tp = 1;  // 0: derived from the number of ranks
  TokenShards token_shards = TokenShards::even;
  Reduction reduction = Reduction::nonblocking;
  double bucket_mb = 4;
  std::int64_t zero = 0;  // 1: ZeRO-1
  std::int64_t virtual_dp = 4, virtual_tp = 4;
  double timeout_s = 600;
  std::string heartbeat = "udp";  // WorldOptions::heartbeat
  DeviceUse share_device = DeviceUse::own;
};

struct RunConfig {
  /// model.vocab = 0 until adopt_vocab() has seen the dataset.
  ModelConfig model = [] {
    ModelConfig m;
    m.vocab = 0;
    return m;
  }();
  DataConfig data;
  TrainConfig train;
  RunSettings run;
  ParallelConfig parallel;

  /// Tokens of a sequence: train.seq, or model.max_seq where that is 0.
  std::int64_t seq() const { return train.seq > 0 ? train.seq : model.max_seq; }
};

/// A configuration and where each key that was given stands ("configs/demo.toml:7:9", "--set train.lr").
struct LoadedConfig {
  RunConfig config;
  std::map<std::string, std::string> given;
};

/// Reads a TOML file, then applies `overrides` ("train.lr=3e-4"; text needs no quotes).
/// Throws ConfigError, with file, line and column where there are such, for: an unreadable file, wrong TOML, an
/// unknown key (with the nearest valid one), a value of the wrong type or out of range, a required key that is
/// missing, and contradictions between keys (ModelConfig::validate, train.seq > model.max_seq, ...).
LoadedConfig load_config(const std::string& path, const std::vector<std::string>& overrides = {});

/// The same from text, for example the one stored in a checkpoint. `source` stands for the file in messages.
LoadedConfig parse_config(std::string_view text, const std::string& source,
                          const std::vector<std::string>& overrides = {});

/// The resolved configuration: TOML with every key. parse_config gives the same RunConfig back, bit for bit.
std::string to_toml(const RunConfig& config);

/// One line "key: old -> new" for each key that differs, in the order of the table.
std::vector<std::string> diff(const RunConfig& before, const RunConfig& after);

/// The configuration of a run that goes on from a checkpoint: `asked`, with the checkpoint's [model].
/// Throws ConfigError naming both values for a key of [model] that was given and contradicts the checkpoint.
/// Layout independence goes on unless run.deterministic is given, and the numbers of its virtual shards like [model].
/// What else changed is diff(stored, result), to be logged and recorded.
RunConfig resumed(const RunConfig& stored, const LoadedConfig& asked);

/// Takes the vocabulary from the dataset. Throws ConfigError naming both when model.vocab is set to another one.
void adopt_vocab(RunConfig& config, std::int64_t dataset_vocab, const std::string& dataset_path);

/// Seconds of "90", "90s", "1h30m", "2d". Throws ConfigError for anything else.
double parse_duration(std::string_view text);

/// A table of all keys in Markdown: key, type, default, description.
std::string config_reference();

}  // namespace tforge
