#include "core/tensor.h"
#include "kernels/gemm.h"
