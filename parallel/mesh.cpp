#include "parallel/mesh.h"

#include "core/errors.h"

namespace tforge {

MeshSize MeshSize::of(int ranks, std::int64_t dp, std::int64_t tp) {
  if (dp < 0 || tp < 0) throw ConfigError("parallel.dp is {} and parallel.tp is {}, want 0 or more", dp, tp);
  const std::int64_t given = (dp == 0 ? 1 : dp) * (tp == 0 ? 1 : tp);
  if (ranks % given != 0) {
    throw ConfigError("parallel.dp = {} and parallel.tp = {} want a multiple of {} ranks, the job has {}", dp, tp,
                      given, ranks);
  }
  // What is not given follows from the ranks; with neither given all of them share the data.
  const std::int64_t its_tp = tp != 0 ? tp : (dp == 0 ? 1 : ranks / dp);
  const std::int64_t its_dp = dp != 0 ? dp : ranks / its_tp;
  if (its_dp * its_tp != ranks) {
    throw ConfigError("parallel.dp * parallel.tp = {} * {} = {} ranks, the job has {}; start {} ranks or change them",
                      its_dp, its_tp, its_dp * its_tp, ranks, its_dp * its_tp);
  }
  return {static_cast<int>(its_dp), static_cast<int>(its_tp)};
}

Mesh Mesh::create(Communicator& world, int dp, int tp) {
  const MeshSize size = MeshSize::of(world.size(), dp, tp);
  Mesh mesh;
  mesh.tp = size.tp;
  mesh.dp = size.dp;
  mesh.dp_index = world.rank() / mesh.tp;
  mesh.tp_index = world.rank() % mesh.tp;
  mesh.dp_comm = world.split(mesh.tp_index, mesh.dp_index);
  mesh.tp_comm = world.split(mesh.dp_index, mesh.tp_index);
  return mesh;
}

}  // namespace tforge
