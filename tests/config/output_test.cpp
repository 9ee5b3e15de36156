// metrics.jsonl and the progress display.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>

#include "core/errors.h"
#include "train/metrics.h"
#include "train/progress.h"

namespace tforge {
namespace {

std::string read(const std::string& path) {
  std::ostringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

class MetricsFile : public testing::Test {
 protected:
  MetricsFile() : path_(testing::TempDir() + "metrics_" + std::to_string(::getpid()) + ".jsonl") {
    std::filesystem::remove(path_);
  }
  ~MetricsFile() override { std::filesystem::remove(path_); }
  std::string path_;
};

TEST_F(MetricsFile, OneObjectALineAtOnce) {
  MetricsWriter writer(path_, -1);
  writer.write({{"step", std::int64_t{1}}, {"loss", 0.5}, {"note", std::string("a \"b\"")}});
  EXPECT_EQ(read(path_), "{\"step\":1,\"loss\":0.5,\"note\":\"a \\\"b\\\"\"}\n");
  writer.write({{"step", std::int64_t{2}}, {"loss", std::numeric_limits<double>::quiet_NaN()}});
  EXPECT_EQ(read(path_).substr(read(path_).find('\n') + 1), "{\"step\":2,\"loss\":null}\n");
}

TEST_F(MetricsFile, ResumeDropsWhatWillBeWrittenAgain) {
  std::ofstream(path_) << "{\"step\":1}\n{\"event\":\"start\"}\n{\"step\":2}\n{\"step\":3}\n{\"step\":4";
  MetricsWriter(path_, 2).write({{"step", std::int64_t{3}}, {"again", std::int64_t{1}}});
  EXPECT_EQ(read(path_), "{\"step\":1}\n{\"event\":\"start\"}\n{\"step\":2}\n{\"step\":3,\"again\":1}\n");
}

TEST_F(MetricsFile, TornLastLineIsDropped) {
  std::ofstream(path_) << "{\"step\":1}\n{\"step\":2";
  MetricsWriter(path_, 9).write({{"step", std::int64_t{3}}});
  EXPECT_EQ(read(path_), "{\"step\":1}\n{\"step\":3}\n");
}

TEST_F(MetricsFile, NewRunBeginsAnew) {
  std::ofstream(path_) << "{\"step\":1}\n";
  MetricsWriter(path_, -1).write({{"step", std::int64_t{1}}, {"new", std::int64_t{1}}});
  EXPECT_EQ(read(path_), "{\"step\":1,\"new\":1}\n");
}

TEST(Metrics, UnwritableFile) {
  try {
    MetricsWriter("/no/such/folder/metrics.jsonl", -1);
    FAIL();
  } catch (const ResourceError& error) {
    EXPECT_STREQ(error.what(), "/no/such/folder/metrics.jsonl: cannot be opened: No such file or directory");
    EXPECT_EQ(error.code(), ExitCode::no_resources);
  }
}

TEST(Metrics, FullDiskIsSaidOnceAndEndsNothing) {
  testing::internal::CaptureStderr();
  {
    MetricsWriter writer("/dev/full", 0);
    for (std::int64_t step = 1; step < 4; ++step) writer.write({{"step", step}});
  }
  const std::string text = testing::internal::GetCapturedStderr();
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 2) << text;
  EXPECT_NE(text.find("cannot be written: No space left on device; its lines wait"), std::string::npos) << text;
  EXPECT_NE(text.find("its last lines are lost"), std::string::npos) << text;
}

TEST_F(MetricsFile, ARemovedFileIsMadeAgainAndWaitingLinesFollow) {
  const std::string folder = path_ + ".d";
  std::filesystem::create_directory(folder);
  {
    MetricsWriter writer(folder + "/m", -1);
    writer.write({{"step", std::int64_t{1}}});
    std::filesystem::remove_all(folder);
    writer.write({{"step", std::int64_t{2}}});
    std::filesystem::create_directory(folder);
    writer.write({{"step", std::int64_t{3}}});
  }
  EXPECT_EQ(read(folder + "/m"), "{\"step\":2}\n{\"step\":3}\n");
  std::filesystem::remove_all(folder);
}

TEST(Progress, Texts) {
  EXPECT_EQ(clock_text(0), "0:00");
  EXPECT_EQ(clock_text(123.4), "2:03");
  EXPECT_EQ(clock_text(3723), "1:02:03");
  EXPECT_EQ(clock_text(std::nan("")), "?");
  EXPECT_EQ(progress_text(ProgressStyle::lines, 40, 300, 4.12345, 12345, 123),
            "step 40/300  loss 4.1235  12.3k tokens/s  2:03 left");
  EXPECT_EQ(progress_text(ProgressStyle::bar, 150, 300, 1, 5, 0),
            "[############............]  step 150/300  loss 1.0000  5 tokens/s  0:00 left");
}

TEST(Progress, LinesComeEveryFewStepsAndAtTheEnd) {
  testing::internal::CaptureStderr();
  {
    Progress progress(stderr, ProgressStyle::lines, 0, 7, 3);
    for (std::int64_t step = 1; step <= 7; ++step) progress.update(step, 10, 1.0);
  }
  const std::string text = testing::internal::GetCapturedStderr();
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 3) << text;
  for (const char* part : {"step 3/7", "step 6/7", "step 7/7"}) EXPECT_NE(text.find(part), std::string::npos);
  EXPECT_EQ(text.find('\r'), std::string::npos);
}

TEST(Progress, BarRedrawsOneLine) {
  std::FILE* file = std::tmpfile();
  ASSERT_NE(file, nullptr);
  EXPECT_EQ(style_for(file), ProgressStyle::lines);  // a file is no terminal
  {
    Progress progress(file, ProgressStyle::bar, 0, 2, 1);
    progress.update(1, 10, 1.0);
    progress.update(2, 10, 1.0);
  }
  std::rewind(file);
  char buffer[1024];
  const std::string text(buffer, std::fread(buffer, 1, sizeof buffer, file));
  std::fclose(file);
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 1);
  EXPECT_EQ(std::count(text.begin(), text.end(), '\r'), 2);
}

}  // namespace
}  // namespace tforge
