#include "train/trainer.h"

#include <cmath>

#include "checkpoint/staging.h"
#include "core/errors.h"
#include "core/log.h"

namespace tforge {

ShardPlan plan_shards(const RunConfig& config, int tp, const CheckpointReader* reader) {
  if (config.run.deterministic == Determinism::layout_independent) {
    return ShardPlan::dealt(config.model, static_cast<int>(config.parallel.virtual_tp), tp);
  }
  if (config.parallel.token_shards == TokenShards::even || reader == nullptr) return ShardPlan::even(config.model, tp);
  return ShardPlan::append(config.model, tp, stored_borders(*reader));
}

namespace {

/// Of the parameters that follow an axis of the plan, as stored before.
std::int64_t moved_bytes(const CheckpointReader& reader, const LanguageModel& model) {
  const std::vector<ShardBorders> old = stored_borders(reader);
  const std::vector<ShardAxis> axes = kind_of(model.config()).axes(model.config());
  std::int64_t elements = 0;
  for (const Parameter& p : model.parameters().all()) {
    if (!p.spec.axis) continue;
    const std::size_t a = *p.spec.axis;
    elements += ShardBorders::moved_rows(old[a], model.plan().units[a]) * axes[a].rows * p.columns();
  }
  return elements * static_cast<std::int64_t>(size_of(model.dtype()));
}

}  // namespace

Trainer::Trainer(const RunConfig& config, const TokenDataset& dataset, Mesh& mesh, Allocator& allocator, Stream& stream)
    : config_(config),
      dataset_(dataset),
      mesh_(mesh),
      allocator_(allocator),
      stream_(stream),
      pinned_(stream, HostMemory::pinned),
      model_(make_model(allocator, stream, config.model, config.train.dtype, *mesh.tp_comm,
                        plan_shards(config, mesh.tp, nullptr))),
      gradients_(config, *model_, mesh, allocator, stream),
      optimizer_(make_optimizer(config, allocator, model_->parameters(), gradients_.buckets(), mesh)),
      sampler_(dataset.split(Split::train), config.seq(), static_cast<std::uint64_t>(config.train.seed)),
      prefetcher_(sampler_),
      schedule_(make_schedule(config.train, 0)) {
  model_->initialise(static_cast<std::uint64_t>(config.train.seed));
  state_.dataset_fingerprint = dataset.fingerprint();
}

Trainer::Trainer(const RunConfig& config, const TokenDataset& dataset, Mesh& mesh, Allocator& allocator, Stream& stream,
                 const CheckpointReader& reader)
    : config_(config),
      dataset_(dataset),
      mesh_(mesh),
      allocator_(allocator),
      stream_(stream),
      pinned_(stream, HostMemory::pinned),
      model_(make_model(allocator, stream, config.model, config.train.dtype, *mesh.tp_comm,
                        plan_shards(config, mesh.tp, &reader))),
      gradients_(config, *model_, mesh, allocator, stream),
      optimizer_(make_optimizer(config, allocator, model_->parameters(), gradients_.buckets(), mesh)),
      sampler_(dataset.split(Split::train), config.seq(), static_cast<std::uint64_t>(config.train.seed)),
      prefetcher_(sampler_),
      state_(load_state(reader)),
      history_(reader.growth_history()),
      parent_uuid_(reader.info().uuid) {
  load_parameters(reader, *model_);
  load_optimizer(reader, *model_, optimizer_);
  for (const std::string& path : reader.damaged()) {
    state_.salvaged += fmt::format("{}step {}: {}", state_.salvaged.empty() ? "" : "; ", state_.step, path);
  }

  log::info("shards: {} bytes of old parameters move to other ranks", moved_bytes(reader, *model_));

  const auto growths = static_cast<std::int64_t>(history_.size());
  if (state_.growths_applied < growths) {
    // The first start after a growth: what it asks for happens now and never again.
    if (config.train.growth.moments == OldMoments::reset) optimizer_.reset_older_than(stage_of(history_));
    if (config.train.growth.schedule == GrowthSchedule::restart) state_.schedule_start = state_.step;
    state_.growths_applied = growths;
    log::info("stage {} begins at step {}: schedule {}, old moments {}", stage_of(history_), state_.step,
              config.train.growth.schedule == GrowthSchedule::restart ? "restarts" : "continues",
              config.train.growth.moments == OldMoments::reset ? "reset" : "kept");
  }
  schedule_ = make_schedule(config.train, state_.schedule_start);
  if (state_.dataset_fingerprint != dataset.fingerprint()) {
    state_.dataset_fingerprint = dataset.fingerprint();
  }
}

MicroBatch Trainer::next_batch(const MicroRange& now, const MicroRange& next) {
  const auto range = [&](const MicroRange& r) {
    return SampleRange{static_cast<std::uint64_t>(state_.samples + r.first), r.count};
  };
  const SampleTokens& samples = prefetcher_.take(range(now), range(next));
  const Shape shape{now.count * config_.seq()};
  return {upload(shape, samples.inputs), upload(shape, samples.targets)};
}

Tensor Trainer::upload(const Shape& shape, std::span<const std::int32_t> values) {
  if (allocator_.device() == Device::cpu) {
    return Tensor::of<std::int32_t>(allocator_, shape, values, Purpose::activations);
  }
  uploads_.push_back(Tensor::of<std::int32_t>(pinned_, shape, values, Purpose::activations));
  return uploads_.back().clone(allocator_);
}

StepResult Trainer::step(const PollPoint& poll) {
  const TrainConfig& train = config_.train;
  const std::int64_t stage = stage_of(history_);
  StepResult result;
  gradients_.run(
      state_.step, [this](const MicroRange& now, const MicroRange& next) { return next_batch(now, next); }, poll);
  result.data_wait_seconds = prefetcher_.take_wait_seconds();
  // Everything is queued; the first of these numbers waits for it.
  result.grad_norm = optimizer_.gradient_norm(stream_, train, stage, mesh_, model_->reducer());
  result.loss = gradients_.loss();
  result.floored_rows = gradients_.take_floored_rows();
  uploads_.clear();
  result.lr = schedule_.lr(state_.step);
  set_phase("update", state_.step);
  if (!std::isfinite(result.loss) || !std::isfinite(result.grad_norm)) {
    result.update = Update::skipped;
    ++state_.skipped_steps;
  } else {
    const bool clips = train.clip > 0 && result.grad_norm > train.clip;
    optimizer_.update(stream_, train, stage, result.lr, clips ? train.clip / result.grad_norm : 1.0);
    gradients_.share_values();
  }
  ++state_.step;
  state_.samples += train.batch;
  state_.tokens += train.batch * config_.seq();
  return result;
}

EvalResult Trainer::evaluate(Split split, const EvalOptions& options) {
  set_phase("evaluation", state_.step);
  return tforge::evaluate(*model_, dataset_.split(split), options, mesh_, allocator_, stream_);
}

CheckpointContents Trainer::contents(Retention retention) const {
  const SaveInfo info{config_, stored(dataset_.tokenizer()), history_, parent_uuid_, retention};
  return contents_of(*model_, optimizer_, state_, info, mesh_);
}

CheckpointInfo Trainer::save(Communicator& world, const std::string& path, Retention retention) {
  set_phase("save", state_.step);
  CheckpointContents rows = contents(retention);
  Staging staging(pinned_);
  if (!rows_in_host_memory()) staging.copy(rows.tensors);
  CheckpointInfo info = save_checkpoint(world, path, rows, OnExisting::replace);
  saved(info);
  return info;
}

}  // namespace tforge
