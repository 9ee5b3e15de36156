# shellcheck shell=bash
# What the checks of a bundle share; sourced with `root` set, never run.
. "${root:?}/env.sh"
export TFORGE_SOURCE_FILES=$root/share/tokenforge
export GTEST_COLOR=no  # under mpirun there seems to be a terminal
# One machine may have fewer cores than ranks, this may run as root, and nothing leaves the machine.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
export OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_btl_tcp_if_include=lo OMPI_MCA_oob_tcp_if_include=lo
export OMPI_MCA_btl_vader_single_copy_mechanism=none OMPI_MCA_mpi_yield_when_idle=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
table=()
failed=0

# check NAME COMMAND...: runs it, for $most_seconds at most; its last lines are shown when it fails. With `all_run` set,
# tests that were skipped, or none at all, fail it too, and the first reason is shown.
check() {
  local name=$1 started=$SECONDS result=ok passed skipped
  shift
  timeout -k 5 "${most_seconds:?}" "$@" >"$work/log" 2>&1
  case $? in
    0) ;;
    124 | 137) result=TIMEOUT failed=1 && tail -n 20 "$work/log" ;;
    *) result=FAILED failed=1 && tail -n 20 "$work/log" ;;
  esac
  passed=$(sed -nE 's/^\[  PASSED  \] ([0-9]+) tests?.*/\1/p' "$work/log" | head -1)
  skipped=$(sed -nE 's/^\[  SKIPPED \] ([0-9]+) tests?.*/\1/p' "$work/log" | head -1)
  if [[ $result == ok && -n ${all_run:-} && (-n $skipped || ${passed:-0} == 0) ]]; then
    result=SKIPPED failed=1
    echo "$name: tests were skipped, or there are none: $(sed -nE '/: Skipped$/{n;p;q}' "$work/log")"
  fi
  table+=("$(printf '%-28s %-7s %7s %8s %6s' "$name" "$result" "${passed:--}" "${skipped:-${passed:+0}}" $((SECONDS - started)))")
  echo "$name: $result"
}

# A small model, on the text that is here.
# shellcheck disable=SC2034  # of those who source this
sizes=(--set model.layers=2 --set model.dim=64 --set model.heads=2 --set train.warmup_steps=4 --set data.path=data.h5)
prepare() {
  cd "$work" || exit 1
  check prepare "$root/bin/tf_prepare" --tokenizer bpe --vocab 512 --document-start '^[^:]*:1 ' --output data.h5 \
    "$root/share/tokenforge/data/bible.txt"
}

# Prints the table and ends; exit code 1 when a line of it failed.
finish() {
  echo
  "$root/bin/tf_train" --version
  printf '%-28s %-7s %7s %8s %6s\n' check result passed skipped s
  printf '%s\n' "${table[@]}"
  exit "$failed"
}
