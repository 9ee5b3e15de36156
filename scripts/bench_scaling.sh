#!/usr/bin/env bash
# scripts/bench_scaling.sh [rounds [build folder]]: time of a training step against width, sequence and batch, with the
# fitted exponents, by default over 3 rounds; bench/step_scaling.py says how. CORES (default 2) threads.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

rounds=${1:-3}
build=${2:-build}
[[ -x $build/bench/step_bench ]] || die "$build/bench/step_bench is missing; run scripts/build.sh $build"
exec "$(python_with json)" bench/step_scaling.py --rounds "$rounds" --build "$build" --cores "${CORES:-2}"
