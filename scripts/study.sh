#!/usr/bin/env bash
# scripts/study.sh run|status|report PLAN [options]: what growing saves, by the plan of configs/study_*.toml. Sets up, builds,
# and hands everything on to scripts/study.py, whose --help explains it; --build names another build folder.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

build=$PWD/build arguments=()
while (($# > 0)); do
  case $1 in
    --set)
      (($# > 1)) || die "$1 needs a value"
      arguments+=(--set "$2")
      shift
      ;;
    --build | --output)
      (($# > 1)) || die "$1 needs a value"
      if [[ $1 == --build ]]; then build=$(absolute "$2"); else arguments+=(--output "$(absolute "$2")"); fi
      shift
      ;;
    *.toml) arguments+=("$(absolute "$1")") ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
case ${arguments[0]:-} in
  run | status | report)
    scripts/setup.sh
    say "build"
    scripts/build.sh "$build"
    arguments+=(--build "$build")
    ;;
esac
exec "$(python_with matplotlib tomllib)" scripts/study.py "${arguments[@]}"
