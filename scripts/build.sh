#!/usr/bin/env bash
# scripts/build.sh [build folder] [cmake options...]: Release build with CMake and Ninja, by default in build/.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

build=${1:-build}
shift || true
cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release "$@"
cmake --build "$build" --parallel "$(nproc)"
