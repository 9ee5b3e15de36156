#pragma once
// metrics.jsonl: one JSON object a line, written by rank 0.
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <variant>

namespace tforge {

/// One member of the object. A double that is not finite is written as null, since JSON has no such numbers.
struct Metric {
  std::string_view name;
  std::variant<std::int64_t, double, std::string> value;
};

/// Appends to a file, a line at a time, so that a reader or a crash sees whole lines. Lines that the disk refuses do
/// not end a run: they wait in memory, up to 16 MiB, and are written with a later one. A file that was removed is made
/// again.
class MetricsWriter {
 public:
  /// Throws ResourceError when the file cannot be opened. Goes on after `step`: lines of later steps, which a killed
  /// run left behind and which will be written again, and a torn last line are cut off. step = -1 begins anew.
  MetricsWriter(std::string path, std::int64_t step);
  ~MetricsWriter();
  MetricsWriter(const MetricsWriter&) = delete;
  MetricsWriter& operator=(const MetricsWriter&) = delete;

  /// Members in the order given; by custom the first is "step".
  void write(std::initializer_list<Metric> members);

 private:
  int open();
  int write_waiting();

  std::string path_;
  int descriptor_ = -1;
  std::int64_t end_ = 0;  // of the file
  std::string waiting_;   // for the disk
  std::int64_t lost_ = 0;
};

}  // namespace tforge
