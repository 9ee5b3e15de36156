#!/usr/bin/env bash
# self_check.sh: does this bundle work on this machine? Every test of it, golden files included, on one process or two,
# then prepare -> train on two ranks -> grow -> evaluate. The table comes last; exit code 1 when a
# line of it failed.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$root/env.sh"
export TFORGE_SOURCE_FILES=$root/share/tokenforge
# One machine may have fewer cores than ranks, this may run as root, and nothing leaves the machine.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
export OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_btl_tcp_if_include=lo OMPI_MCA_oob_tcp_if_include=lo
export OMPI_MCA_btl_vader_single_copy_mechanism=none OMPI_MCA_mpi_yield_when_idle=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
table=()
failed=0

# check NAME COMMAND...: runs it; its last lines are shown when it fails.
check() {
  local name=$1 started=$SECONDS passed skipped result=ok
  shift
  if ! "$@" >"$work/log" 2>&1; then
    result=FAILED failed=1
    tail -n 20 "$work/log"
  fi
  passed=$(sed -nE 's/^\[  PASSED  \] ([0-9]+) tests?.*/\1/p' "$work/log" | head -1)
  skipped=$(sed -nE 's/^\[  SKIPPED \] ([0-9]+) tests?.*/\1/p' "$work/log" | head -1)
  table+=("$(printf '%-28s %-7s %7s %8s %6s' "$name" "$result" "${passed:--}" "${skipped:-${passed:+0}}" $((SECONDS - started)))")
  echo "$name: $result"
}

for test in "$root"/libexec/tests/*; do
  name=${test##*/}
  case $name in
    checkpoint_test | growth_test | model_test | parallel_test | train_test)
      check "$name, 2 ranks" env OMP_NUM_THREADS=1 TFORGE_EXPECT_RANKS=2 "$root/bin/mpirun" -n 2 "$test"
      ;;
    *) check "$name" "$test" ;;
  esac
done

# A small model, on the text that is here.
cd "$work" || exit 1
sizes=(--set model.layers=2 --set model.dim=64 --set model.heads=2 --set train.steps=20 --set train.warmup_steps=4 --set run.save_every=20)
check prepare "$root/bin/tf_prepare" --tokenizer bpe --vocab 512 --document-start '^[^:]*:1 ' --output data.h5 \
  "$root/share/tokenforge/data/bible.txt"
check "train, 2 ranks" "$root/bin/mpirun" -n 2 "$root/bin/tf_train" --config "$root/share/tokenforge/configs/demo.toml" \
  --set data.path=data.h5 --set run.dir=run "${sizes[@]}"
check grow "$root/bin/tf_expand" --checkpoint run/step_00000020.h5 --output grown.h5 \
  --tokens query=128,key=128,value=128,proj=128,ffn=512
check evaluate "$root/bin/tf_eval" --checkpoint grown.h5 --data data.h5
check verify "$root/bin/tf_inspect" --verify grown.h5

echo
printf '%-28s %-7s %7s %8s %6s\n' check result passed skipped s
printf '%s\n' "${table[@]}"
"$root/bin/tf_train" --version
exit "$failed"
