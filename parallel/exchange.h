#pragma once
// What a training step sends, as data: collectives by purpose, their calls and bytes.
#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace tforge {

enum class MeshAxis : std::uint8_t { dp, tp };
enum class Collective : std::uint8_t { all_reduce, all_gather, reduce_scatter };
/// in_line: the step waits for it where it happens. during_backward: it is started while backward runs.
enum class Timing : std::uint8_t { in_line, during_backward };

/// Collectives of one kind and purpose in one step.
struct Exchange {
  std::string what;
  MeshAxis axis = MeshAxis::dp;
  Collective kind = Collective::all_reduce;
  std::int64_t calls = 0;
  std::int64_t bytes = 0;  // of all calls, handed over by this rank
  Timing timing = Timing::in_line;
};

/// Adds up what is said of the parts of a step.
class Exchanges {
 public:
  void add(const char* what, MeshAxis axis, Collective kind, std::int64_t calls, std::int64_t bytes,
           Timing timing = Timing::in_line) {
    const auto same = std::ranges::find_if(
        all_, [&](const Exchange& x) { return x.what == what && x.axis == axis && x.kind == kind; });
    if (same == all_.end()) {
      all_.push_back({what, axis, kind, calls, bytes, timing});
      return;
    }
    same->calls += calls;
    same->bytes += bytes;
  }
  std::vector<Exchange> take() { return std::move(all_); }

 private:
  std::vector<Exchange> all_;
};

}  // namespace tforge
