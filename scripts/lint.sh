#!/usr/bin/env bash
# scripts/lint.sh [--fix] [build folder]: clang-format and clang-tidy (version 14, as in Debian 12) over every tracked
# C++ file. --fix formats in place first. clang-tidy reads compile_commands.json of the build folder, by default build/.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

fix=no
if [[ ${1:-} == --fix ]]; then
  fix=yes
  shift
fi
build=${1:-build}
for tool in clang-format-14 clang-tidy-14 shellcheck; do
  command -v "$tool" >/dev/null || die "$tool is not installed (apt-get install $tool libomp-14-dev)"
done

mapfile -t files < <(git ls-files '*.h' '*.cpp')
mapfile -t units < <(git ls-files '*.cpp')
if [[ $fix == yes ]]; then clang-format-14 -i "${files[@]}"; fi

say "layers"
"$(python_with re)" scripts/check_layers.py
say "clang-format: ${#files[@]} files"
clang-format-14 --dry-run --Werror "${files[@]}"
say "shellcheck"
git ls-files '*.sh' '*.sbatch' .ci/run scripts/bundle/start | xargs shellcheck
say "clang-tidy: ${#units[@]} files"
[[ -f $build/compile_commands.json ]] || die "$build/compile_commands.json is missing; run scripts/build.sh $build"
# A file outside the build (excluded by an option) would be checked with guessed flags.
"$(python_with json)" - "$build/compile_commands.json" "${units[@]}" <<'PY' |
import json, os, sys
built = {os.path.realpath(os.path.join(e["directory"], e["file"])) for e in json.load(open(sys.argv[1]))}
print("\0".join(u for u in sys.argv[2:] if os.path.realpath(u) in built), end="")
PY
  xargs -0 -r -n 1 -P "$(nproc)" clang-tidy-14 --quiet -p "$build" 2> >(grep -v 'warnings generated\|Suppressed\|Use -header-filter' >&2)
say "clean"
