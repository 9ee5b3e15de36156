#!/usr/bin/env bash
# scripts/bench_step.sh [rounds [build folder]]: tokens/s of a training step beside PyTorch's, in three sizes. In each
# round (by default 3) the two programs run in turn, so that whatever else the machine does falls on both; the table
# gives the median round. THREADS (default 2) threads each. PyTorch: Debian's python3-torch on the OpenMP flavour of
# OpenBLAS, as ours.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

rounds=${1:-3}
build=${2:-build}
threads=${THREADS:-2}
ours=$build/bench/step_bench
[[ -x $ours ]] || die "$ours is missing; run scripts/build.sh $build"
python=$(python_with torch)
export OMP_NUM_THREADS=$threads
openblas=/usr/lib/x86_64-linux-gnu/openblas-openmp
choose_openblas_kernels

results=$(mktemp)
trap 'rm -f "$results"' EXIT

# name, steps a round, model
configurations=(
  "small 8 --dim 128 --layers 4 --heads 4 --tokens-attn 128 --tokens-ffn 512 --vocab 256 --seq 256 --batch 16"
  "medium 5 --dim 256 --layers 6 --heads 8 --tokens-attn 256 --tokens-ffn 1024 --vocab 4096 --seq 256 --batch 8"
  "large 3 --dim 768 --layers 12 --heads 12 --tokens-attn 768 --tokens-ffn 3072 --vocab 50304 --seq 512 --batch 1"
)
for ((round = 1; round <= rounds; ++round)); do
  for configuration in "${configurations[@]}"; do
    read -r name steps model <<<"$configuration"
    read -ra arguments <<<"$model --steps $steps --threads $threads"
    echo "round $round of $rounds: $name" >&2
    printf '%s ours %s\n' "$name" "$("$ours" "${arguments[@]}" | tail -n 1)" >>"$results"
    printf '%s peer %s\n' "$name" "$(LD_LIBRARY_PATH=$openblas "$python" bench/pytorch_peer.py "${arguments[@]}")" >>"$results"
  done
done

printf '%s\n' "${configurations[@]}" | sed -E 's/^(\w+) [0-9]+ /\1: /; s/--//g'
"$python" - "$results" <<'PY'
import json, statistics, sys
runs = {}
for line in open(sys.argv[1]):
    name, side, text = line.split(maxsplit=2)
    runs.setdefault(name, {}).setdefault(side, []).append(json.loads(text))
peer_name = next(iter(runs.values()))["peer"][0]["what"]
print(f"\n{'':8} {'TokenForge':>28}   {peer_name:>28}   ratio (each round)")
print(f"{'':8} {'tokens/s':>10} {'ms/step':>9} {'MB':>7}   {'tokens/s':>10} {'ms/step':>9} {'MB':>7}")
for name, sides in runs.items():
    if sides["ours"][0]["parameters"] != sides["peer"][0]["parameters"]:
        sys.exit(f"{name}: the two models differ in size: {sides['ours'][0]['parameters']} and "
                 f"{sides['peer'][0]['parameters']} parameters")
    def median(side, key):
        return statistics.median(run[key] for run in sides[side])
    ratios = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(sides["ours"], sides["peer"])]
    cells = "   ".join(f"{median(s, 'tokens_per_s'):10.0f} {median(s, 'ms_per_step'):9.1f} {median(s, 'peak_rss_mb'):7.0f}"
                       for s in ("ours", "peer"))
    print(f"{name:8} {cells}   {statistics.median(ratios):5.2f} ({', '.join(f'{r:.2f}' for r in ratios)})")
PY
