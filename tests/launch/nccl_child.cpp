// One rank of a job whose tensors lie on an emulated device and are reduced by the communicator over NCCL; it does what
// its first argument says. See nccl_test.cpp.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>

#include "core/device_queue.h"
#include "core/errors.h"
#include "core/tensor.h"
#include "parallel/device_world.h"

namespace tforge {
namespace {

void run(Communicator& world, const std::string& what) {
  DeviceQueue queue(Device::cuda, world.rank());
  const auto devices = create_nccl(world, queue.stream());
  Allocator memory(queue.stream());
  Tensor x = Tensor::zeros(memory, Shape{16}, DType::f32, Purpose::communication);
  if (what == "stuck" && world.rank() == 0) ::setenv("TFORGE_EMULATOR_STUCK", "1", 1);
  for (int step = 0; step < 5; ++step) {
    set_phase("backward", step);
    if (what == "late" && step == 2 && world.rank() == 1) std::this_thread::sleep_for(std::chrono::minutes(1));
    devices->all_reduce(queue.stream(), x.view(), ReduceOp::sum);
    wait(queue.stream());
  }
  world.barrier();
}

}  // namespace
}  // namespace tforge

int main(int argc, char** argv) {
  using namespace tforge;
  try {
    WorldOptions options;
    options.timeout_seconds = 1;
    const auto world = create_world(options);
    run(*world, argc > 1 ? argv[1] : "");
    world->shutdown();
    std::printf("done\n");
    return 0;
  } catch (const Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    std::fflush(stderr);
    std::_Exit(static_cast<int>(error.code()));
  }
}
