#include "parallel/mesh.h"

#include <gtest/gtest.h>

#include "core/errors.h"
#include "support/mpi_world.h"

namespace tforge {
namespace {

/// World ranks of a group, in its order.
std::vector<std::string> members(Communicator& group) {
  return group.all_gather_bytes(std::to_string(test_world().rank()));
}

TEST(Mesh, AllDataOrAllTensorParallel) {
  Communicator& world = test_world();
  const int p = world.size();
  const Mesh data = Mesh::create(world, p, 1);
  EXPECT_EQ(data.dp_index, world.rank());
  EXPECT_EQ(data.tp_index, 0);
  EXPECT_EQ(data.dp_comm->size(), p);
  EXPECT_EQ(data.dp_comm->rank(), world.rank());
  EXPECT_EQ(data.tp_comm->size(), 1);
  const Mesh tensor = Mesh::create(world, 1, p);
  EXPECT_EQ(tensor.tp_comm->size(), p);
  EXPECT_EQ(tensor.tp_comm->rank(), world.rank());
  EXPECT_EQ(tensor.dp_comm->size(), 1);
}

TEST(Mesh, DerivesWhatIsZero) {
  Communicator& world = test_world();
  const int p = world.size();
  const Mesh both = Mesh::create(world, 0, 0);
  EXPECT_EQ(both.dp, p);
  EXPECT_EQ(both.tp, 1);
  const Mesh dp = Mesh::create(world, 0, p);
  EXPECT_EQ(dp.dp, 1);
  const Mesh tp = Mesh::create(world, 1, 0);
  EXPECT_EQ(tp.tp, p);
}

TEST(Mesh, TensorParallelRanksAreNeighbours) {
  Communicator& world = test_world();
  if (world.size() != 4) return;  // 2 x 2 exists on four ranks alone
  const Mesh mesh = Mesh::create(world, 2, 2);
  EXPECT_EQ(mesh.dp_index, world.rank() / 2);
  EXPECT_EQ(mesh.tp_index, world.rank() % 2);
  EXPECT_EQ(mesh.dp_comm->rank(), mesh.dp_index);
  EXPECT_EQ(mesh.tp_comm->rank(), mesh.tp_index);
  using Names = std::vector<std::string>;
  EXPECT_EQ(members(*mesh.tp_comm), world.rank() < 2 ? (Names{"0", "1"}) : (Names{"2", "3"}));
  EXPECT_EQ(members(*mesh.dp_comm), world.rank() % 2 == 0 ? (Names{"0", "2"}) : (Names{"1", "3"}));
}

TEST(Mesh, RefusesALayoutThatIsNotTheJob) {
  Communicator& world = test_world();
  EXPECT_THROW(Mesh::create(world, world.size(), 2), ConfigError);
  EXPECT_THROW(Mesh::create(world, world.size() + 1, 0), ConfigError);
  EXPECT_THROW(Mesh::create(world, 1, 1), ConfigError);
  EXPECT_THROW(Mesh::create(world, -1, 2), ConfigError);
}

}  // namespace
}  // namespace tforge
