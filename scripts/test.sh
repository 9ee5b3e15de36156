#!/usr/bin/env bash
# scripts/test.sh [ctest options...]: sets up, builds and runs the tests labelled quick, full and fault. Options
# narrow the choice: `scripts/test.sh -L quick`, `scripts/test.sh -R kernels`. TFORGE_DATA_DIR names a folder of extra data.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

scripts/setup.sh
scripts/build.sh build
exec ctest --test-dir build --output-on-failure --no-tests=error -L 'quick|full|fault' "$@"
