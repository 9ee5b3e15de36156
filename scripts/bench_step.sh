#!/usr/bin/env bash
# scripts/bench_step.sh [rounds [build folder]]: tokens/s of a training step beside PyTorch's, in three sizes, by default
# over 3 rounds; bench/compare_step.py says how, and what the table's verdicts mean. Exits 1 when one is not met.
#
# PyTorch is Debian's python3-torch on the OpenMP flavour of OpenBLAS, as ours. A newer one joins in when
# NEWEST_PYTHON names the Python of a virtual environment that has it, which takes about 3 GB:
#   python3 -m venv ~/torch && ~/torch/bin/pip install torch
#   NEWEST_PYTHON=~/torch/bin/python scripts/bench_step.sh
# CORES (default 2): threads, or processes of one thread. CONFIGURATIONS (default "small medium large"): which ones;
# there are also transformer_small, transformer_124m_short and transformer_124m (a Transformer of GPT-2's size), and memoryformer.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

rounds=${1:-3}
build=${2:-build}
[[ -x $build/bench/step_bench ]] || die "$build/bench/step_bench is missing; run scripts/build.sh $build"
debian=$(python_with torch)
arguments=(--rounds "$rounds" --build "$build" --cores "${CORES:-2}" --debian "$debian")
if [[ -n ${NEWEST_PYTHON:-} ]]; then
  newest=$(absolute "$NEWEST_PYTHON")
  "$newest" -c 'import torch' || die "$newest has no PyTorch: $newest -m pip install torch"
  arguments+=(--newest "$newest")
fi
if [[ -n ${CONFIGURATIONS:-} ]]; then
  read -ra configurations <<<"$CONFIGURATIONS"
  arguments+=(--configurations "${configurations[@]}")
fi
choose_openblas_kernels
exec "$debian" bench/compare_step.py "${arguments[@]}"
