#pragma once
// What was chosen among several algorithms with the same result, up to rounding: the bits of a run depend on it, so a
// run keeps it.
#include <map>
#include <string>

#include "core/device.h"

namespace tforge::kernels {

class Choices {
 public:
  explicit Choices(Choosing how) : how_(how) {}

  /// Whether what is not known yet is to be measured now; else the library's rule decides, which is not kept.
  bool measures() const { return how_ == Choosing::measured && !settled_; }
  /// The choice for `question`, or null.
  const std::string* find(const std::string& question) const {
    const auto found = known_.find(question);
    return found == known_.end() ? nullptr : &found->second;
  }
  void keep(const std::string& question, const std::string& choice) { known_[question] = choice; }

  /// Whether anything is known or measured: else there is nothing to ask.
  bool any() const { return measures() || !known_.empty(); }
  /// By question.
  const std::map<std::string, std::string>& known() const { return known_; }
  /// From now on `known`, which stands in `source`, holds, and nothing is measured any more.
  void settle(std::map<std::string, std::string> known, std::string source) {
    known_ = std::move(known);
    source_ = std::move(source);
    settled_ = true;
  }
  const std::string& source() const { return source_; }

 private:
  Choosing how_;
  bool settled_ = false;
  std::string source_;
  std::map<std::string, std::string> known_;
};

}  // namespace tforge::kernels
