#include "parallel/mesh.h"

#include "core/errors.h"

namespace tforge {

Mesh Mesh::create(Communicator& world, int dp, int tp) {
  const int ranks = world.size();
  if (dp < 0 || tp < 0) throw ConfigError("parallel.dp is {} and parallel.tp is {}, want 0 or more", dp, tp);
  const int given = (dp == 0 ? 1 : dp) * (tp == 0 ? 1 : tp);
  if (ranks % given != 0) {
    throw ConfigError("parallel.dp = {} and parallel.tp = {} want a multiple of {} ranks, the job has {}", dp, tp,
                      given, ranks);
  }
  Mesh mesh;
  // What is not given follows from the ranks; with neither given all of them share the data.
  mesh.tp = tp != 0 ? tp : (dp == 0 ? 1 : ranks / dp);
  mesh.dp = dp != 0 ? dp : ranks / mesh.tp;
  if (mesh.dp * mesh.tp != ranks) {
    throw ConfigError("parallel.dp * parallel.tp = {} * {} = {} ranks, the job has {}; start {} ranks or change them",
                      mesh.dp, mesh.tp, mesh.dp * mesh.tp, ranks, mesh.dp * mesh.tp);
  }
  mesh.dp_index = world.rank() / mesh.tp;
  mesh.tp_index = world.rank() % mesh.tp;
  mesh.dp_comm = world.split(mesh.tp_index, mesh.dp_index);
  mesh.tp_comm = world.split(mesh.dp_index, mesh.tp_index);
  return mesh;
}

}  // namespace tforge
