#pragma once
// The CUDA emulator: what it shows and what it cannot.
//
// Every thread of a block is a fiber of its own; blocks run one after another on the thread that launches, and a launch
// is done when it returns. It finds
//   - threads of a block that wait at different __syncthreads(), or of which some have ended: the program stops;
//   - a barrier that is missing between warps, by its results: a warp goes on alone from exchange to exchange;
//   - lanes of a warp missing from a shuffle or a product of its tensor core, or at different ones, likewise;
//   - copies into shared memory (cp.async) that are read before the wait for them: until then NaN is there;
//   - memory that is read before anything was written to it: device memory is born NaN (all bits one);
//   - writes just before or behind an allocation: guards around it are checked when it is freed and at every wait;
//     with AddressSanitizer every access to them, and to memory that was freed;
//   - the host's hands on memory of the device, which is closed to it but in copies: the program stops;
//   - accesses of packs, rows and copies that are not aligned: they stop the program, as on a device;
//   - writes just behind the dynamic shared memory that a launch asked for;
//   - with TFORGE_EMULATOR_ORDER=<seed>, results that depend on the order of blocks and threads: both run shuffled.
// With TFORGE_EMULATOR_DEVICES=<n> a process sees n devices, of which it uses one as always; with
// TFORGE_EMULATOR_NAME another name of the device than "an emulated device"; with TFORGE_EMULATOR_FASTEST=<k> events
// say that of the algorithms of a product, which sum in different orders, number k is the fastest; with
// TFORGE_EMULATOR_STUCK what is queued on its streams of a priority never ends.
// It says nothing about speed, the memory model (a missing fence or __syncwarp between the threads of a warp), limits
// of registers, cuBLASLt's algorithms, the order and precision of a tensor core's sums, or several streams at once:
// work is done in the order in which it is issued.
