#pragma once
// metrics.jsonl: one JSON object a line, written by rank 0.
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>
#include <variant>

namespace tforge {

/// One member of the object. A double that is not finite is written as null, since JSON has no such numbers.
struct Metric {
  std::string_view name;
  std::variant<std::int64_t, double, std::string> value;
};

/// Appends to a file. Each line is flushed, so that a reader or a crash sees whole lines. Throws ResourceError when
/// the file cannot be opened or written.
class MetricsWriter {
 public:
  /// Goes on after `step`: lines of later steps, which a killed run left behind and which will be written again, and
  /// a torn last line are cut off. step = -1 begins anew.
  MetricsWriter(std::string path, std::int64_t step);

  /// Members in the order given; by custom the first is "step".
  void write(std::initializer_list<Metric> members);

 private:
  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  std::string path_;
  std::unique_ptr<std::FILE, Close> file_;
};

}  // namespace tforge
