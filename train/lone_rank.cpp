#include "train/lone_rank.h"

#include "core/rng.h"
#include "kernels/device_libraries.h"
#include "model/models.h"

namespace tforge {

LoneRank::LoneRank(const RunConfig& config, const ShardPlan& plan, const MeshPlace& place, Execution execution)
    : config_(config),
      queue_(execution == Execution::real ? std::make_unique<DeviceQueue>(config.run.device) : nullptr),
      stream_(queue_ ? queue_->stream() : Stream(config.run.device, execution)),
      allocator_(stream_),
      libraries_(std::make_unique<kernels::DeviceLibraries>(stream_, allocator_, config.train.f32_products,
                                                            config.run.products)),
      mesh_{place.dp,
            place.tp,
            place.dp_index,
            place.tp_index,
            create_lone(place.dp_index, place.dp),
            create_lone(place.tp_index, place.tp)},
      model_(make_model(allocator_, stream_, config.model, config.train.dtype, *mesh_.tp_comm, plan)),
      gradients_(config_, *model_, mesh_, allocator_, stream_),
      optimizer_(make_optimizer(config_, allocator_, model_->parameters(), gradients_.buckets(), mesh_)) {
  if (stream_.rehearses()) return;
  model_->initialise(1);
  const Rng rng(1, "tokens");
  tokens_.resize(static_cast<std::size_t>(gradients_.sequences() * config_.seq()));
  std::uint64_t i = 0;
  for (std::int32_t& token : tokens_) {
    token = static_cast<std::int32_t>(rng.below(i++, static_cast<std::uint64_t>(config_.model.vocab)));
  }
}

LoneRank::~LoneRank() = default;

void LoneRank::step() {
  const auto batch = [this](const MicroRange& now, const MicroRange&) {
    const Shape shape{now.count * config_.seq()};
    const auto tensor = [&] {
      if (stream_.rehearses()) return Tensor::empty(allocator_, shape, DType::i32, Purpose::activations);
      return Tensor::of<std::int32_t>(allocator_, shape,
                                      std::span(tokens_).first(static_cast<std::size_t>(shape.elements())),
                                      Purpose::activations);
    };
    return MicroBatch{tensor(), tensor()};
  };
  gradients_.run(-1, batch);
  const double norm = optimizer_.gradient_norm(stream_, config_.train, 0, mesh_, model_->reducer());
  gradients_.loss();
  optimizer_.update(stream_, config_.train, 0, config_.train.lr, norm > 1 ? 1 / norm : 1.0);
  gradients_.share_values();
}

Rehearsal rehearse(const RunConfig& config, const ShardPlan& plan, const MeshPlace& place) {
  LoneRank rank(config, plan, place, Execution::rehearsal);
  rank.step();
  const Communicator::Traffic dp = rank.traffic(MeshAxis::dp), tp = rank.traffic(MeshAxis::tp);
  Profile profile;
  rank.stream().set_profile(&profile);
  rank.step();
  rank.stream().set_profile(nullptr);
  Rehearsal result{rank.memory(), profile.entries(), rank.traffic(MeshAxis::dp), rank.traffic(MeshAxis::tp)};
  for (Profile::Entry& entry : result.kernels) entry.seconds = 0;
  result.dp.calls -= dp.calls;
  result.dp.bytes -= dp.bytes;
  result.tp.calls -= tp.calls;
  result.tp.bytes -= tp.bytes;
  return result;
}

}  // namespace tforge
