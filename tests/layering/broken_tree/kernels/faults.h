#include "../core/sound.h"

#include <cuda_runtime.h>
#include <gtest/gtest.h>
#include <hdf5.h>
#include <mpi.h>

#include "core/sound.h"
