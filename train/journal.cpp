#include "train/journal.h"

#include "checkpoint/folder.h"
#include "core/log.h"
#include "train/threads.h"

namespace tforge {

namespace {

/// What a rank has to compute in a step, by which ranks with the same share are told from others: sequences times
/// parameters.
double work_of(Trainer& trainer) {
  return static_cast<double>(trainer.sequences()) *
         static_cast<double>(trainer.model().parameters().values().elements());
}

}  // namespace

Journal::Files::Files(const RunConfig& config, std::int64_t first_step, std::vector<double> work)
    : metrics(config.run.dir + "/metrics.jsonl", first_step > 0 ? first_step : -1),
      progress(stderr, style_for(stderr), first_step, config.train.steps, config.run.log_every),
      stragglers(std::move(work)) {}

Journal::Journal(Communicator& world, Trainer& trainer) : hosts_(world.all_gather_bytes(host_name())) {
  std::vector<double> work;
  for (const std::string& text : world.all_gather_bytes(fmt::format("{}", work_of(trainer)))) {
    work.push_back(std::stod(text));
  }
  if (world.rank() == 0) files_.emplace(trainer.config(), trainer.state().step, std::move(work));
}

void Journal::step(const Trainer& trainer, const StepResult& result, double seconds,
                   const Communicator::Traffic& traffic, std::span<const RankReport> reports) {
  if (!files_) return;
  std::vector<double>& compute = files_->compute_seconds;
  compute.clear();
  for (const RankReport& report : reports) compute.push_back(report.compute_seconds);
  const StepSpread spread = spread_of(compute);
  const RunState& state = trainer.state();
  const std::int64_t tokens = trainer.config().train.batch * trainer.config().seq();
  files_->metrics.write({{"step", state.step},
                         {"tokens", state.tokens},
                         {"loss", result.loss},
                         {"lr", result.lr},
                         {"grad_norm", result.grad_norm},
                         {"tokens_per_second", static_cast<double>(tokens) / seconds},
                         {"step_seconds", seconds},
                         {"data_wait_seconds", result.data_wait_seconds},
                         {"communication_seconds", traffic.seconds},
                         {"communication_exposed_seconds", traffic.exposed_seconds},
                         {"communication_bytes", static_cast<std::int64_t>(traffic.bytes)},
                         {"slowest_rank", std::int64_t{spread.slowest_rank}},
                         {"slowest_compute_seconds", spread.slowest_seconds},
                         {"median_compute_seconds", spread.median_seconds},
                         {"floored_rows", result.floored_rows},
                         {"skipped_steps", state.skipped_steps},
                         {"stage", stage_of(trainer.history())}});
  files_->progress.update(state.step, tokens, result.loss);
  if (const auto slow = files_->stragglers.add(compute)) {
    clear();
    log::warning(
        "rank {} ({}) has computed more than {} times as long as ranks with the same share in {} steps in a row; "
        "in step {}: {:.3g} s, the others {:.3g} s",
        slow->rank, hosts_[static_cast<std::size_t>(slow->rank)], Stragglers::kFactor, Stragglers::kSteps, state.step,
        slow->seconds, slow->peers_seconds);
  }
  if (result.update == Update::skipped) {
    log::warning("step {}: loss {} and gradient norm {} are not both finite; the update was skipped", state.step,
                 result.loss, result.grad_norm);
  }
}

void Journal::evaluation(const Trainer& trainer, const EvalResult& result) {
  if (!files_) return;
  const RunState& state = trainer.state();
  clear();
  log::info("step {}: validation loss {:.4f}, perplexity {:.2f}", state.step, result.nll(), result.token_perplexity());
  files_->metrics.write({{"step", state.step},
                         {"tokens", state.tokens},
                         {"eval_loss", result.nll()},
                         {"eval_perplexity", result.token_perplexity()},
                         {"stage", stage_of(trainer.history())}});
}

void Journal::saved(const Trainer& trainer, const CheckpointInfo& info, const SaveTimes& times) {
  if (!files_) return;
  clear();
  log::info("saved {}/{} ({:.1f} MB in {:.2f} s, training waited {:.3f} s)", trainer.config().run.dir,
            checkpoint_name(info.step), static_cast<double>(info.file_bytes) / 1e6, times.total, times.stall);
  files_->metrics.write({{"step", trainer.state().step},
                         {"saved_step", info.step},
                         {"save_bytes", static_cast<std::int64_t>(info.file_bytes)},
                         {"save_seconds", times.total},
                         {"save_stall_seconds", times.stall}});
}

void Journal::clear() {
  if (files_) files_->progress.clear();
}

}  // namespace tforge
