#!/usr/bin/env bash
# scripts/bench_plan.sh [rounds [build folder]]: what tf_plan predicts beside measured steps, by default over 3 rounds;
# bench/compare_plan.py says how. Exits 1 when a prediction is off by more than 15 % (time) or 5 % (memory).
# CORES (default 2) threads. CONFIGURATIONS: which of bench_step.sh's (default all).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

rounds=${1:-3}
build=${2:-build}
[[ -x $build/bench/device_bench ]] || die "$build/bench/device_bench is missing; run scripts/build.sh $build"
arguments=(--rounds "$rounds" --build "$build" --cores "${CORES:-2}")
if [[ -n ${CONFIGURATIONS:-} ]]; then
  read -ra configurations <<<"$CONFIGURATIONS"
  arguments+=(--configurations "${configurations[@]}")
fi
exec "$(python_with json)" bench/compare_plan.py "${arguments[@]}"
