#!/usr/bin/env bash
# scripts/bench_generate.sh [rounds [build folder]]: tokens/s of generation with a key-value cache (1 and 16 samples) and
# of evaluation, beside PyTorch's. In each round (by default 3) all programs run in turn, so that whatever else the
# machine does falls on all; the table gives medians, and the ratio to the fastest peer of each round.
# Peers: Debian's python3-torch on the OpenMP flavour of OpenBLAS, and the PyTorch of each python in TORCH_PYTHONS,
# with each number of threads in PEER_THREADS (default "1 2"). THREADS (default 2) is ours.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

rounds=${1:-3}
build=${2:-build}
ours=$build/bench/generate_bench
[[ -x $ours ]] || die "$ours is missing; run scripts/build.sh $build"
python=$(python_with torch)
openblas=/usr/lib/x86_64-linux-gnu/openblas-openmp
choose_openblas_kernels

results=$(mktemp)
trap 'rm -f "$results"' EXIT

medium="--dim 256 --layers 6 --heads 8 --tokens-attn 256 --tokens-ffn 1024 --vocab 4096 --seq 256"
large="--dim 768 --layers 12 --heads 12 --tokens-attn 768 --tokens-ffn 3072 --vocab 50304"
# name, model, work
configurations=(
  "generate_d256_batch1 $medium --batch 1 --prompt 32 --tokens 224"
  "generate_d256_batch16 $medium --batch 16 --prompt 32 --tokens 224"
  "generate_d768_batch1 $large --seq 512 --batch 1 --prompt 32 --tokens 64"
  "generate_d768_batch16 $large --seq 512 --batch 16 --prompt 32 --tokens 32"
  "evaluate_d256 $medium --what evaluate --batch 8"
  "evaluate_d768 $large --seq 512 --what evaluate --batch 1"
)
for ((round = 1; round <= rounds; ++round)); do
  for configuration in "${configurations[@]}"; do
    read -r name work <<<"$configuration"
    read -ra arguments <<<"$work --rounds 2"
    echo "round $round of $rounds: $name" >&2
    say_result() { printf '%s %s %s\n' "$name" "$1" "$(tail -n 1)" >>"$results"; }
    "$ours" "${arguments[@]}" --threads "${THREADS:-2}" | say_result ours
    for threads in ${PEER_THREADS:-1 2}; do
      export OMP_NUM_THREADS=$threads
      LD_LIBRARY_PATH=$openblas "$python" bench/pytorch_generate.py "${arguments[@]}" --threads "$threads" | say_result peer
      for other in ${TORCH_PYTHONS:-}; do
        "$other" bench/pytorch_generate.py "${arguments[@]}" --threads "$threads" | say_result peer
      done
      unset OMP_NUM_THREADS
    done
  done
done

"$python" - "$results" <<'PY'
import json, statistics, sys
runs = {}
for line in open(sys.argv[1]):
    name, side, text = line.split(maxsplit=2)
    run = json.loads(text)
    label = "TokenForge" if side == "ours" else f"{run['what'].split('+')[0]}, {run['threads']} threads"
    runs.setdefault(name, {}).setdefault(label, []).append(run)
for name, sides in runs.items():
    if len({run["parameters"] for side in sides.values() for run in side}) != 1:
        sys.exit(f"{name}: the models differ in size")
    ours = sides["TokenForge"]
    print(f"{name}")
    for label, side in sides.items():
        wall, cpu = (statistics.median(run[key] for run in side) for key in ("tokens_per_s", "tokens_per_cpu_s"))
        print(f"  {label:26} {wall:9.1f} tokens/s, {cpu:9.1f} a second of processor time   {side[0].get('how', '')}")
    peers = [side for label, side in sides.items() if label != "TokenForge"]
    ratios = [run["tokens_per_s"] / max(side[i]["tokens_per_s"] for side in peers) for i, run in enumerate(ours)]
    print(f"  ratio to the fastest peer  {statistics.median(ratios):9.2f} ({', '.join(f'{r:.2f}' for r in ratios)})")
PY
