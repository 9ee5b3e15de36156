#!/usr/bin/env bash
# Installs the Debian packages that are missing. Elsewhere, or without root and sudo, it says what to install and
# exits 2. TFORGE_SKIP_SETUP=1 goes on without looking, where the libraries come from another source. With --all also what
# the tests on a SLURM cluster and of the bundle need; without it they are skipped.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

packages=(
  build-essential cmake ninja-build ccache pkg-config git
  libopenblas-openmp-dev libopenmpi-dev openmpi-bin libhdf5-dev
  libtomlplusplus-dev libboost-program-options-dev libfmt-dev nlohmann-json3-dev libxxhash-dev libsentencepiece-dev sentencepiece
  libgtest-dev libgmock-dev libbenchmark-dev
  bible-kjv bzip2 python3-h5py python3-numpy python3-matplotlib
)
if [[ ${1:-} == --all ]]; then packages+=(slurm-wlm munge iproute2 patchelf xz-utils); fi

if [[ ${TFORGE_SKIP_SETUP:-0} == 1 ]]; then exit 0; fi

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
  die "this is not a Debian system; install what these Debian 12 packages hold, then set TFORGE_SKIP_SETUP=1: ${packages[*]}"
fi

missing=()
for package in "${packages[@]}"; do
  status=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null) || status=
  if [[ $status != installed ]]; then missing+=("$package"); fi
done
if ((${#missing[@]} == 0)); then exit 0; fi

as_root=()
if ((EUID != 0)); then
  # With a terminal sudo may ask for a password; without one it must not.
  if command -v sudo >/dev/null && { [[ -t 0 ]] || sudo -n true 2>/dev/null; }; then
    as_root=(sudo)
  else
    die "packages are missing and neither root nor sudo is at hand; run: apt-get install ${missing[*]}"
  fi
fi

say "installing ${missing[*]}"
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends "${missing[@]}"
