# shellcheck shell=bash
# What every script shares; sourced, never run.
set -euo pipefail
started_in=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Open MPI on one machine: it may have fewer cores than ranks and no user but root, and nothing leaves loopback.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none
export OMPI_MCA_btl_tcp_if_include=lo OMPI_MCA_oob_tcp_if_include=lo
export OMPI_MCA_btl_vader_single_copy_mechanism=none

say() { printf '\n== %s\n' "$*"; }

die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 2
}

# absolute PATH: of a path that the user wrote, seen from where the user stands.
absolute() {
  if [[ $1 == /* ]]; then echo "$1"; else echo "$started_in/$1"; fi
}

# python_with MODULE...: prints the first Python 3 that has all modules. Debian's own comes first, because the
# modules are Debian packages and another python3 may stand before it on the PATH.
python_with() {
  local candidate
  for candidate in /usr/bin/python3 python3; do
    if "$candidate" -c "import $(IFS=,; echo "$*")" >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  die "no python3 with the modules $* was found (Debian: $(printf 'python3-%s ' "$@"))"
}

# OpenBLAS 0.3.21 takes a processor newer than itself for one of 2004 and multiplies four times slower than it could.
# Our programs see to it themselves; a peer needs OPENBLAS_CORETYPE, which OpenBLAS reads when it is loaded.
choose_openblas_kernels() {
  local library=/usr/lib/x86_64-linux-gnu/openblas-openmp/libopenblas.so.0 core flags
  [[ -z ${OPENBLAS_CORETYPE:-} && -e $library && -r /proc/cpuinfo ]] || return 0
  core=$("$(python_with ctypes)" -c "
import ctypes
name = ctypes.CDLL('$library').openblas_get_corename
name.restype = ctypes.c_char_p
print(name().decode())")
  flags=$(grep -m 1 '^flags' /proc/cpuinfo)
  if [[ $core == Prescott && $flags == *' avx512vl '* ]]; then
    export OPENBLAS_CORETYPE=SkylakeX
  elif [[ $core == Prescott && $flags == *' avx2 '* ]]; then
    export OPENBLAS_CORETYPE=Haswell
  fi
}
