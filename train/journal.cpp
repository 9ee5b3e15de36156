#include "train/journal.h"

#include "core/log.h"

namespace tforge {

Journal::Files::Files(const RunConfig& config, std::int64_t first_step)
    : metrics(config.run.dir + "/metrics.jsonl", first_step > 0 ? first_step : -1),
      progress(stderr, style_for(stderr), first_step, config.train.steps, config.run.log_every) {}

Journal::Journal(const Communicator& world, const Trainer& trainer) {
  if (world.rank() == 0) files_.emplace(trainer.config(), trainer.state().step);
}

void Journal::step(Trainer& trainer, const StepResult& result, double seconds, const Communicator::Traffic& traffic) {
  if (!files_) return;
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
                         {"floored_rows", trainer.take_floored_rows()},
                         {"skipped_steps", state.skipped_steps},
                         {"stage", stage_of(trainer.history())}});
  files_->progress.update(state.step, tokens, result.loss);
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

void Journal::clear() {
  if (files_) files_->progress.clear();
}

}  // namespace tforge
