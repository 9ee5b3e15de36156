#!/usr/bin/env bash
# scripts/sanitize.sh [ctest options...]: the quick tests under the address and undefined-behaviour sanitizers, in
# build-sanitize/. Leaks inside Open MPI are listed in tests/sanitizers/lsan.supp.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

scripts/setup.sh
scripts/build.sh build-sanitize -DTFORGE_SANITIZE=address,undefined -DTFORGE_BENCH=OFF
choose_openblas_kernels
# Open MPI is built without frame pointers: only the slow unwinder sees which library a leak comes from.
export ASAN_OPTIONS=detect_leaks=1:allocator_may_return_null=1:fast_unwind_on_malloc=0:detect_stack_use_after_return=1
export LSAN_OPTIONS=suppressions=$PWD/tests/sanitizers/lsan.supp:print_suppressions=0
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
exec ctest --test-dir build-sanitize --output-on-failure --no-tests=error -L quick "$@"
