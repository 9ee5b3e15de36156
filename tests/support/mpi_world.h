#pragma once
// What a test of several ranks gets from tests/support/mpi_main.cpp.
#include "parallel/communicator.h"

namespace tforge {

/// All ranks of the test.
Communicator& test_world();

}  // namespace tforge
