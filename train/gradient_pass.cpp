#include "train/gradient_pass.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "core/errors.h"

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
  return LookupSync::pays(lookup_rows(config, dp), vocab, config.model.dim, config.train.dtype);
}

std::int64_t bucket_bytes(const RunConfig& config) {
  return static_cast<std::int64_t>(config.parallel.bucket_mb * (1 << 20));
}

namespace {

/// The parameters' buckets in the order in which backward finishes them. The embedding's is the first when the lookup
/// is kept apart, and the last otherwise.
std::vector<Bucket> buckets_in_order(const RunConfig& config, const ParameterSet& parameters, int dp, bool apart) {
  std::vector<Bucket> buckets = parameters.buckets(bucket_bytes(config), dp);
  if (apart) std::ranges::rotate(buckets, buckets.end() - 1);
  return buckets;
}

}  // namespace

namespace {

std::int64_t fewest_micro_batches(const RunConfig& config, const ShardBorders& sequences) {
  std::int64_t fewest = sequences.count(0);
  for (int r = 0; r < sequences.ranks(); ++r) {
    const std::int64_t micro = micro_batch(config, sequences.count(r));
    fewest = std::min(fewest, (sequences.count(r) + micro - 1) / micro);
  }
  return fewest;
}

}  // namespace

GradientPass::GradientPass(const RunConfig& config, TokenFormer& model, Mesh& mesh, Allocator& allocator,
                           Stream& stream)
    : model_(model),
      mesh_(mesh),
      stream_(stream),
      sequences_(deal_sequences(config, mesh.dp)),
      micro_(micro_batch(config, sequences_.count(mesh.dp_index))),
      polls_(fewest_micro_batches(config, sequences_) - 1),
      weight_(1.0 / static_cast<double>(config.train.batch * config.seq())),
      sync_(*mesh.dp_comm, model.parameters().gradients(),
            buckets_in_order(config, model.parameters(), mesh.dp,
                             separate_lookup(config, mesh.dp, model.plan().vocab.count(mesh.tp_index))),
            config.parallel.reduction, config.parallel.zero == 0 ? Sums::everywhere : Sums::at_owner),
      tape_(allocator, stream, TapeMode::training, config.train.saves) {
  if (separate_lookup(config, mesh.dp, model.plan().vocab.count(mesh.tp_index))) {
    std::vector<std::int64_t> rows = last_micro_batches(config, mesh.dp);
    for (std::int64_t& n : rows) n *= config.seq();
    lookup_.emplace(allocator, *mesh.dp_comm, std::move(rows), config.model.dim, config.train.dtype);
  }
  model.parameters().set_hook(&sync_);
  tape_.set_hook(&sync_);
}

double GradientPass::run(std::int64_t step,
                         const std::function<MicroBatch(std::int64_t first, std::int64_t count)>& batch,
                         const PollPoint& poll) {
  const std::int64_t mine = sequences_.count(mesh_.dp_index);
  ParameterSet& parameters = model_.parameters();
  parameters.clear_gradients();
  double nll_sum = 0;
  for (std::int64_t done = 0; done < mine; done += micro_) {
    const std::int64_t number = done / micro_;
    if (poll && number >= 1 && number <= polls_) poll(static_cast<double>(mine - done) / static_cast<double>(mine));
    const std::int64_t count = std::min(micro_, mine - done);
    const bool last = done + count == mine;
    const MicroBatch input = batch(sequences_.begin(mesh_.dp_index) + done, count);
    set_phase("forward", step);
    LookupSync* lookup = last && lookup_ ? &*lookup_ : nullptr;
    HeadLoss loss = model_.loss(tape_, input.tokens, input.targets, count, weight_, lookup);
    nll_sum += loss.nll_sum;
    set_phase("backward", step);
    if (last) sync_.begin(stream_);
    tape_.backward(loss.loss);
  }
  parameters.finish_gradients();
  set_phase("gradient reduction", step);
  sync_.finish(stream_);
  if (lookup_) {
    lookup_->finish(stream_, model_.plan().vocab.begin(mesh_.tp_index), parameters.find("embedding").gradient.view());
  }
  mesh_.dp_comm->all_reduce(stream_, TensorView{&nll_sum, DType::f64, Device::cpu, Shape{1}, 1}, ReduceOp::sum);
  return nll_sum * weight_;
}

}  // namespace tforge
