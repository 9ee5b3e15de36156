#include "emulator.h"

#include <cuda_runtime.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

// AddressSanitizer wants to hear when the stack changes, and what memory is out of bounds.
#ifdef __has_feature
#if __has_feature(address_sanitizer)
#define TFORGE_ADDRESS_SANITIZER 1
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#define TFORGE_ADDRESS_SANITIZER 1
#endif
#ifdef TFORGE_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes)
namespace {
// NOLINTBEGIN: the names are the sanitizer's
void __sanitizer_start_switch_fiber(void**, const void*, std::size_t) {}
void __sanitizer_finish_switch_fiber(void*, const void**, std::size_t*) {}
// NOLINTEND
}  // namespace
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Saves the registers that a call keeps, puts the stack pointer at *from, and goes on where `to` was saved.
extern "C" void tforge_switch_stack(void** from, void* to);
asm(R"(
.text
.globl tforge_switch_stack
.type tforge_switch_stack, @function
tforge_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size tforge_switch_stack, .-tforge_switch_stack
)");

namespace tforge_emulator {

[[noreturn]] static void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulator: %s, in block (%u, %u, %u), thread (%u, %u, %u)\n", what, blockIdx.x, blockIdx.y,
               blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
  std::abort();
}

namespace {

constexpr std::size_t kStackBytes = std::size_t{64} << 10;
constexpr unsigned kMostThreads = 1024;
constexpr unsigned kLanes = 32;
constexpr int kBehindByte = 0x5a;  // behind shared memory

struct Fiber {
  enum State { ready, at_barrier, in_warp, ended } state = ended;
  void* stack = nullptr;       // where it goes on
  void* fake_stack = nullptr;  // of AddressSanitizer
  uint3 index{};
  unsigned line = 0;  // where it waits
  unsigned exchanges = 0;
  void* argument = nullptr;  // of an operation of its warp
  void (*operation)(void* const*) = nullptr;
  struct Copy {
    void* to;
    const void* from;
    std::size_t bytes;
    std::size_t group;
  };
  std::vector<Copy> copies;  // into shared memory, that were started and are not there
  std::size_t groups = 0;    // of copies, ended
};

/// Of a warp: what its lanes hand over, for one exchange and the one before, whose values slow lanes still read.
struct Warp {
  std::uint64_t handed[2][kLanes];
};

struct Machine {
  std::vector<Fiber> fibers{kMostThreads};
  std::vector<Warp> warps{kMostThreads / kLanes};
  std::byte* stacks = nullptr;
  void* scheduler = nullptr;  // where it goes on
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_bytes = 0;
  Fiber* running = nullptr;
  unsigned threads = 0;  // of a block
  const std::function<void()>* thread = nullptr;
  static constexpr std::size_t kShared = std::size_t{227} << 10, kBehind = 256;
  alignas(128) std::byte shared[kShared + kBehind];
  std::size_t shared_bytes = 0;  // that the launch asked for
  bool launched = false;
};
Machine machine;

void stop_running() {
  Fiber* self = machine.running;
  __sanitizer_start_switch_fiber(&self->fake_stack, machine.scheduler_stack, machine.scheduler_bytes);
  tforge_switch_stack(&self->stack, machine.scheduler);
  __sanitizer_finish_switch_fiber(self->fake_stack, &machine.scheduler_stack, &machine.scheduler_bytes);
}

/// The life of a fiber: one thread after another.
[[noreturn]] void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_bytes);
  for (;;) {
    (*machine.thread)();
    if (!machine.running->copies.empty()) fail("a thread ended without waiting for its copies");
    machine.running->state = Fiber::ended;
    stop_running();
  }
}

void resume(Fiber& fiber) {
  machine.running = &fiber;
  threadIdx = fiber.index;
  void* fake_stack = nullptr;
  const auto number = static_cast<std::size_t>(&fiber - machine.fibers.data());
  __sanitizer_start_switch_fiber(&fake_stack, machine.stacks + number * kStackBytes, kStackBytes);
  tforge_switch_stack(&machine.scheduler, fiber.stack);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

void make_fibers() {
  void* memory = ::mmap(nullptr, kStackBytes * kMostThreads, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) fail("no memory for stacks");
  machine.stacks = static_cast<std::byte*>(memory);
  for (unsigned i = 0; i < kMostThreads; ++i) {
    // As if fiber_main had been called: six registers below its address, the stack aligned as behind a call.
    auto* top = reinterpret_cast<void**>(machine.stacks + (i + 1) * kStackBytes) - 2;
    *top = reinterpret_cast<void*>(&fiber_main);
    for (int r = 1; r <= 6; ++r) top[-r] = nullptr;
    machine.fibers[i].stack = top - 6;
  }
}

/// The operation at which the lanes from `first` on have arrived, if it is one.
void operate(unsigned first, unsigned end) {
  const auto operation = machine.fibers[first].operation;
  void* arguments[kLanes];
  for (unsigned i = first; i < end; ++i) {
    threadIdx = machine.fibers[i].index;
    if (machine.fibers[i].operation != operation) fail("lanes of a warp are in different operations");
    arguments[i - first] = std::exchange(machine.fibers[i].argument, nullptr);
    machine.fibers[i].operation = nullptr;
  }
  if (operation == nullptr) return;
  if (end - first < kLanes) fail("an operation of a warp of fewer than 32 lanes");
  operation(arguments);
}

/// Lets one warp go on all of whose lanes have arrived at an exchange: each goes as far as it can before the next, so
/// that a barrier that is missing between warps shows. Stops the program when a lane can never come.
bool release_warp() {
  for (unsigned first = 0; first < machine.threads; first += kLanes) {
    const unsigned end = std::min(machine.threads, first + kLanes);
    unsigned waiting = 0;
    for (unsigned i = first; i < end; ++i) waiting += machine.fibers[i].state == Fiber::in_warp ? 1 : 0;
    if (waiting == 0) continue;
    for (unsigned i = first; i < end; ++i) {
      threadIdx = machine.fibers[i].index;
      if (waiting < end - first && machine.fibers[i].state != Fiber::in_warp) {
        fail("a lane is missing from an exchange of its warp");
      }
      if (machine.fibers[i].line != machine.fibers[first].line) fail("lanes of a warp are in different exchanges");
    }
    operate(first, end);
    for (unsigned i = first; i < end; ++i) machine.fibers[i].state = Fiber::ready;
    return true;
  }
  return false;
}

/// True when all threads wait at one barrier, which lets them go on; false when all have ended.
bool release_block() {
  unsigned waiting = 0;
  for (unsigned i = 0; i < machine.threads; ++i) waiting += machine.fibers[i].state == Fiber::at_barrier ? 1 : 0;
  if (waiting == 0) return false;
  for (unsigned i = 0; i < machine.threads; ++i) {
    threadIdx = machine.fibers[i].index;
    if (machine.fibers[i].state != Fiber::at_barrier) fail("a thread ended while others wait in __syncthreads()");
    if (machine.fibers[i].line != machine.fibers[0].line) fail("threads wait at different __syncthreads()");
    machine.fibers[i].state = Fiber::ready;
  }
  return true;
}

void run_block(const std::vector<unsigned>& order) {
  for (unsigned i = 0; i < machine.threads; ++i) {
    machine.fibers[i].state = Fiber::ready;
    machine.fibers[i].exchanges = 0;
    machine.fibers[i].groups = 0;
  }
  do {
    for (const unsigned i : order) {
      if (machine.fibers[i].state == Fiber::ready) resume(machine.fibers[i]);
    }
  } while (release_warp() || release_block());
}

/// Blocks and threads in their order, or shuffled by TFORGE_EMULATOR_ORDER.
std::vector<unsigned> order_of(unsigned count, unsigned salt) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0U);
  static const char* const seed = std::getenv("TFORGE_EMULATOR_ORDER");
  if (seed != nullptr) {
    std::mt19937 random(static_cast<unsigned>(std::strtoul(seed, nullptr, 10)) + salt);
    std::ranges::shuffle(order, random);
  }
  return order;
}

void wait_as(Fiber::State state, unsigned line) {
  machine.running->state = state;
  machine.running->line = line;
  stop_running();
}

}  // namespace

void run(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  if (machine.launched) fail("a launch inside a launch");
  const DeviceAccess access;
  machine.launched = true;
  if (machine.stacks == nullptr) make_fibers();
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  machine.threads = blockDim.x * blockDim.y * blockDim.z;
  machine.thread = &thread;
  machine.shared_bytes = config.dynamicSmemBytes;
  if (machine.threads == 0 || machine.threads > kMostThreads) fail("a block of no or more than 1024 threads");
  if (gridDim.x == 0 || gridDim.y == 0 || gridDim.z == 0) fail("a grid without blocks");
  if (gridDim.y > 65535 || gridDim.z > 65535) fail("a grid of more than 65535 blocks in y or z");
  if (config.dynamicSmemBytes > Machine::kShared) fail("too much dynamic shared memory");
  for (unsigned i = 0; i < machine.threads; ++i) {
    machine.fibers[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
  }
  const std::vector<unsigned> threads = order_of(machine.threads, 1);
  for (const unsigned b : order_of(gridDim.x * gridDim.y * gridDim.z, 2)) {
    blockIdx = {b % gridDim.x, b / gridDim.x % gridDim.y, b / gridDim.x / gridDim.y};
    std::memset(machine.shared, 0xff, machine.shared_bytes);
    std::memset(machine.shared + machine.shared_bytes, kBehindByte, Machine::kBehind);
    run_block(threads);
    for (std::size_t i = 0; i < Machine::kBehind; ++i) {
      if (machine.shared[machine.shared_bytes + i] != std::byte{kBehindByte}) fail("a write behind shared memory");
    }
  }
  machine.launched = false;
}

std::byte* dynamic_shared_memory() { return machine.shared; }

int lane() { return static_cast<int>((machine.running - machine.fibers.data()) % kLanes); }

void block_barrier(unsigned line) { wait_as(Fiber::at_barrier, line); }

const std::uint64_t* warp_exchange(std::uint64_t mine, unsigned line) {
  Fiber& self = *machine.running;
  const auto number = static_cast<std::size_t>(&self - machine.fibers.data());
  std::uint64_t* const handed = machine.warps[number / kLanes].handed[self.exchanges++ % 2];
  handed[number % kLanes] = mine;
  wait_as(Fiber::in_warp, line);
  return handed;
}

void warp_operation(void* mine, void (*f)(void* const* lanes), unsigned line) {
  machine.running->argument = mine;
  machine.running->operation = f;
  wait_as(Fiber::in_warp, line);
}

}  // namespace tforge_emulator

namespace {

// Every allocation lies between guards.
constexpr std::size_t kGuard = 256;
constexpr int kGuardByte = 0xa5, kUnwritten = 0xff;

std::size_t with_guards(std::size_t bytes) { return (bytes + 3 * kGuard - 1) / kGuard * kGuard; }

/// Makes an allocation of `bytes` at `start`, where with_guards(bytes) bytes are.
void* place(std::byte* start, std::size_t bytes) {
  ASAN_UNPOISON_MEMORY_REGION(start, with_guards(bytes));
  std::memset(start, kGuardByte, with_guards(bytes));
  std::memset(start + kGuard, kUnwritten, bytes);
  ASAN_POISON_MEMORY_REGION(start, kGuard);
  ASAN_POISON_MEMORY_REGION(start + kGuard + bytes, with_guards(bytes) - kGuard - bytes);
  return start + kGuard;
}

void check_guards([[maybe_unused]] const void* memory, [[maybe_unused]] std::size_t bytes) {
#ifndef TFORGE_ADDRESS_SANITIZER  // which sees the access itself
  const auto* data = static_cast<const unsigned char*>(memory);
  for (std::size_t i = 0; i < kGuard; ++i) {
    if (*(data - 1 - i) == kGuardByte && data[bytes + i] == kGuardByte) continue;
    std::fprintf(stderr, "CUDA emulator: a write outside an allocation of %zu bytes\n", bytes);
    std::abort();
  }
#endif
}

/// The device's memory: a range of addresses that are closed to the host but while kernels and copies run.
struct DeviceMemory {
  static constexpr std::size_t kAddresses = std::size_t{16} << 30, kHugePage = std::size_t{2} << 20;
  std::byte* begin = nullptr;
  std::size_t used = 0;  // addresses handed out, in huge pages
  int open = 0;
  std::map<std::size_t, std::size_t> blocks;  // live allocations: bytes by the offset of the first guard

  void protect(int access) const {
    if (used > 0 && ::mprotect(begin, used, access) != 0) tforge_emulator::fail("mprotect failed");
  }
  bool holds(const void* address) const { return begin != nullptr && address >= begin && address < begin + kAddresses; }
};
DeviceMemory device;

[[maybe_unused]] void say_who_touched_it(int number, siginfo_t* info, void*) {
  if (device.holds(info->si_addr)) {
    constexpr char kText[] = "CUDA emulator: the host touched memory of the device\n";
    static_cast<void>(!::write(2, kText, sizeof(kText) - 1));
  }
  ::signal(number, SIG_DFL);  // and the access comes again
}

void reserve_device_memory() {
  void* memory = ::mmap(nullptr, DeviceMemory::kAddresses + DeviceMemory::kHugePage, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) tforge_emulator::fail("no addresses for the memory of the device");
  const std::size_t past = reinterpret_cast<std::uintptr_t>(memory) % DeviceMemory::kHugePage;
  device.begin = static_cast<std::byte*>(memory) + (past == 0 ? 0 : DeviceMemory::kHugePage - past);
  ::madvise(device.begin, DeviceMemory::kAddresses, MADV_HUGEPAGE);  // fewer pages to open and close
#ifndef TFORGE_ADDRESS_SANITIZER                                     // which tells more
  struct sigaction action {};
  action.sa_sigaction = say_who_touched_it;
  action.sa_flags = SA_SIGINFO;
  ::sigaction(SIGSEGV, &action, nullptr);
#endif
}

/// A copy out of the host's memory.
struct Upload {
  std::byte* to;
  std::size_t to_pitch;
  const std::byte* from;
  std::size_t from_pitch, row_bytes, rows;
};
/// Those that have not been done. Each is as late as it may be: when the device next does anything.
std::vector<Upload> uploads;

void copy_rows(const Upload& u) {
  for (std::size_t r = 0; r < u.rows; ++r) {
    std::memmove(u.to + r * u.to_pitch, u.from + r * u.from_pitch, u.row_bytes);
  }
}

/// Allocations by cudaMallocHost.
std::map<void*, std::size_t>& pinned() {
  static std::map<void*, std::size_t> all;
  return all;
}

}  // namespace

namespace tforge_emulator {

namespace ptx {

namespace {

using Half = std::uint16_t;
float widened(unsigned half) { return std::bit_cast<float>(half << 16); }

/// Stops the program unless 16 bytes of shared memory may be at `address`.
void check_shared(const void* address) {
  const auto* at = static_cast<const std::byte*>(address);
  if (reinterpret_cast<std::uintptr_t>(at) % 16 != 0) fail("an address in shared memory that is not at 16 bytes");
  const bool on_stack = at >= machine.stacks && at < machine.stacks + kStackBytes * kMostThreads;
  if (on_stack || device.holds(at)) fail("an address that is not in shared memory");
  const bool dynamic = at >= machine.shared && at < machine.shared + sizeof(machine.shared);
  if (dynamic && at + 16 > machine.shared + machine.shared_bytes) fail("an address behind shared memory");
}

struct Product {
  float (*c)[4];
  const unsigned (*a)[4];
  const unsigned (*b)[2];
};
void multiply(void* const* lanes) {
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& [c_, a_, b_] = *static_cast<const Product*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i)
        a[g + i % 2 * 8][i / 2 * 8 + 2 * t + half] = widened((*a_)[i] >> (16 * half) & 0xffff);
      for (int i = 0; i < 2; ++i) b[i * 8 + 2 * t + half][g] = widened((*b_)[i] >> (16 * half) & 0xffff);
      for (int i = 0; i < 2; ++i) c[g + i * 8][2 * t + half] = (*c_)[2 * i + half];
    }
  }
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto& to = *static_cast<const Product*>(lanes[lane])->c;
    for (int i = 0; i < 4; ++i) to[i] = c[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
  }
}

struct Matrices {
  unsigned (*x)[4];
  const void* row;
};
template <bool kTransposed>
void load_matrices(void* const* lanes) {
  for (int m = 0; m < 4; ++m) {
    Half matrix[8][8];
    for (int r = 0; r < 8; ++r) std::memcpy(matrix[r], static_cast<const Matrices*>(lanes[8 * m + r])->row, 16);
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const unsigned low = kTransposed ? matrix[2 * t][g] : matrix[g][2 * t];
      const unsigned high = kTransposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
      (*static_cast<const Matrices*>(lanes[lane])->x)[m] = low | high << 16;
    }
  }
}

}  // namespace

void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], unsigned line) {
  Product product{&c, &a, &b};
  warp_operation(&product, multiply, line);
}
void ldmatrix_x4(unsigned (&x)[4], const void* row, unsigned line) {
  check_shared(row);
  Matrices matrices{&x, row};
  warp_operation(&matrices, load_matrices<false>, line);
}
void ldmatrix_x4_trans(unsigned (&x)[4], const void* row, unsigned line) {
  check_shared(row);
  Matrices matrices{&x, row};
  warp_operation(&matrices, load_matrices<true>, line);
}

void cp_async_16(void* to, const void* from, int bytes) {
  check_shared(to);
  if (bytes > 0 && !device.holds(from)) fail("a copy from what is not memory of the device");
  if (reinterpret_cast<std::uintptr_t>(from) % 16 != 0) fail("a copy from an address that is not at 16 bytes");
  std::memset(to, 0xff, 16);
  machine.running->copies.push_back({to, from, static_cast<std::size_t>(bytes), machine.running->groups});
}
void cp_async_commit() { ++machine.running->groups; }
void cp_async_wait(std::size_t groups) {
  Fiber& self = *machine.running;
  std::erase_if(self.copies, [&](const Fiber::Copy& copy) {
    if (copy.group + groups >= self.groups) return false;
    std::memset(copy.to, 0, 16);
    if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
    return true;
  });
}

float ex2_approx_ftz(float x) {
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0 : y;
}

}  // namespace ptx

DeviceAccess::DeviceAccess() {
  if (device.open++ > 0) return;
  device.protect(PROT_READ | PROT_WRITE);
  for (const Upload& upload : uploads) copy_rows(upload);
  uploads.clear();
}
DeviceAccess::~DeviceAccess() {
  if (--device.open == 0) device.protect(PROT_NONE);
}

}  // namespace tforge_emulator

cudaError_t cudaGetDeviceCount(int* count) {
  const char* text = std::getenv("TFORGE_EMULATOR_DEVICES");
  *count = text == nullptr ? 1 : static_cast<int>(std::strtol(text, nullptr, 10));
  return cudaSuccess;
}
namespace {
int device_number = 0;
}
cudaError_t cudaSetDevice(int number) {
  int count = 0;
  cudaGetDeviceCount(&count);
  if (number < 0 || number >= count) return cudaErrorInvalidValue;
  device_number = number;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* number) {
  *number = device_number;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int number) {
  *properties = {};
  properties->uuid.bytes[0] = static_cast<char>(number);
  const char* name = std::getenv("TFORGE_EMULATOR_NAME");
  std::strncpy(properties->name, name != nullptr ? name : "an emulated device", sizeof(properties->name) - 1);
  properties->multiProcessorCount = 1;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorNotReady: return "not ready";
    case cudaErrorInvalidValue: break;
  }
  return "invalid argument";
}

cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  if (device.begin == nullptr) reserve_device_memory();
  std::size_t at = 0;  // the first gap that is wide enough
  for (const auto& [offset, size] : device.blocks) {
    if (offset - at >= with_guards(bytes)) break;
    at = offset + with_guards(size);
  }
  const std::size_t end = at + with_guards(bytes);
  if (end > DeviceMemory::kAddresses) return cudaErrorMemoryAllocation;
  device.used =
      std::max(device.used, (end + DeviceMemory::kHugePage - 1) / DeviceMemory::kHugePage * DeviceMemory::kHugePage);
  device.blocks[at] = bytes;
  const tforge_emulator::DeviceAccess access;
  *memory = place(device.begin + at, bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  if (memory == nullptr) return cudaSuccess;
  if (!device.holds(memory)) return cudaErrorInvalidValue;
  const auto found =
      device.blocks.find(static_cast<std::size_t>(static_cast<std::byte*>(memory) - device.begin) - kGuard);
  if (found == device.blocks.end()) return cudaErrorInvalidValue;
  const tforge_emulator::DeviceAccess access;
  check_guards(memory, found->second);
  ASAN_POISON_MEMORY_REGION(memory, found->second);
  device.blocks.erase(found);
  return cudaSuccess;
}
cudaError_t cudaMallocHost(void** memory, std::size_t bytes) {
  auto* start = static_cast<std::byte*>(std::aligned_alloc(kGuard, with_guards(bytes)));
  if (start == nullptr) return cudaErrorMemoryAllocation;
  *memory = place(start, bytes);
  pinned()[*memory] = bytes;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* memory) {
  const auto found = pinned().find(memory);
  if (found == pinned().end()) return memory == nullptr ? cudaSuccess : cudaErrorInvalidValue;
  const tforge_emulator::DeviceAccess access;  // which may read it
  check_guards(memory, found->second);
  auto* const start = static_cast<std::byte*>(memory) - kGuard;
  ASAN_UNPOISON_MEMORY_REGION(start, with_guards(found->second));
  pinned().erase(found);
  std::free(start);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
  const tforge_emulator::DeviceAccess access;
  std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemset2DAsync(void* to, std::size_t pitch, int value, std::size_t row_bytes, std::size_t rows,
                              cudaStream_t) {
  const tforge_emulator::DeviceAccess access;
  for (std::size_t r = 0; r < rows; ++r) std::memset(static_cast<std::byte*>(to) + r * pitch, value, row_bytes);
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* memory) {
  attributes->type = device.holds(memory) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  for (const auto& [start, bytes] : pinned()) {
    if (memory >= start && memory < static_cast<const std::byte*>(start) + bytes) attributes->type = cudaMemoryTypeHost;
  }
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  return cudaMemcpy2DAsync(to, bytes, from, bytes, bytes, 1, kind, stream);
}
cudaError_t cudaMemcpy2DAsync(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch,
                              std::size_t row_bytes, std::size_t rows, cudaMemcpyKind, cudaStream_t) {
  if (to_pitch < row_bytes || from_pitch < row_bytes) return cudaErrorInvalidValue;
  const Upload copy{
      static_cast<std::byte*>(to), to_pitch, static_cast<const std::byte*>(from), from_pitch, row_bytes, rows};
  if (device.holds(to) && !device.holds(from)) {
    uploads.push_back(copy);
    return cudaSuccess;
  }
  const tforge_emulator::DeviceAccess access;
  copy_rows(copy);
  return cudaSuccess;
}
struct cudaEmulatedStream {
  bool of_priority = false;
};
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new cudaEmulatedStream;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  const cudaError_t status = cudaStreamCreateWithFlags(stream, flags);
  (*stream)->of_priority = true;
  return status;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
namespace {
std::chrono::steady_clock::duration passed{};  // beside the clock's own time
}
void tforge_emulator::pass_time(double milliseconds) {
  passed += std::chrono::duration_cast<std::chrono::steady_clock::duration>(
      std::chrono::duration<double, std::milli>(milliseconds));
}
struct cudaEmulatedEvent {
  std::chrono::steady_clock::time_point when;
  bool recorded = false;
  bool stuck = false;
};
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new cudaEmulatedEvent;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  *event = {std::chrono::steady_clock::now() + passed, true,
            stream->of_priority && std::getenv("TFORGE_EMULATOR_STUCK") != nullptr};
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (!event->recorded) return cudaErrorInvalidValue;
  return event->stuck ? cudaErrorNotReady : cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return event->recorded ? cudaSuccess : cudaErrorInvalidValue; }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  if (!begin->recorded || !end->recorded) return cudaErrorInvalidValue;
  *milliseconds = std::chrono::duration<float, std::milli>(end->when - begin->when).count();
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t event, unsigned) {
  return event->recorded ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  const tforge_emulator::DeviceAccess access;
  for (const auto& [offset, bytes] : device.blocks) check_guards(device.begin + offset + kGuard, bytes);
  for (const auto& [memory, bytes] : pinned()) check_guards(memory, bytes);
  return cudaSuccess;
}
