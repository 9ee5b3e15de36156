#!/usr/bin/env bash
# scripts/bench_device.sh [options of bench/compare_device.py]: a training step on a CUDA device beside PyTorch's, in bf16, in
# the sizes of the published TokenFormers. TORCH_PYTHON names a Python whose PyTorch is for CUDA (default python3), BUILD the
# build folder (default build). Exits 1 when a target is not met.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

build=${BUILD:-build}
python=${TORCH_PYTHON:-python3}
[[ -x $build/bench/step_bench ]] || die "$build/bench/step_bench is missing; run scripts/build.sh $build"
"$python" -c 'import torch' 2>/dev/null || die "$python has no PyTorch; name one that has by TORCH_PYTHON"
exec "$python" bench/compare_device.py --step-bench "$build/bench/step_bench" --python "$python" "$@"
