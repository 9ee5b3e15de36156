// Checkpoints of a run: beside the training or not, refused by the disk, damaged afterwards.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "checkpoint/folder.h"
#include "checkpoint/manifest.h"
#include "support/tiny_run.h"
#include "train/run.h"
#include "train/saver.h"

namespace tforge::test {
namespace {

namespace fs = std::filesystem;

/// Eight updates, saved every other one, all kept.
RunRequest request_of(const Lab& lab, const std::string& folder, std::int64_t steps = 8) {
  RunRequest request;
  RunConfig& config = request.asked.config;
  config = lab.config(DType::f32);
  config.model.vocab = 0;
  config.run.dir = lab.path(folder);
  config.run.threads = 1;
  config.run.save_every = 2;
  config.run.keep_last = 100;
  config.run.save_retry_s = 0;
  config.train.eval_every = 0;
  config.train.steps = steps;
  config.train.warmup_steps = 1;
  config.train.schedule = ScheduleKind::constant;  // the same whenever the run is to end
  return request;
}

std::string checkpoint(const Lab& lab, const std::string& folder, std::int64_t step) {
  return lab.path(folder) + "/" + checkpoint_name(step);
}

std::vector<std::int64_t> steps_in(const std::string& folder) {
  std::vector<std::int64_t> steps;
  for (const CheckpointFile& file : list_checkpoints(folder)) steps.push_back(file.step);
  return steps;
}

void flip_byte(const std::string& path, std::uint64_t at) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(static_cast<std::streamoff>(at));
  const char value = static_cast<char>(file.get() ^ 0x10);
  file.seekp(static_cast<std::streamoff>(at));
  file.put(value);
}

TEST(Saving, BesideTheTrainingIsSavedWhatWasThereThen) {
  const Lab lab;
  for (const auto& layout : layouts()) {
    for (const std::int64_t zero : {0, 1}) {
      const std::string name = fmt::format("{}_{}", text_of(layout), zero);
      for (const SaveMode mode : {SaveMode::async, SaveMode::blocking}) {
        RunRequest request = request_of(lab, name + (mode == SaveMode::async ? "_async" : "_blocking"));
        RunConfig& config = request.asked.config;
        config.parallel.dp = layout.first;
        config.parallel.tp = layout.second;
        config.parallel.zero = zero;
        config.run.save = mode;
        EXPECT_EQ(run_training(test_world(), request), ExitCode::done);
      }
      EXPECT_EQ(steps_in(lab.path(name + "_async")), (std::vector<std::int64_t>{2, 4, 6, 8}));
      for (const std::int64_t step : {2, 4, 6, 8}) {
        expect_same_content(checkpoint(lab, name + "_async", step), checkpoint(lab, name + "_blocking", step));
      }
      // Each names the one before it.
      EXPECT_EQ(CheckpointReader::open(checkpoint(lab, name + "_async", 6)).info().parent_uuid,
                CheckpointReader::open(checkpoint(lab, name + "_async", 4)).info().uuid);
      test_world().barrier();
    }
  }
}

TEST(Saving, PartsAndEstimate) {
  const Lab lab;
  TinyRun run(lab.config(DType::f32), lab, mesh_of(layouts().front()));
  on_rank_0([&] { fs::create_directory(lab.path("run")); });
  Journal journal(test_world(), run.trainer);
  Saver saver(test_world(), run.trainer, journal, run.allocator);
  StepReport report(test_world());
  EXPECT_GT(saver.estimated_seconds(), 0.4);  // nothing was measured yet
  const double guessed = saver.estimated_seconds();
  EXPECT_EQ(saver.saved_step(), -1);
  saver.begin(Retention::rolling, Saver::Rows::copied);
  EXPECT_TRUE(saver.under_way());
  EXPECT_EQ(saver.estimated_seconds(), guessed);
  EXPECT_THROW(saver.begin(Retention::rolling, Saver::Rows::copied), InternalError);
  int rounds = 0;
  for (; saver.under_way(); ++rounds) {
    EXPECT_FALSE(fs::exists(manifest_path(lab.path("run") + "/" + checkpoint_name(0))));
    saver.wait();
    RankReport mine;
    mine.save = saver.part();
    saver.advance(report.exchange(mine));
  }
  EXPECT_GE(rounds, 2);
  EXPECT_EQ(saver.saved_step(), 0);
  EXPECT_EQ(saver.estimated_seconds(), 0);  // the present state is saved
  run.trainer.step();
  const double estimate = saver.estimated_seconds();
  EXPECT_GT(estimate, 0);
  for (const std::string& other : test_world().all_gather_bytes(fmt::format("{}", estimate))) {
    EXPECT_EQ(other, fmt::format("{}", estimate));
  }
  saver.begin(Retention::rolling, Saver::Rows::copied);
  run.trainer.step();
  EXPECT_EQ(saver.estimated_seconds(), 2 * estimate);
  // What nobody waits for is dropped.
}

TEST(Saving, WhatTheDiskRefusesIsTriedAgain) {
  const Lab lab;
  for (const SaveMode mode : {SaveMode::async, SaveMode::blocking}) {
    const std::string name = mode == SaveMode::async ? "async" : "blocking";
    // A folder stands where the checkpoint of step 2 belongs.
    on_rank_0([&] { fs::create_directories(checkpoint(lab, name, 2)); });
    RunRequest request = request_of(lab, name);
    request.asked.config.run.save = mode;
    EXPECT_EQ(run_training(test_world(), request), ExitCode::done);
    const std::vector<std::int64_t> steps = steps_in(lab.path(name));
    ASSERT_FALSE(steps.empty());
    if (mode == SaveMode::blocking) {
      EXPECT_EQ(steps, (std::vector<std::int64_t>{3, 4, 6, 8}));
    } else {
      EXPECT_EQ(steps.back(), 8);
      EXPECT_GE(steps.size(), 3U);
    }
    for (const auto& entry : fs::directory_iterator(lab.path(name))) {
      EXPECT_FALSE(entry.path().extension() == ".tmp") << entry.path();
    }
    test_world().barrier();
  }
}

TEST(Saving, ARunEndsInErrorWhenItsLastStateCannotBeSaved) {
  const Lab lab;
  on_rank_0([&] { fs::create_directories(checkpoint(lab, "run", 8)); });
  expect_error<ResourceError>([&] { run_training(test_world(), request_of(lab, "run")); },
                              "step 8, the last of the run, could not be saved in 10 tries: ", ExitCode::no_resources);
  EXPECT_EQ(steps_in(lab.path("run")), (std::vector<std::int64_t>{2, 4, 6}));
  EXPECT_NO_THROW(CheckpointReader::open(checkpoint(lab, "run", 6)));
  // The disk is mended.
  on_rank_0([&] { fs::remove(checkpoint(lab, "run", 8)); });
  EXPECT_EQ(run_training(test_world(), request_of(lab, "run")), ExitCode::done);
  EXPECT_EQ(steps_in(lab.path("run")), (std::vector<std::int64_t>{2, 4, 6, 8}));
}

TEST(Healing, TheNewestWholeCheckpointIsTaken) {
  const Lab lab;
  EXPECT_EQ(run_training(test_world(), request_of(lab, "whole")), ExitCode::done);
  EXPECT_EQ(run_training(test_world(), request_of(lab, "run", 6)), ExitCode::done);
  on_rank_0([&] {
    flip_byte(checkpoint(lab, "run", 6), 5000);
    fs::remove(manifest_path(checkpoint(lab, "run", 4)));
  });
  EXPECT_EQ(run_training(test_world(), request_of(lab, "run")), ExitCode::done);
  EXPECT_EQ(steps_in(lab.path("run")), (std::vector<std::int64_t>{2, 4, 6, 8}));
  for (const std::int64_t step : {4, 6}) EXPECT_TRUE(fs::exists(checkpoint(lab, "run", step) + ".damaged"));
  EXPECT_TRUE(fs::exists(manifest_path(checkpoint(lab, "run", 6) + ".damaged")));
  expect_same_content(checkpoint(lab, "whole", 8), checkpoint(lab, "run", 8));
}

TEST(Healing, AManifestWithoutItsFileIsADamagedCheckpoint) {
  const Lab lab;
  EXPECT_EQ(run_training(test_world(), request_of(lab, "run", 4)), ExitCode::done);
  on_rank_0([&] { fs::remove(checkpoint(lab, "run", 4)); });
  EXPECT_EQ(run_training(test_world(), request_of(lab, "run")), ExitCode::done);
  EXPECT_EQ(steps_in(lab.path("run")), (std::vector<std::int64_t>{2, 4, 6, 8}));
  EXPECT_TRUE(fs::exists(manifest_path(checkpoint(lab, "run", 4) + ".damaged")));
  on_rank_0([&] {
    for (const std::int64_t step : {2, 4, 6, 8}) fs::remove(checkpoint(lab, "run", step));
  });
  expect_error<CheckpointError>([&] { run_training(test_world(), request_of(lab, "run")); },
                                "step_00000008.h5: the file is missing; only its manifest is there; ",
                                ExitCode::damaged);
}

TEST(Healing, NothingIsTrainedFromScratchInPlaceOfDamagedOnes) {
  const Lab lab;
  EXPECT_EQ(run_training(test_world(), request_of(lab, "run", 4)), ExitCode::done);
  on_rank_0([&] {
    for (const std::int64_t step : {2, 4}) flip_byte(checkpoint(lab, "run", step), 5000);
  });
  const std::size_t files =
      static_cast<std::size_t>(std::distance(fs::directory_iterator(lab.path("run")), fs::directory_iterator()));
  for (int again = 0; again < 2; ++again) {
    RunRequest request = request_of(lab, "run");
    if (again == 1) request.init = checkpoint(lab, "run", 2);
    expect_error<CheckpointError>([&] { run_training(test_world(), request); }, "is whole, and nothing was trained",
                                  ExitCode::damaged);
  }
  EXPECT_EQ(static_cast<std::size_t>(std::distance(fs::directory_iterator(lab.path("run")), fs::directory_iterator())),
            files);
  // One that is asked for by name is not replaced by another.
  RunRequest named = request_of(lab, "run");
  named.asked.config.run.resume = checkpoint(lab, "run", 4);
  expect_error<CheckpointError>([&] { run_training(test_world(), named); }, "step_00000004.h5: damaged",
                                ExitCode::damaged);
}

TEST(Healing, SalvageGoesOnWithoutTheDamagedMoments) {
  const Lab lab;
  EXPECT_EQ(run_training(test_world(), request_of(lab, "run", 4)), ExitCode::done);
  const std::string newest = checkpoint(lab, "run", 4), damaged = "optim/layers.1.ffn.keys/v";
  on_rank_0([&] { flip_byte(newest, CheckpointReader::open(newest).tensor(damaged).offset + 77); });
  // By itself a run takes the older one; that is another test. By name it takes the newer parameters.
  RunRequest request = request_of(lab, "run", 6);
  request.salvage = CheckpointReader::Salvage::moments;
  EXPECT_EQ(run_training(test_world(), request), ExitCode::done);
  EXPECT_EQ(steps_in(lab.path("run")), (std::vector<std::int64_t>{2, 4, 6}));
  const CheckpointReader reader = CheckpointReader::open(checkpoint(lab, "run", 6));
  EXPECT_EQ(load_state(reader).salvaged, "step 4: " + damaged);
  const auto ages = [&](const std::string& path) {
    return std::get<std::vector<std::int64_t>>(reader.tensor(path).attributes.at("age_segments"));
  };
  EXPECT_EQ(ages(damaged), (std::vector<std::int64_t>{0, 2, 0}));
  EXPECT_EQ(ages("optim/layers.1.ffn.keys/m"), (std::vector<std::int64_t>{0, 2, 0}));
  EXPECT_EQ(ages("optim/layers.1.ffn.values/m"), (std::vector<std::int64_t>{0, 6, 0}));
  test_world().barrier();
  // A damaged parameter is never salvaged.
  on_rank_0([&] { flip_byte(checkpoint(lab, "run", 6), reader.tensor("model/layers.1.ffn.keys").offset + 77); });
  request.asked.config.run.resume = checkpoint(lab, "run", 6);
  request.asked.config.train.steps = 8;
  expect_error<CheckpointError>([&] { run_training(test_world(), request); }, "model/layers.1.ffn.keys row",
                                ExitCode::damaged);
}

}  // namespace
}  // namespace tforge::test
