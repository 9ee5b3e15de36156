#include "core/profile.h"

#include <algorithm>

namespace tforge {

void Profile::add(std::string_view name, double seconds, Work work) {
  auto entry = std::ranges::find(entries_, name, &Entry::name);
  if (entry == entries_.end()) entry = entries_.insert(entry, Entry{name, 0, 0, {}});
  ++entry->calls;
  entry->seconds += seconds;
  entry->work.flops += work.flops;
  entry->work.bytes += work.bytes;
}

}  // namespace tforge
