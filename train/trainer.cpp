#include "train/trainer.h"

#include <algorithm>
#include <cmath>

#include "core/errors.h"
#include "core/log.h"

namespace tforge {

ShardBorders deal_sequences(const RunConfig& config, int dp) {
  if (config.train.batch < dp) {
    throw ConfigError(
        "train.batch = {} gives some of {} data-parallel ranks no sequence; use a batch of at least {}, or "
        "fewer ranks",
        config.train.batch, dp, dp);
  }
  return ShardBorders::even(config.train.batch, dp, "train.batch");
}

std::int64_t micro_batch(const RunConfig& config, std::int64_t mine) {
  return config.train.micro_batch > 0 ? std::min(config.train.micro_batch, mine) : mine;
}

ShardPlan plan_shards(const RunConfig& config, int tp, const CheckpointReader* reader) {
  if (config.parallel.token_shards == TokenShards::even || reader == nullptr) return ShardPlan::even(config.model, tp);
  return ShardPlan::append(config.model, tp, stored_borders(*reader));
}

Trainer::Trainer(const RunConfig& config, const TokenDataset& dataset, Mesh& mesh, Allocator& allocator, Stream& stream)
    : config_(config),
      dataset_(dataset),
      mesh_(mesh),
      allocator_(allocator),
      stream_(stream),
      model_(allocator, stream, config.model, config.train.dtype, *mesh.tp_comm, plan_shards(config, mesh.tp, nullptr)),
      optimizer_(allocator, model_.parameters()),
      sync_(*mesh.dp_comm, model_.parameters().gradients()),
      sampler_(dataset.split(Split::train), config.seq(), static_cast<std::uint64_t>(config.train.seed)),
      sequences_(deal_sequences(config, mesh.dp)),
      tape_(allocator, stream, TapeMode::training, config.train.saves),
      schedule_(make_schedule(config.train, 0)) {
  model_.initialise(static_cast<std::uint64_t>(config.train.seed));
  state_.dataset_fingerprint = dataset.fingerprint();
}

Trainer::Trainer(const RunConfig& config, const TokenDataset& dataset, Mesh& mesh, Allocator& allocator, Stream& stream,
                 const CheckpointReader& reader)
    : config_(config),
      dataset_(dataset),
      mesh_(mesh),
      allocator_(allocator),
      stream_(stream),
      model_(allocator, stream, config.model, config.train.dtype, *mesh.tp_comm, plan_shards(config, mesh.tp, &reader)),
      optimizer_(allocator, model_.parameters()),
      sync_(*mesh.dp_comm, model_.parameters().gradients()),
      sampler_(dataset.split(Split::train), config.seq(), static_cast<std::uint64_t>(config.train.seed)),
      sequences_(deal_sequences(config, mesh.dp)),
      tape_(allocator, stream, TapeMode::training, config.train.saves),
      state_(load_state(reader)),
      history_(reader.growth_history()),
      parent_uuid_(reader.info().uuid) {
  load_parameters(reader, model_);
  load_optimizer(reader, model_, optimizer_);

  std::int64_t moved = 0;
  const std::array<ShardBorders, 5> old = stored_borders(reader);
  for (const TokenGroup group : kTokenGroups) {
    const auto g = static_cast<std::size_t>(group);
    const std::int64_t row_bytes = config.model.dim * static_cast<std::int64_t>(size_of(config.train.dtype));
    moved += ShardBorders::moved_rows(old[g], model_.plan().tokens[g]) * row_bytes * 2 * config.model.layers;
  }
  log::info("shards: {} bytes of old parameter tokens move to other ranks", moved);

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

void Trainer::fill_batch(std::int64_t first, std::int64_t count) {
  const std::int64_t seq = config_.seq();
  tokens_ = Tensor::empty(allocator_, Shape{count * seq}, DType::i32, Purpose::activations);
  targets_ = Tensor::empty(allocator_, Shape{count * seq}, DType::i32, Purpose::activations);
  for (std::int64_t i = 0; i < count; ++i) {
    sampler_.sample(static_cast<std::uint64_t>(first + i), tokens_.span<std::int32_t>().data() + i * seq,
                    targets_.span<std::int32_t>().data() + i * seq);
  }
}

StepResult Trainer::step() {
  const TrainConfig& train = config_.train;
  const std::int64_t seq = config_.seq(), stage = stage_of(history_);
  const std::int64_t mine = sequences_.count(mesh_.dp_index), micro = micro_batch(config_, mine);
  const double weight = 1.0 / static_cast<double>(train.batch * seq);

  model_.parameters().clear_gradients();
  double nll_sum = 0;
  for (std::int64_t done = 0; done < mine; done += micro) {
    const std::int64_t count = std::min(micro, mine - done);
    fill_batch(state_.samples + sequences_.begin(mesh_.dp_index) + done, count);
    set_phase("forward", state_.step);
    HeadLoss loss = model_.loss(tape_, tokens_, targets_, count, weight);
    nll_sum += loss.nll_sum;
    set_phase("backward", state_.step);
    tape_.backward(loss.loss);
  }
  model_.parameters().finish_gradients();
  set_phase("gradient reduction", state_.step);
  sync_.finish(stream_);
  mesh_.dp_comm->all_reduce(stream_, TensorView{&nll_sum, DType::f64, Device::cpu, Shape{1}, 1}, ReduceOp::sum);

  StepResult result;
  result.loss = nll_sum * weight;
  result.grad_norm = optimizer_.gradient_norm(stream_, train, stage, mesh_);
  result.lr = schedule_.lr(state_.step);
  set_phase("update", state_.step);
  if (!std::isfinite(result.loss) || !std::isfinite(result.grad_norm)) {
    result.update = Update::skipped;
    ++state_.skipped_steps;
  } else {
    const bool clips = train.clip > 0 && result.grad_norm > train.clip;
    optimizer_.update(stream_, train, stage, result.lr, clips ? train.clip / result.grad_norm : 1.0);
  }
  ++state_.step;
  state_.samples += train.batch;
  state_.tokens += train.batch * seq;
  return result;
}

EvalResult Trainer::evaluate(Split split, const EvalOptions& options) {
  set_phase("evaluation", state_.step);
  return tforge::evaluate(model_, dataset_.split(split), options, mesh_, allocator_, stream_);
}

CheckpointInfo Trainer::save(Communicator& world, const std::string& path, Retention retention) {
  set_phase("save", state_.step);
  const SaveInfo info{config_, stored(dataset_.tokenizer()), history_, parent_uuid_, retention};
  CheckpointInfo saved =
      save_checkpoint(world, path, contents_of(model_, optimizer_, state_, info, mesh_), OnExisting::replace);
  parent_uuid_ = saved.uuid;
  return saved;
}

std::int64_t Trainer::take_floored_rows() { return std::exchange(tape_.floored_rows, 0); }

}  // namespace tforge
