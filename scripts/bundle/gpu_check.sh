#!/usr/bin/env bash
# gpu_check.sh [PART...]: does this bundle work on this machine's GPU? The parts, all of them by default:
#   tests      every test with Cuda in its name, golden files included, on the first device; NCCL with one rank
#   ranks      2 and 4 ranks on that device: through pinned memory, and the communicator over NCCL with NCCL's calls
#              answered by MPI (lib/nccl_over_mpi)
#   runs       a run that goes from the processor to the device and back, its losses beside the processor's
#   memcheck, racecheck   the tests of the kernels under compute-sanitizer; left out where there is none, unless named
# The table comes last; exit code 1 when a line of it failed or a test was skipped.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
most_seconds=300
. "$root/checks.sh"
all=(tests ranks runs memcheck racecheck)
parts=("$@") named=$#
((${#parts[@]} > 0)) || parts=("${all[@]}")
# CUDA's libraries as PyTorch's wheels bring them, behind those of the system.
wheels=$(python3 -c 'import glob, sysconfig; print(":".join(glob.glob(sysconfig.get_paths()["purelib"] + "/nvidia/*/lib")))' 2>/dev/null)
[[ -z $wheels ]] || export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$wheels

# tests NAME RANKS PROGRAM FILTER [COMMAND...]: a check of tests, all of which run.
tests() {
  local name=$1 ranks=$2 program=$root/libexec/tests/$3 filter=$4 start
  shift 4
  start=("$@")
  ((ranks == 1)) || start+=("$root/bin/mpirun" -n "$ranks")
  all_run=yes check "$name" env "TFORGE_EXPECT_RANKS=$ranks" "${start[@]}" "$program" --gtest_filter="$filter"
}

on_one_device() {
  local name
  for name in core_test kernels_test autograd_test model_test train_test parallel_test; do
    # Without those of several ranks, and those that are about machines without a device.
    tests "$name" 1 "$name" '*Cuda*-*SeveralRanks*:*RanksThatShare*:*Without*'
  done
}

on_several_ranks() {
  local ranks over_mpi=LD_LIBRARY_PATH=$root/lib/nccl_over_mpi${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  for ranks in 2 4; do
    tests "parallel_test, $ranks ranks" "$ranks" parallel_test '*Cuda*' env OMP_NUM_THREADS=1 "$over_mpi"
    tests "train_test, $ranks ranks" "$ranks" train_test '*SeveralRanks*' env OMP_NUM_THREADS=1 "$over_mpi"
  done
}

there_and_back() {
  local train=("$root/bin/tf_train" --config "$root/share/tokenforge/configs/demo.toml" "${sizes[@]}" --set train.batch=4
    --set model.max_seq=64 --set train.schedule=constant)
  prepare
  check "train on the processor" "${train[@]}" --set run.dir=run --set train.steps=20
  cp -r run alone
  check "go on on the device" "${train[@]}" --set run.dir=run --set train.steps=40 --set run.device=cuda
  check "go on on the processor" "${train[@]}" --set run.dir=run --set train.steps=60
  check verify "$root/bin/tf_inspect" --verify run
  check "on the processor alone" "${train[@]}" --set run.dir=alone --set train.steps=60
  # shellcheck disable=SC2016  # awk's
  check "losses differ under 1e-3" awk '
    match($0, /"loss":[^,}]+/) && /"grad_norm"/ {
      loss = substr($0, RSTART + 7, RLENGTH - 7) + 0
      if (FILENAME == ARGV[1]) { there[++n] = loss; next }
      apart = there[++m] - loss
      if (loss <= 0 || apart > 1e-3 * loss || -apart > 1e-3 * loss) { print "step " m ": " there[m] " and " loss; bad = 1 }
    }
    END { if (n != 60 || m != 60) { print n " and " m " steps"; bad = 1 } exit bad }' run/metrics.jsonl alone/metrics.jsonl
}

sanitized() {
  if ! command -v compute-sanitizer >/dev/null; then
    table+=("$(printf '%-28s %s' "$1" 'not run: there is no compute-sanitizer here')")
    ((named == 0)) || failed=1
    return
  fi
  tests "$1" 1 kernels_test '*Cuda*' compute-sanitizer --tool "$1" --error-exitcode 9
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
for part in "${parts[@]}"; do
  case $part in
    tests) on_one_device ;;
    ranks) on_several_ranks ;;
    runs) there_and_back ;;
    memcheck | racecheck) sanitized "$part" ;;
    *)
      echo "gpu_check.sh: there is no part $part; there are ${all[*]}" >&2
      exit 2
      ;;
  esac
done
finish
