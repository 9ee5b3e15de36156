#!/usr/bin/env bash
# gpu_check.sh: does this bundle work on this machine's GPU? Every test with Cuda in its name, golden files included, on
# the first device; then a run that goes from the processor to the device and back. The table comes last; exit code 1
# when a line of it failed or a test was skipped.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$root/checks.sh"

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
for name in core_test kernels_test model_test train_test; do
  skipped=
  # Those that are about machines without a device are left out.
  check "$name" env TFORGE_EXPECT_RANKS=1 "$root/libexec/tests/$name" --gtest_filter='*Cuda*-*Without*'
  if [[ -n $skipped ]]; then
    failed=1
    echo "$name: tests were skipped: $(sed -nE 's/.*(no CUDA device: .*)/\1/p' "$work/log" | head -1)"
  fi
done

prepare
train=("$root/bin/tf_train" --config "$root/share/tokenforge/configs/demo.toml" --set run.dir=run "${sizes[@]}")
check "train on the processor" "${train[@]}" --set train.steps=20
check "go on on the device" "${train[@]}" --set train.steps=40 --set run.device=cuda
check "go on on the processor" "${train[@]}" --set train.steps=60
check verify "$root/bin/tf_inspect" --verify run
finish
