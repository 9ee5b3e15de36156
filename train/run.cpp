#include "train/run.h"

#include <chrono>
#include <thread>

#include "checkpoint/agreement.h"
#include "core/log.h"
#include "core/version.h"
#include "kernels/gemm.h"
#include "train/algorithm_record.h"
#include "train/journal.h"
#include "train/layout_price.h"
#include "train/saver.h"
#include "train/start.h"
#include "train/step_report.h"
#include "train/stop_polls.h"
#include "train/threads.h"
#include "train/workplace.h"

namespace tforge {

namespace {

using Clock = std::chrono::steady_clock;

/// Of the last state of a run, run.save_retry_s apart, before the run ends without it.
constexpr int kLastTries = 10;
constexpr std::chrono::milliseconds kMoment{20};

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

/// What was sent over both axes of the mesh after `before`.
Communicator::Traffic traffic_since(const Communicator::Traffic& before, const Mesh& mesh) {
  const Communicator::Traffic a = mesh.dp_comm->traffic(), b = mesh.tp_comm->traffic();
  return {a.calls + b.calls - before.calls, a.bytes + b.bytes - before.bytes, a.seconds + b.seconds - before.seconds,
          a.exposed_seconds + b.exposed_seconds - before.exposed_seconds};
}

std::string peaks_text(const MemoryReport& memory) {
  std::string text;
  for (int i = 0; i < kPurposes; ++i) {
    text += fmt::format("{} {:.1f}, ", name_of(static_cast<Purpose>(i)),
                        static_cast<double>(memory.peak[static_cast<std::size_t>(i)]) / (1 << 20));
  }
  return text + fmt::format("all {:.1f}", static_cast<double>(memory.total_peak) / (1 << 20));
}

}  // namespace

ExitCode run_training(Communicator& world, const RunRequest& request) {
  const Clock::time_point begun = Clock::now();
  set_phase("start");
  const int threads = threads_per_rank(world, request.asked.config.run.threads);
  kernels::start_cpu_runtime(threads);
  const TokenDataset dataset(request.asked.config.data.path);
  if (world.rank() == 0) recover_folder(request.asked.config.run.dir);
  Start start = prepare_start(world, request, dataset);
  const RunConfig config = start.config;
  const TrainConfig& train = config.train;
  if (nothing_left(start)) {
    log::info("{} is the end of the run: nothing is left to do", start.path);
    return ExitCode::done;
  }
  Workplace workplace(world, config);
  Mesh mesh =
      Mesh::create(workplace.world(), static_cast<int>(config.parallel.dp), static_cast<int>(config.parallel.tp));
  // A layout that cannot be is no start of the run.
  deal_sequences(config, mesh.dp);
  plan_shards(config, mesh.tp, start.reader ? &*start.reader : nullptr);
  std::optional<StartRecord> record;  // of rank 0
  together(world, [&] {
    if (world.rank() == 0) record = prepare_folder(start);
    return std::string();
  });
  const std::unique_ptr<Trainer> trainer = make_trainer(start, dataset, mesh, workplace.memory(), workplace.stream());
  Journal journal(world, *trainer);
  Saver saver(world, *trainer, journal, workplace.host_memory());
  StepReport report(world);
  AlgorithmRecord algorithms(workplace.world(), config, workplace.libraries(), trainer->state().step > 0);
  const TimeLimit limit(begun, train.max_time);
  StopPolls polls(world, limit);
  log::info("{}", version_text());
  log::info("{} parameters, {} ranks as dp {} x tp {}, {} threads a rank, {} tokens a step", config.model.parameters(),
            world.size(), mesh.dp, mesh.tp, threads, train.batch * config.seq());
  if (config.run.deterministic == Determinism::layout_independent) {
    log::info("{}", layout_price_text(config, mesh.dp, mesh.tp));
  }

  // As many windows at a time as sequences in training: evaluation takes no more memory.
  const EvalOptions eval_options{0, config.model.max_seq, micro_batch(config, deal_sequences(config, mesh.dp).count(0)),
                                 train.eval_tokens, [&] { polls.in_evaluation(); }};
  const auto evaluate = [&] { journal.evaluation(*trainer, trainer->evaluate(Split::validation, eval_options)); };
  const RunState& state = trainer->state();
  const Saver::Rows rolling_rows = config.run.save == SaveMode::async ? Saver::Rows::copied : Saver::Rows::in_place;
  const auto due = [&](std::int64_t every) { return every > 0 && state.step % every == 0; };

  StopState asked;
  StopDecision decision = StopDecision::go_on;
  double step_seconds = 0, compute_seconds = 0;
  // All hear what each has to say, and go on with the save under way.
  const auto hear = [&] {
    const auto reports =
        report.exchange({seconds_since(begun), limit.state(), saver.part(), step_seconds, compute_seconds});
    saver.advance(reports);
    polls.expect({slowest_step(reports), saver.estimated_seconds()});
    asked = agreed_stop(reports);
    return reports;
  };
  const auto agree = [&] {
    const auto reports = hear();
    decision = decide_after_step(asked, polls.costs());
    return reports;
  };
  const auto finish_save = [&] {
    for (; saver.under_way(); hear()) saver.wait();
  };
  std::int64_t bad_steps = 0;  // in a row
  bool evaluated = false;
  const auto turn = [&] {
    const Clock::time_point before = Clock::now();
    const Communicator::Traffic traffic = traffic_since({}, mesh);
    const double polled = world.traffic().exposed_seconds;
    const StepResult result = trainer->step([&](double left) { polls.in_step(left); });
    step_seconds = seconds_since(before);
    algorithms.settle();
    const Communicator::Traffic sent = traffic_since(traffic, mesh);
    compute_seconds = step_seconds - sent.exposed_seconds - (world.traffic().exposed_seconds - polled);
    const auto reports = agree();
    journal.step(*trainer, result, step_seconds, sent, reports);
    bad_steps = result.update == Update::skipped ? bad_steps + 1 : 0;
    if (bad_steps >= train.max_bad_steps) {
      finish_save();
      throw DivergedError(
          "{} updates in a row up to step {} had a non-finite loss or gradient; the last checkpoint in {} "
          "is from before them: lower train.lr or train.clip and resume",
          bad_steps, state.step, config.run.dir);
    }
    if (decision != StopDecision::go_on) return;
    evaluated = due(train.eval_every);
    if (evaluated) evaluate();
    // While updates are being skipped the last good checkpoint stays the last.
    if (bad_steps > 0 || finished(train, state) || !(due(config.run.save_every) || saver.retry_due())) return;
    // One save at a time. Who is asked to stop decides at the end of the next step what can still be saved.
    for (; saver.under_way() && asked.level == StopLevel::none; hear()) saver.wait();
    if (saver.under_way()) return;
    saver.begin(Retention::rolling, rolling_rows);
    if (rolling_rows == Saver::Rows::in_place) finish_save();
  };
  try {
    while (!finished(train, state) && decision == StopDecision::go_on) turn();
  } catch (const GivenUp&) {
    agree();
    if (decision == StopDecision::go_on) decision = StopDecision::save_and_stop;
  }
  const bool at_end = finished(train, state);
  const std::string reason = reason_of(asked, polls.costs());
  for (; saver.under_way() && (decision != StopDecision::stop || asked.hard_seconds_left > 0); hear()) saver.wait();
  // That may have taken longer than was expected.
  if (asked.hard_seconds_left < saver.estimated_seconds()) decision = StopDecision::stop;
  if (saver.saved_step() == state.step && decision == StopDecision::stop) decision = StopDecision::save_and_stop;
  for (int tries = 1; bad_steps == 0 && decision != StopDecision::stop && saver.saved_step() != state.step; ++tries) {
    saver.begin(at_end ? Retention::stage_end : Retention::rolling, Saver::Rows::in_place);
    finish_save();
    if (saver.saved_step() == state.step) break;
    if (tries == kLastTries) {
      throw ResourceError("step {}, the last of the run, could not be saved in {} tries: {}", state.step, tries,
                          saver.failure());
    }
    for (; !saver.retry_due() && decision != StopDecision::stop; hear()) {
      std::this_thread::sleep_for(kMoment);
      if (asked.hard_seconds_left < saver.estimated_seconds()) decision = StopDecision::stop;
    }
  }
  if (at_end && decision == StopDecision::go_on && !evaluated && train.eval_every > 0) {
    try {
      evaluate();
    } catch (const GivenUp&) {
      log::info("the last evaluation was given up");
    }
  }
  journal.clear();
  log::info("peak tensor memory, MiB: {}", peaks_text(workplace.memory().report()));
  if (at_end && decision != StopDecision::stop) {
    if (record) record->remove();
    return ExitCode::done;
  }
  // Preemption is nobody's fault.
  if (record && asked.level != StopLevel::none) record->forgive();
  log::info("{}: stopped at step {} of {}{}; run again to go on", reason, state.step, train.steps,
            decision == StopDecision::stop ? ", without a save, for which the time is too short" : "");
  return ExitCode::requeue;
}

}  // namespace tforge
