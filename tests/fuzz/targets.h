#pragma once
// Readers of files from other hands, as functions of one input. libFuzzer calls them with inputs that it makes up
// (scripts/fuzz.sh), regressions_test.cpp with the seeds and with every input that once broke something.
//
// A target returns for a file that was read and for one that was refused with an error of ours of exit code 2, 3 or 4.
// Anything else is a finding: it throws Finding or what the reader threw, or the sanitizers end it.
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace tforge::fuzz {

struct Finding : std::logic_error {
  using std::logic_error::logic_error;
};

using Input = std::span<const std::uint8_t>;

struct Target {
  const char* name;
  void (*run)(Input input);
  std::vector<std::string> (*seeds)();  // small inputs that are read
};

/// All of them.
std::span<const Target> targets();
/// Throws std::invalid_argument for a name that is none.
const Target& target(const std::string& name);

}  // namespace tforge::fuzz
