#!/usr/bin/env bash
# scripts/sanitize.sh [ctest options...]: the quick tests under the address and undefined-behaviour sanitizers, in
# build-sanitize/. Leaks inside Open MPI are listed in tests/sanitizers/lsan.supp. First, where clang is, the threads that
# are not OpenMP's (reading ahead, heartbeats, a save) under the thread sanitizer, in build-tsan/.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

scripts/setup.sh
scripts/build.sh build-sanitize -DTFORGE_SANITIZE=address,undefined -DTFORGE_BENCH=OFF
choose_openblas_kernels
# Open MPI is built without frame pointers: only the slow unwinder sees which library a leak comes from.
export ASAN_OPTIONS=detect_leaks=1:allocator_may_return_null=1:fast_unwind_on_malloc=0:detect_stack_use_after_return=1
export LSAN_OPTIONS=suppressions=$PWD/tests/sanitizers/lsan.supp:print_suppressions=0
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
if command -v clang++ >/dev/null; then
  CC=clang CXX=clang++ cmake -S . -B build-tsan -G Ninja -DTFORGE_SANITIZE=thread -DTFORGE_BENCH=OFF -DTFORGE_CUDA=OFF >/dev/null
  cmake --build build-tsan --target data_test heartbeat_test start_watch_test checkpoint_test
  # The sanitizer of clang 14 knows no address layout that is as random as a newer kernel's.
  setarch -R build-tsan/tests/data_test --gtest_filter='Prefetching.*'
  setarch -R build-tsan/tests/launch/heartbeat_test
  setarch -R build-tsan/tests/launch/start_watch_test
  # Alone, without mpirun: what matters is the thread that writes a checkpoint beside the training.
  TFORGE_EXPECT_RANKS=1 setarch -R build-tsan/tests/checkpoint_test --gtest_filter='Checkpoint.AThread*'
else
  say "clang++ is missing: no thread sanitizer"
fi
exec ctest --test-dir build-sanitize --output-on-failure --no-tests=error -L quick "$@"
