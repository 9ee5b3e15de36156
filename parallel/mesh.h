#pragma once
// The layout of the ranks of a job: dp x tp, as a value that is passed down.
#include <memory>

#include "parallel/communicator.h"

namespace tforge {

struct MeshSize {
  int dp = 1;
  int tp = 1;

  /// dp = 0 or tp = 0 is derived from the number of ranks. Throws ConfigError when dp * tp is not that number (the text
  /// shows the arithmetic).
  static MeshSize of(int ranks, std::int64_t dp, std::int64_t tp);
};

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

  /// Of the size that MeshSize::of() says. Collective. Throws ConfigError.
  static Mesh create(Communicator& world, int dp, int tp);
};

}  // namespace tforge
