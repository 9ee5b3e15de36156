#pragma once
// Files of the source tree that tests read.
#include <cstdlib>
#include <string>

namespace tforge {

/// Where `path`, as it lies in the source tree, is now: below TFORGE_SOURCE_FILES where the tests have been moved to
/// another machine, else in the tree that they were built from.
inline std::string source_file(const std::string& path) {
  const char* moved = std::getenv("TFORGE_SOURCE_FILES");
  return (moved != nullptr ? std::string(moved) : std::string(TFORGE_SOURCE_DIR)) + "/" + path;
}

}  // namespace tforge
