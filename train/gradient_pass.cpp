#include "train/gradient_pass.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <span>
#include <utility>

#include "core/copy.h"
#include "core/errors.h"
#include "kernels/elementwise.h"

namespace tforge {

ShardBorders deal_shards(const RunConfig& config, int dp) {
  if (config.run.deterministic == Determinism::same_layout) return ShardBorders::even(dp, dp, "parallel.dp");
  if (config.parallel.virtual_dp < dp) {
    throw ConfigError("parallel.virtual_dp = {} shards cannot be dealt to {} data-parallel ranks; use at most {}",
                      config.parallel.virtual_dp, dp, config.parallel.virtual_dp);
  }
  return ShardBorders::even(config.parallel.virtual_dp, dp, "parallel.virtual_dp");
}

ShardBorders deal_sequences(const RunConfig& config, int dp) {
  if (config.run.deterministic == Determinism::layout_independent) {
    return ShardBorders::even(config.train.batch, static_cast<int>(deal_shards(config, dp).total()), "train.batch");
  }
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

std::vector<MicroRange> micro_batches(const RunConfig& config, int dp, int dp_index) {
  const ShardBorders shards = deal_shards(config, dp), sequences = deal_sequences(config, dp);
  std::vector<MicroRange> ranges;
  for (std::int64_t shard = shards.begin(dp_index); shard < shards.end(dp_index); ++shard) {
    const auto s = static_cast<int>(shard);
    const std::int64_t micro = micro_batch(config, sequences.count(s));
    for (std::int64_t first = sequences.begin(s); first < sequences.end(s); first += micro) {
      ranges.push_back({first, std::min(micro, sequences.end(s) - first), shard - shards.begin(dp_index)});
    }
  }
  return ranges;
}

std::vector<std::int64_t> last_micro_batches(const RunConfig& config, int dp) {
  const ShardBorders sequences = deal_sequences(config, dp);
  std::vector<std::int64_t> last;
  for (int r = 0; r < dp; ++r) {
    const std::int64_t mine = sequences.count(r), micro = micro_batch(config, mine);
    last.push_back(mine - (mine - 1) / micro * micro);
  }
  return last;
}

std::int64_t lookup_rows(const RunConfig& config, int dp) {
  const std::vector<std::int64_t> last = last_micro_batches(config, dp);
  return std::accumulate(last.begin(), last.end(), std::int64_t{0}) * config.seq();
}

bool separate_lookup(const RunConfig& config, int dp, std::int64_t vocab) {
  if (dp == 1 || config.parallel.reduction == Reduction::blocking) return false;
  if (config.run.deterministic == Determinism::layout_independent) return false;
  if (config.model.head == Head::untied) return false;
  return LookupSync::pays(lookup_rows(config, dp), vocab, config.model.dim, config.train.dtype);
}

std::int64_t bucket_bytes(const RunConfig& config) {
  return static_cast<std::int64_t>(config.parallel.bucket_mb * (1 << 20));
}

ShardGradientBytes shard_gradient_bytes(const RunConfig& config, int dp, int dp_index, std::int64_t gradients) {
  if (config.run.deterministic == Determinism::same_layout) return {};
  const ShardBorders shards = deal_shards(config, dp);
  return {(shards.count(dp_index) - 1) * gradients,
          dp > 1 ? shards.total() * std::min(bucket_bytes(config), gradients) : 0};
}

namespace {

/// The parameters' buckets in the order in which backward finishes them. The embedding's is the first when the lookup
/// is kept apart, and the last otherwise.
std::vector<Bucket> buckets_in_order(const RunConfig& config, const ParameterSet& parameters, int dp, bool apart) {
  std::vector<Bucket> buckets = parameters.buckets(bucket_bytes(config), dp);
  if (apart) std::rotate(buckets.begin(), buckets.end() - 1, buckets.end());  // clang 14 cannot do std::ranges::rotate
  return buckets;
}

std::size_t fewest_micro_batches(const RunConfig& config, int dp) {
  std::size_t fewest = micro_batches(config, dp, 0).size();
  for (int r = 1; r < dp; ++r) fewest = std::min(fewest, micro_batches(config, dp, r).size());
  return fewest;
}

}  // namespace

GradientPass::GradientPass(const RunConfig& config, LanguageModel& model, Mesh& mesh, Allocator& allocator,
                           Stream& stream)
    : model_(model),
      mesh_(mesh),
      stream_(stream),
      micro_batches_(micro_batches(config, mesh.dp, mesh.dp_index)),
      next_step_(micro_batches_.front()),
      polls_(fewest_micro_batches(config, mesh.dp) - 1),
      weight_(1.0 / static_cast<double>(config.train.batch * config.seq())),
      sync_(*mesh.dp_comm, model.parameters().gradients(),
            buckets_in_order(config, model.parameters(), mesh.dp,
                             separate_lookup(config, mesh.dp, model.plan().vocab.count(mesh.tp_index))),
            config.parallel.reduction, config.parallel.zero == 0 ? Sums::everywhere : Sums::at_owner),
      tape_(allocator, stream, TapeMode::training, config.train.saves),
      nll_sums_(Tensor::zeros(allocator, Shape{kMaxShards}, DType::f64, Purpose::workspace)) {
  next_step_.first += config.train.batch;
  if (config.run.deterministic == Determinism::layout_independent) {
    shard_sum_.emplace(allocator, *mesh.dp_comm, deal_shards(config, mesh.dp));
    const Tensor& flat = model.parameters().gradients();
    shard_gradients_.emplace(allocator, *shard_sum_, flat,
                             bucket_bytes(config) / static_cast<std::int64_t>(size_of(flat.dtype())));
  }
  if (separate_lookup(config, mesh.dp, model.plan().vocab.count(mesh.tp_index))) {
    std::vector<std::int64_t> rows = last_micro_batches(config, mesh.dp);
    for (std::int64_t& n : rows) n *= config.seq();
    lookup_.emplace(allocator, *mesh.dp_comm, std::move(rows), config.model.dim, config.train.dtype);
  }
  model.parameters().set_hook(&sync_);
  tape_.set_hook(&sync_);
}

void GradientPass::run(std::int64_t step,
                       const std::function<MicroBatch(const MicroRange& now, const MicroRange& next)>& batch,
                       const PollPoint& poll) {
  ParameterSet& parameters = model_.parameters();
  nll_sums_.fill_zero();
  const std::size_t count = micro_batches_.size();
  for (std::size_t i = 0; i < count; ++i) {
    const MicroRange& now = micro_batches_[i];
    const bool last = i + 1 == count;
    const MicroRange& next = last ? next_step_ : micro_batches_[i + 1];
    if (poll && i >= 1 && i <= polls_) poll(static_cast<double>(count - i) / static_cast<double>(count));
    if (i == 0 || micro_batches_[i - 1].shard != now.shard) parameters.clear_gradients();
    const MicroBatch input = batch(now, next);
    set_phase("forward", step);
    LookupSync* lookup = last && lookup_ ? &*lookup_ : nullptr;
    HeadLoss loss = model_.loss(tape_, input.tokens, input.targets, now.count, weight_, lookup);
    kernels::add_to(stream_, std::as_const(loss.nll_sum).view(), GradMode::accumulate,
                    nll_sums_.rows(now.shard, 1).view());
    set_phase("backward", step);
    if (last && !shard_gradients_) sync_.begin(stream_);
    tape_.backward(loss.loss);
    if (last || next.shard != now.shard) parameters.finish_gradients();
    if (!last && next.shard != now.shard) shard_gradients_->keep(stream_, now.shard);
  }
  set_phase("gradient reduction", step);
  if (shard_gradients_) {
    shard_gradients_->finish(stream_);
    return;
  }
  sync_.finish(stream_);
  if (lookup_) {
    lookup_->finish(stream_, model_.plan().vocab.begin(mesh_.tp_index), parameters.find("embedding").gradient.view());
  }
}

double GradientPass::loss() {
  const std::int64_t shards = micro_batches_.back().shard + 1;
  std::array<double, kMaxShards> sums{};  // by shard of this rank
  copy(stream_, nll_sums_.rows(0, shards).view(), {sums.data(), DType::f64, Device::cpu, Shape{shards}, shards});
  if (shard_sum_) {
    return shard_sum_->sum(stream_, std::span<const double>(sums).first(static_cast<std::size_t>(shards))) * weight_;
  }
  mesh_.dp_comm->all_reduce(stream_, TensorView{sums.data(), DType::f64, Device::cpu, Shape{1}, 1}, ReduceOp::sum);
  return sums[0] * weight_;
}

}  // namespace tforge
