#include "train/step_report.h"

#include <algorithm>

namespace tforge {

namespace {

constexpr std::int64_t kWords = sizeof(RankReport) / sizeof(std::int32_t);
static_assert(sizeof(RankReport) % sizeof(std::int32_t) == 0);

}  // namespace

StopState agreed_stop(std::span<const RankReport> reports) {
  StopState agreed;
  for (const RankReport& r : reports) {
    agreed.level = std::max(agreed.level, r.stop.level);
    agreed.seconds_left = std::min(agreed.seconds_left, r.stop.seconds_left);
    agreed.hard_seconds_left = std::min(agreed.hard_seconds_left, r.stop.hard_seconds_left);
  }
  return agreed;
}

double slowest_step(std::span<const RankReport> reports) {
  return std::ranges::max(reports, {}, &RankReport::step_seconds).step_seconds;
}

StepReport::StepReport(Communicator& world)
    : world_(world),
      all_(static_cast<std::size_t>(world.size())),
      counts_(static_cast<std::size_t>(world.size()), kWords) {}

std::span<const RankReport> StepReport::exchange(const RankReport& mine) {
  const std::int64_t all_words = kWords * world_.size();
  world_.all_gather(stream_, {&mine, DType::i32, Device::cpu, Shape{kWords}, kWords},
                    {all_.data(), DType::i32, Device::cpu, Shape{all_words}, all_words}, counts_);
  return all_;
}

}  // namespace tforge
