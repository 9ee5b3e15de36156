#include "train/run.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <limits>

#include "checkpoint/folder.h"
#include "core/log.h"
#include "core/version.h"
#include "kernels/gemm.h"
#include "model/activation_memory.h"
#include "train/communication_model.h"
#include "train/metrics.h"
#include "train/progress.h"
#include "train/trainer.h"

namespace tforge {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

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

struct Start {
  RunConfig config;
  std::string path;  // of the checkpoint; empty for a new model
  std::optional<CheckpointReader> reader;
};

bool finished(const TrainConfig& train, const RunState& state) {
  return state.step >= train.steps || (train.max_tokens > 0 && state.tokens >= train.max_tokens);
}

/// Whether the run goes on from its own last checkpoint. Saving that again would give it a new identity, which no
/// checkpoint grown from it knows.
bool nothing_left(const Start& start) {
  return start.reader && start.reader->info().retention == Retention::stage_end &&
         start.path == start.config.run.dir + "/" + checkpoint_name(start.reader->info().step) &&
         finished(start.config.train, load_state(*start.reader));
}

/// Decides what the run is and checks that configuration, checkpoint and dataset belong together.
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

std::string memory_text(const RunConfig& config, const ShardPlan& plan, const Mesh& mesh) {
  std::string text =
      "memory per rank, MiB (tp rank: weights + gradients + moments + activations and workspace of a micro-batch)\n";
  const auto mib = [](double bytes) { return bytes / (1 << 20); };
  const double size = static_cast<double>(size_of(config.train.dtype));
  const std::int64_t micro = micro_batch(config, deal_sequences(config, mesh.dp).count(0));
  for (int r = 0; r < mesh.tp; ++r) {
    std::int64_t held = plan.vocab.count(r) * config.model.dim + 2 * config.model.dim;
    for (const ShardBorders& borders : plan.tokens)
      held += config.model.layers * borders.count(r) * 2 * config.model.dim;
    const double weights = static_cast<double>(held) * size;
    // With ZeRO-1 those of the rank of dp that owns most.
    double moments = 2 * weights;
    if (config.parallel.zero == 1) {
      std::vector<std::int64_t> owned(static_cast<std::size_t>(mesh.dp), 0);
      const FlatLayout layout = flat_layout(TokenFormer::specs(config.model, plan), r);
      for (const Bucket& bucket : layout.buckets(config.train.dtype, bucket_bytes(config), mesh.dp)) {
        for (int dp = 0; dp < mesh.dp; ++dp) owned[static_cast<std::size_t>(dp)] += bucket.elements(dp);
      }
      moments = 2 * static_cast<double>(std::ranges::max(owned)) * size;
    }
    double activations = static_cast<double>(
        activation_bytes(config.model, plan, r, config.train.dtype, config.train.saves, micro, config.seq()));
    if (separate_lookup(config, mesh.dp, plan.vocab.count(r))) {
      activations +=
          static_cast<double>(LookupSync::bytes(lookup_rows(config, mesh.dp), config.model.dim, config.train.dtype));
    }
    text += fmt::format("  {}: {:.1f} + {:.1f} + {:.1f} + {:.1f} = {:.1f}\n", r, mib(weights), mib(weights),
                        mib(moments), mib(activations), mib(2 * weights + moments + activations));
  }
  return text;
}

/// What rank 0 keeps for people and programs to follow the run.
class Journal {
 public:
  Journal(const RunConfig& config, std::int64_t first_step)
      : metrics_(config.run.dir + "/metrics.jsonl", first_step > 0 ? first_step : -1),
        progress_(stderr, style_for(stderr), first_step, config.train.steps, config.run.log_every) {}

  MetricsWriter& metrics() { return metrics_; }
  Progress& progress() { return progress_; }

 private:
  MetricsWriter metrics_;
  Progress progress_;
};

}  // namespace

int threads_per_rank(Communicator& world, std::int64_t configured) {
  std::array<char, 256> host{};
  if (::gethostname(host.data(), host.size() - 1) != 0) host[0] = '?';
  const std::vector<std::string> hosts = world.all_gather_bytes(host.data());
  if (configured > 0) return static_cast<int>(configured);
  cpu_set_t set;
  CPU_ZERO(&set);
  const int cores = ::sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
  const auto neighbours =
      std::max<std::ptrdiff_t>(std::ranges::count(hosts, hosts[static_cast<std::size_t>(world.rank())]), 1);
  return std::max(1, cores / static_cast<int>(neighbours));
}

std::string plan_text(Communicator& world, const RunRequest& request) {
  // The kernels' workspace depends on the threads.
  kernels::start_cpu_runtime(threads_per_rank(world, request.asked.config.run.threads));
  const TokenDataset dataset(request.asked.config.data.path);
  const Start start = prepare_start(world, request, dataset);
  const RunConfig& config = start.config;
  const Mesh mesh = Mesh::create(world, static_cast<int>(config.parallel.dp), static_cast<int>(config.parallel.tp));
  const ShardPlan plan = plan_shards(config, mesh.tp, start.reader ? &*start.reader : nullptr);
  std::string text = to_toml(config);
  text += fmt::format("\nparameters         {}\n", config.model.parameters());
  text += fmt::format("ranks              dp {} x tp {}\n", mesh.dp, mesh.tp);
  text += fmt::format("tokens per step    {}\n", config.train.batch * config.seq());
  text +=
      fmt::format("FLOPs per token    {:.4g} forward, {:.4g} training\n",
                  config.model.forward_flops_per_token(config.seq()), config.model.train_flops_per_token(config.seq()));
  text += fmt::format("FLOPs per step     {:.4g}\n", config.model.train_flops_per_token(config.seq()) *
                                                         static_cast<double>(config.train.batch * config.seq()));
  const std::vector<Bucket> buckets =
      flat_layout(TokenFormer::specs(config.model, plan), 0).buckets(config.train.dtype, bucket_bytes(config), mesh.dp);
  text += "communication of a step, what rank 0 hands over\n";
  text += communication_text(step_exchanges(config, plan, buckets, {.dp = mesh.dp, .tp = mesh.tp}));
  return text + memory_text(config, plan, mesh);
}

ExitCode run_training(Communicator& world, const RunRequest& request) {
  const Clock::time_point begun = Clock::now();
  set_phase("start");
  const int threads = threads_per_rank(world, request.asked.config.run.threads);
  kernels::start_cpu_runtime(threads);
  const TokenDataset dataset(request.asked.config.data.path);
  Start start = prepare_start(world, request, dataset);
  const RunConfig config = start.config;
  if (nothing_left(start)) {
    log::info("{} is the end of the run: nothing is left to do", start.path);
    return ExitCode::done;
  }
  Mesh mesh = Mesh::create(world, static_cast<int>(config.parallel.dp), static_cast<int>(config.parallel.tp));
  Allocator allocator;
  Stream stream;
  std::optional<Trainer> trainer;
  if (start.reader) {
    trainer.emplace(config, dataset, mesh, allocator, stream, *start.reader);
    if (load_state(*start.reader).dataset_fingerprint != dataset.fingerprint()) {
      log::warning("{} is another dataset than before; its samples begin anew", dataset.path());
      trainer->restart_samples();
    }
    start.reader.reset();
  } else {
    trainer.emplace(config, dataset, mesh, allocator, stream);
  }

  std::optional<Journal> journal;
  if (world.rank() == 0) {
    std::error_code error;
    std::filesystem::create_directories(config.run.dir, error);
    if (error) throw ResourceError("cannot make run.dir = \"{}\": {}", config.run.dir, error.message());
    for (const std::string& left : remove_temporaries(config.run.dir))
      log::info("removed {}, left by a killed save", left);
    journal.emplace(config, trainer->state().step);
  }
  log::info("{}", version_text());
  log::info("{} parameters, {} ranks as dp {} x tp {}, {} threads a rank, {} tokens a step", config.model.parameters(),
            world.size(), mesh.dp, mesh.tp, threads, config.train.batch * config.seq());

  // As many windows at a time as sequences in training: evaluation takes no more memory.
  const EvalOptions eval_options{0, config.model.max_seq, micro_batch(config, deal_sequences(config, mesh.dp).count(0)),
                                 config.train.eval_tokens};
  const auto evaluate = [&] {
    const EvalResult result = trainer->evaluate(Split::validation, eval_options);
    if (!journal) return;
    journal->progress().clear();
    log::info("step {}: validation loss {:.4f}, perplexity {:.2f}", trainer->state().step, result.nll(),
              result.token_perplexity());
    journal->metrics().write({{"step", trainer->state().step},
                              {"tokens", trainer->state().tokens},
                              {"eval_loss", result.nll()},
                              {"eval_perplexity", result.token_perplexity()},
                              {"stage", stage_of(trainer->history())}});
  };
  std::int64_t saved_step = -1;
  const auto save = [&](Retention retention) {
    if (saved_step == trainer->state().step) return;
    saved_step = trainer->state().step;
    const Clock::time_point before = Clock::now();
    const std::string path = config.run.dir + "/" + checkpoint_name(trainer->state().step);
    const CheckpointInfo info = trainer->save(world, path, retention);
    if (!journal) return;
    for (const std::string& gone : prune_checkpoints(config.run.dir, static_cast<int>(config.run.keep_last))) {
      log::debug("removed {}", gone);
    }
    journal->progress().clear();
    log::info("saved {} ({:.1f} MB in {:.2f} s)", path, static_cast<double>(info.file_bytes) / 1e6,
              seconds_since(before));
  };

  std::int64_t bad_steps = 0;
  Communicator::Traffic traffic = world.traffic();
  const auto comm_traffic = [&] {
    const Communicator::Traffic a = mesh.dp_comm->traffic(), b = mesh.tp_comm->traffic();
    return Communicator::Traffic{a.calls + b.calls, a.bytes + b.bytes, a.seconds + b.seconds,
                                 a.exposed_seconds + b.exposed_seconds};
  };
  traffic = comm_traffic();
  bool evaluated = false;
  const auto at_end = [&] { return finished(config.train, trainer->state()); };
  bool out_of_time = false;
  while (!at_end() && !out_of_time) {
    const Clock::time_point before = Clock::now();
    const StepResult result = trainer->step();
    const double seconds = seconds_since(before);
    evaluated = false;
    const RunState& state = trainer->state();
    bad_steps = result.update == Update::skipped ? bad_steps + 1 : 0;
    const Communicator::Traffic now = comm_traffic();
    const std::int64_t step_tokens = config.train.batch * config.seq();
    if (journal) {
      journal->metrics().write({{"step", state.step},
                                {"tokens", state.tokens},
                                {"loss", result.loss},
                                {"lr", result.lr},
                                {"grad_norm", result.grad_norm},
                                {"tokens_per_second", static_cast<double>(step_tokens) / seconds},
                                {"step_seconds", seconds},
                                {"data_wait_seconds", result.data_wait_seconds},
                                {"communication_seconds", now.seconds - traffic.seconds},
                                {"communication_exposed_seconds", now.exposed_seconds - traffic.exposed_seconds},
                                {"communication_bytes", static_cast<std::int64_t>(now.bytes - traffic.bytes)},
                                {"floored_rows", trainer->take_floored_rows()},
                                {"skipped_steps", state.skipped_steps},
                                {"stage", stage_of(trainer->history())}});
      journal->progress().update(state.step, step_tokens, result.loss);
      if (result.update == Update::skipped) {
        log::warning("step {}: loss {} and gradient norm {} are not both finite; the update was skipped", state.step,
                     result.loss, result.grad_norm);
      }
    }
    traffic = now;
    if (bad_steps >= config.train.max_bad_steps) {
      throw DivergedError(
          "{} updates in a row up to step {} had a non-finite loss or gradient; the last checkpoint in {} "
          "is from before them: lower train.lr or train.clip and resume",
          bad_steps, state.step, config.run.dir);
    }
    if (config.train.max_time > 0) {
      // Rank 0's clock decides for all.
      double over = seconds_since(begun) >= config.train.max_time ? 1 : 0;
      world.broadcast(stream, TensorView{&over, DType::f64, Device::cpu, Shape{1}, 1}, 0);
      out_of_time = over > 0;
    }
    if (config.train.eval_every > 0 && state.step % config.train.eval_every == 0) {
      evaluate();
      evaluated = true;
    }
    // While updates are being skipped the last good checkpoint stays the last.
    if (bad_steps == 0 && config.run.save_every > 0 && state.step % config.run.save_every == 0 && !at_end()) {
      save(Retention::rolling);
    }
  }
  if (bad_steps == 0) save(at_end() ? Retention::stage_end : Retention::rolling);
  if (!evaluated && config.train.eval_every > 0) evaluate();
  if (journal) {
    const MemoryReport& memory = allocator.report();
    std::string peaks;
    for (int i = 0; i < kPurposes; ++i) {
      peaks += fmt::format("{} {:.1f}, ", name_of(static_cast<Purpose>(i)),
                           static_cast<double>(memory.peak[static_cast<std::size_t>(i)]) / (1 << 20));
    }
    log::info("peak tensor memory, MiB: {}all {:.1f}", peaks, static_cast<double>(memory.total_peak) / (1 << 20));
  }
  if (out_of_time && !at_end()) {
    log::info("train.max_time is over at step {} of {}; run again to go on", trainer->state().step, config.train.steps);
    return ExitCode::requeue;
  }
  return ExitCode::done;
}

}  // namespace tforge
