// libFuzzer's entry. The environment variable TFORGE_FUZZ_TARGET names the target.
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "fuzz/targets.h"

namespace {

const tforge::fuzz::Target& chosen() {
  const char* name = std::getenv("TFORGE_FUZZ_TARGET");
  return tforge::fuzz::target(name == nullptr ? "" : name);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t count) {
  static const tforge::fuzz::Target& target = chosen();
  target.run({bytes, count});
  return 0;
}
