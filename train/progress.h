#pragma once
// Progress of a run for people: one bar that is redrawn on a terminal, plain lines elsewhere. Used by rank 0.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>

namespace tforge {

enum class ProgressStyle : std::uint8_t { bar, lines };

/// bar where `out` is a terminal, lines otherwise.
ProgressStyle style_for(std::FILE* out);

/// "1:02:03", "2:03"; "?" for what is not finite or negative.
std::string clock_text(double seconds);

/// What is shown: "step 40/300  loss 4.1234  12.3k tokens/s  2:03 left", with a bar before it on a terminal.
std::string progress_text(ProgressStyle style, std::int64_t step, std::int64_t steps, double loss,
                          double tokens_per_second, double seconds_left);

class Progress {
 public:
  /// Counts from `first` (updates made before) to `steps`; speed and time left are measured from now on.
  /// In the style of lines, one is written every `log_every` steps and at the last.
  Progress(std::FILE* out, ProgressStyle style, std::int64_t first, std::int64_t steps, std::int64_t log_every);
  /// Ends the line of a bar.
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// `step` updates are made now; `tokens` of them since the last call. Speed is over the time since the last text.
  void update(std::int64_t step, std::int64_t tokens, double loss);
  /// Clears a bar, so that a log line can be written; the next update draws it again.
  void clear();

 private:
  using Clock = std::chrono::steady_clock;
  std::FILE* out_;
  ProgressStyle style_;
  std::int64_t first_;
  std::int64_t steps_;
  std::int64_t log_every_;
  std::int64_t tokens_ = 0;  // since shown_
  Clock::time_point start_;
  Clock::time_point shown_;
  bool drawn_ = false;
};

}  // namespace tforge
