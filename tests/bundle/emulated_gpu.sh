#!/usr/bin/env bash
# emulated_gpu.sh BUILD [PART...]: the gpu_check.sh of a bundle where there is a device: a folder that looks like a bundle of
# BUILD, with the programs for the emulated device, and NCCL's calls answered by MPI throughout.
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/common.sh"
build=$(absolute "$1")
shift

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/bundle
mkdir -p "$root"/{bin,lib,libexec/tests,share/tokenforge/data}
cp scripts/bundle/{gpu_check.sh,checks.sh} "$root/"
: >"$root/env.sh"  # MPI is this machine's
for name in core kernels autograd model train parallel; do
  ln -s "$build/tests/${name}_emulated_test" "$root/libexec/tests/${name}_test"
done
ln -s "$build"/tests/emulated_jobs/tf_* "$root/bin/"
ln -s "$(command -v mpirun)" "$root/bin/mpirun"
ln -s "$build/tests/support/nccl_shim/emulated" "$root/lib/nccl_over_mpi"
ln -s "$PWD"/{configs,tests} "$root/share/tokenforge/"
# A text in which every verse starts a line, as in the one of a bundle.
for chapter in {1..40}; do
  echo "Book$chapter:1 In the beginning was line one of $chapter"
  for verse in {2..60}; do echo "   $verse:and line $verse, which says $((chapter * verse % 97)) times $verse"; done
done >"$root/share/tokenforge/data/bible.txt"

export TFORGE_EMULATOR_ORDER=1 OMP_NUM_THREADS=1
export LD_LIBRARY_PATH=$root/lib/nccl_over_mpi${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
"$root/gpu_check.sh" "$@"
