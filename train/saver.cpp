#include "train/saver.h"

#include <algorithm>
#include <filesystem>
#include <thread>

#include "checkpoint/agreement.h"
#include "checkpoint/folder.h"
#include "core/log.h"

namespace tforge {

namespace {

/// Before the first save has been measured: slower than most disks.
constexpr double kGuessedBytesPerSecond = 100e6;
constexpr double kGuessedSeconds = 0.5;
constexpr std::chrono::milliseconds kMoment{20}, kInstant{1};

double seconds_since(std::chrono::steady_clock::time_point from) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - from).count();
}

/// What the system refuses may go better later. Anything else is a defect.
bool survivable(const Error& error) {
  return error.code() == ExitCode::bad_input || error.code() == ExitCode::no_resources;
}

/// The largest of everyone's numbers.
double largest(Communicator& world, double mine) {
  double value = mine;
  Stream stream;
  world.all_reduce(stream, TensorView{&value, DType::f64, Device::cpu, Shape{1}, 1}, ReduceOp::max);
  return value;
}

}  // namespace

Saver::Saver(Communicator& world, Trainer& trainer, Journal& journal, Allocator& allocator)
    : world_(world), trainer_(trainer), journal_(journal), staging_(allocator) {
  const CheckpointContents contents = trainer.contents(Retention::rolling);
  double bytes = 0;
  for (const CheckpointTensor& t : contents.tensors) {
    bytes += static_cast<double>(t.shape.elements()) * static_cast<double>(size_of(t.dtype));
  }
  last_seconds_ = kGuessedSeconds + bytes / kGuessedBytesPerSecond;
  const RunSettings& run = trainer.config().run;
  // Better now than at the first save.
  if (run.save == SaveMode::async && run.save_every > 0) staging_.reserve(contents.tensors);
}

Saver::~Saver() {
  if (thread_.valid()) thread_.wait();
}

void Saver::begin(Retention retention, Rows rows) {
  if (under_way()) throw InternalError("a save was begun while another one is under way");
  set_phase("save", trainer_.state().step);
  begun_ = Clock::now();
  stall_ = work_ = 0;
  contents_ = trainer_.contents(retention);
  if (rows == Rows::copied || !trainer_.rows_in_host_memory()) staging_.copy(contents_.tensors);
  const std::string& folder = trainer_.config().run.dir;
  if (world_.rank() == 0) {
    std::error_code ignored;  // a folder that cannot be made shows in the next line
    std::filesystem::create_directories(folder, ignored);
  }
  try {
    writer_.emplace(world_, folder + "/" + checkpoint_name(contents_.step), contents_, OnExisting::replace);
    part_ = Part::rows;
    start_thread();
    waited_since(begun_);
  } catch (const Error& error) {
    if (!survivable(error)) throw;
    give_up(error);
  }
}

void Saver::start_thread() {
  thread_ = std::async(std::launch::async, [this, part = part_] {
    const Clock::time_point from = Clock::now();
    if (part == Part::rows) writer_->write_rows(contents_.tensors);
    else writer_->digest_blocks();
    return seconds_since(from);
  });
}

void Saver::wait() {
  const Clock::time_point from = Clock::now();
  if (thread_.wait_for(kMoment) == std::future_status::ready) std::this_thread::sleep_for(kInstant);
  waited_since(from);
}

SavePart Saver::part() const {
  const bool running = thread_.valid() && thread_.wait_for(std::chrono::seconds(0)) != std::future_status::ready;
  return running ? SavePart::under_way : SavePart::at_rest;
}

void Saver::advance(std::span<const RankReport> reports) {
  run_seconds_ = reports[0].run_seconds;
  if (!under_way()) return;
  if (std::ranges::any_of(reports, [](const RankReport& r) { return r.save == SavePart::under_way; })) return;
  set_phase("save", contents_.step);
  const Clock::time_point from = Clock::now();
  try {
    double seconds = 0;
    together(world_, [&] {
      seconds = thread_.get();
      return std::string();
    });
    work_ += largest(world_, seconds);
    if (part_ == Part::rows) {
      writer_->seal();
      part_ = Part::digests;
      start_thread();
      waited_since(from);
    } else {
      const CheckpointInfo info = writer_->commit();
      waited_since(from);
      committed(info);
    }
  } catch (const Error& error) {
    if (!survivable(error)) throw;
    give_up(error);
  }
}

void Saver::committed(const CheckpointInfo& info) {
  writer_.reset();
  trainer_.saved(info);
  seconds_before_ = saved_step_ < 0 ? 0 : last_seconds_;  // a guess does not count any longer
  saved_step_ = info.step;
  failures_ = 0;
  last_seconds_ = largest(world_, stall_ + work_);
  if (world_.rank() != 0) return;
  const RunSettings& run = trainer_.config().run;
  journal_.saved(trainer_, info, {.total = seconds_since(begun_), .stall = stall_});
  try {
    for (const std::string& gone : prune_checkpoints(run.dir, static_cast<int>(run.keep_last))) {
      log::debug("removed {}", gone);
    }
  } catch (const Error& error) {
    log::warning("an older checkpoint stays: {}", error.what());
  }
}

void Saver::give_up(const Error& error) {
  writer_.reset();
  ++failures_;
  failure_ = error.what();
  failed_at_ = run_seconds_;
  if (world_.rank() != 0) return;
  journal_.clear();
  log::error("step {} COULD NOT BE SAVED: {}; older checkpoints stay, and the next try is in {:g} s", contents_.step,
             failure_, trainer_.config().run.save_retry_s);
}

bool Saver::retry_due() const {
  return failures_ > 0 && !under_way() && run_seconds_ - failed_at_ >= trainer_.config().run.save_retry_s;
}

double Saver::estimated_seconds() const {
  const double one = std::max(last_seconds_, seconds_before_);
  const std::int64_t step = trainer_.state().step;
  if (under_way()) return contents_.step == step ? one : 2 * one;
  return saved_step_ == step ? 0 : one;
}

void Saver::waited_since(Clock::time_point from) { stall_ += seconds_since(from); }

}  // namespace tforge
