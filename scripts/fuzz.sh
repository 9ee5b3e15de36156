#!/usr/bin/env bash
# scripts/fuzz.sh [seconds [target...]]: runs the readers of untrusted files (tests/fuzz/) under libFuzzer with the
# address and undefined-behaviour sanitizers, each for so many seconds (60), and prints executions, edges of the control
# flow that were reached, crashes, and crashes inside libraries (HDF5, sentencepiece). Needs clang 14 with its runtime
# (Debian: clang libclang-rt-dev libomp-dev); built in build-fuzz/. Inputs that break something are kept in
# build-fuzz/findings/TARGET/, those that break a library in libraries/ below it; make each small with
#   TFORGE_FUZZ_TARGET=TARGET build-fuzz/tests/fuzz/fuzz_readers -minimize_crash=1 -runs=10000 FILE
# and put it into tests/fuzz/regressions/TARGET/, where the test fuzz.* reads it from then on.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

seconds=${1:-60}
shift || true
targets=("$@")
if ((${#targets[@]} == 0)); then
  targets=(config documents tokenizer token_dataset published_file manifest checkpoint)
fi
command -v clang++ >/dev/null || die "clang++ is missing; on Debian: apt-get install clang libclang-rt-dev libomp-dev"

build=$PWD/build-fuzz
CC=clang CXX=clang++ cmake -S . -B "$build" -G Ninja -DCMAKE_CXX_FLAGS_RELEASE="-O1 -Wno-pass-failed" -DTFORGE_BENCH=OFF -DTFORGE_CUDA=OFF -DTFORGE_FUZZ=ON \
  -DTFORGE_SANITIZE=fuzzer-no-link,address,undefined,float-cast-overflow >/dev/null
cmake --build "$build" --target fuzz_seeds fuzz_readers

# Files are written anew for each input: in memory where there is such a file system.
scratch=$(mktemp -d -p "$([[ -w /dev/shm ]] && echo /dev/shm || echo "${TMPDIR:-/tmp}")")
trap 'rm -rf "$scratch"' EXIT
export TMPDIR=$scratch
choose_openblas_kernels
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
mkdir "$scratch/found"
"$build/tests/fuzz/fuzz_seeds" "$scratch/seeds" >/dev/null

printf '%-16s %8s %12s %8s %8s %8s %12s\n' target seconds executions edges corpus crashes in_libraries
failed=0
for target in "${targets[@]}"; do
  corpus=$build/corpus/$target findings=$build/findings/$target log=$build/$target.log
  mkdir -p "$corpus" "$findings/libraries"
  folders=("$corpus" "$scratch/seeds/$target")
  if [[ -d tests/fuzz/regressions/$target ]]; then folders+=("tests/fuzz/regressions/$target"); fi
  start=$SECONDS crashes=0 in_libraries=0
  : >"$log"
  # A crash ends the fuzzer: it is started again for what is left of the time.
  while left=$((seconds - (SECONDS - start))) && ((left > 0)); do
    TFORGE_FUZZ_TARGET=$target "$build/tests/fuzz/fuzz_readers" "${folders[@]}" -artifact_prefix="$scratch/found/" -max_total_time="$left" -timeout=5 \
      -report_slow_units=2 -malloc_limit_mb=256 -rss_limit_mb=3000 -max_len=65536 -print_final_stats=1 \
      >"$scratch/log" 2>&1 || true
    cat "$scratch/log" >>"$log"
    # Whose the innermost function is that is not the sanitizer's or the C library's.
    case $(awk '/^ *#[0-9]+ 0x/ { if (/lib(hdf5|sentencepiece|protobuf)/) print "library"; else if (/tforge::/) print "ours"; else next; exit }' "$scratch/log") in
      library) in_libraries=$((in_libraries + 1)) keep=$findings/libraries ;;
      ours) crashes=$((crashes + 1)) keep=$findings ;;
      *) keep=$findings ;;  # slow inputs
    esac
    find "$scratch/found" -type f -exec mv -t "$keep" {} +
  done
  executions=$(awk '/stat::number_of_executed_units/ { sum += $2 } END { print sum + 0 }' "$log")
  edges=$(sed -nE 's/.* cov: ([0-9]+) .*/\1/p' "$log" | sort -n | tail -n 1)
  printf '%-16s %8d %12d %8s %8d %8d %12d\n' "$target" $((SECONDS - start)) "$executions" "${edges:--}" \
    "$(find "$corpus" -type f | wc -l)" "$crashes" "$in_libraries"
  if ((crashes > 0)); then failed=1; fi
done
exit "$failed"
