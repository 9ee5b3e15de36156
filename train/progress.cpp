#include "train/progress.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>

#include "core/log.h"

namespace tforge {

namespace {

constexpr int kBarWidth = 24;
constexpr std::chrono::milliseconds kRedraw{200};
constexpr const char* kClearLine = "\r\033[K";

std::string speed_text(double per_second) {
  if (!std::isfinite(per_second)) return "?";
  if (per_second >= 1e6) return fmt::format("{:.2f}M", per_second / 1e6);
  if (per_second >= 1e3) return fmt::format("{:.1f}k", per_second / 1e3);
  return fmt::format("{:.0f}", per_second);
}

}  // namespace

ProgressStyle style_for(std::FILE* out) {
  return ::isatty(::fileno(out)) == 1 ? ProgressStyle::bar : ProgressStyle::lines;
}

std::string clock_text(double seconds) {
  if (!std::isfinite(seconds) || seconds < 0) return "?";
  const auto total = static_cast<std::int64_t>(std::llround(seconds));
  if (total >= 3600) return fmt::format("{}:{:02}:{:02}", total / 3600, total / 60 % 60, total % 60);
  return fmt::format("{}:{:02}", total / 60, total % 60);
}

std::string progress_text(ProgressStyle style, std::int64_t step, std::int64_t steps, double loss,
                          double tokens_per_second, double seconds_left) {
  std::string text;
  if (style == ProgressStyle::bar) {
    const double done = steps > 0 ? static_cast<double>(step) / static_cast<double>(steps) : 1.0;
    const int full = static_cast<int>(std::clamp(done, 0.0, 1.0) * kBarWidth);
    text = fmt::format("[{}{}]  ", std::string(static_cast<std::size_t>(full), '#'),
                       std::string(static_cast<std::size_t>(kBarWidth - full), '.'));
  }
  return text + fmt::format("step {}/{}  loss {:.4f}  {} tokens/s  {} left", step, steps, loss,
                            speed_text(tokens_per_second), clock_text(seconds_left));
}

Progress::Progress(std::FILE* out, ProgressStyle style, std::int64_t first, std::int64_t steps, std::int64_t log_every)
    : out_(out),
      style_(style),
      first_(first),
      steps_(steps),
      log_every_(std::max<std::int64_t>(log_every, 1)),
      start_(Clock::now()),
      shown_(start_) {}

Progress::~Progress() {
  if (drawn_) std::fputc('\n', out_);
}

void Progress::update(std::int64_t step, std::int64_t tokens, double loss) {
  tokens_ += tokens;
  const Clock::time_point now = Clock::now();
  const bool due = style_ == ProgressStyle::bar ? !drawn_ || now - shown_ >= kRedraw : step % log_every_ == 0;
  if (!due && step != steps_) return;

  const std::chrono::duration<double> lap = now - shown_;
  const std::chrono::duration<double> all = now - start_;
  const double a_step = step > first_ ? all.count() / static_cast<double>(step - first_) : 0;
  const std::string text = progress_text(style_, step, steps_, loss, static_cast<double>(tokens_) / lap.count(),
                                         a_step * static_cast<double>(steps_ - step));
  if (style_ == ProgressStyle::bar) {
    std::fputs((kClearLine + text).c_str(), out_);
    std::fflush(out_);
    drawn_ = true;
  } else {
    log::info("{}", text);
  }
  shown_ = now;
  tokens_ = 0;
}

void Progress::clear() {
  if (!drawn_) return;
  std::fputs(kClearLine, out_);
  std::fflush(out_);
  drawn_ = false;
}

}  // namespace tforge
