#pragma once
// One outcome for all ranks.
#include <functional>
#include <string>
#include <vector>

#include "parallel/communicator.h"

namespace tforge {

/// Runs `work` on every rank and returns what each rank's returned, in rank order. When it throws on any rank, every
/// rank throws the error of the lowest such rank, with the same exit code and text (the rank is named when it is not
/// 0): nobody is left waiting in a later collective. Collective; `work` itself must not communicate.
std::vector<std::string> together(Communicator& world, const std::function<std::string()>& work);

}  // namespace tforge
