#include "core/profile.h"

#include <algorithm>

#include "core/device_queue.h"

namespace tforge {

void Profile::add(std::string_view name, double seconds, Work work) {
  auto entry = std::ranges::find(entries_, name, &Entry::name);
  if (entry == entries_.end()) entry = entries_.insert(entry, Entry{name, 0, 0, {}});
  ++entry->calls;
  entry->seconds += seconds;
  entry->work.flops += work.flops;
  entry->work.bytes += work.bytes;
}

void ProfileScope::begin() {
  if (!stream_.rehearses()) wait(stream_);
  begun_ = std::chrono::steady_clock::now();
}

void ProfileScope::end() {
  try {
    if (!stream_.rehearses()) wait(stream_);
  } catch (...) {  // NOLINT(bugprone-empty-catch): the next who waits hears of it, in no destructor
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begun_).count();
  stream_.profile()->add(name_, seconds, work_);
}

}  // namespace tforge
