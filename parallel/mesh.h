#pragma once
// The layout of the ranks of a job: dp x tp, as a value that is passed down.
#include <memory>

#include "parallel/communicator.h"

namespace tforge {

/// World rank = dp_index * tp + tp_index: the ranks of one tensor-parallel group are neighbours.
///   tp: ranks that hold different parameter tokens, heads and vocabulary rows of one model
///   dp: ranks that hold the same shard and see different samples
struct Mesh {
  int dp = 1;
  int tp = 1;
  int dp_index = 0;
  int tp_index = 0;
  std::unique_ptr<Communicator> dp_comm;  // dp ranks, mine is dp_index
  std::unique_ptr<Communicator> tp_comm;  // tp ranks, mine is tp_index

  /// dp = 0 or tp = 0 is derived from the size of the world. Collective.
  /// Throws ConfigError when dp * tp is not the size of the world (the text shows the arithmetic).
  static Mesh create(Communicator& world, int dp, int tp);
};

}  // namespace tforge
