#!/usr/bin/env bash
# scripts/bench_reduction.sh [rounds [build folder]]: the three ways to sum gradients (parallel.reduction) at dp = 2, one
# thread a rank, on the configurations of scripts/bench_step.sh. In each round (by default 5) they run in turn; the
# table gives the fastest step of all rounds, which a machine with a changing clock disturbs least, the median, and the
# ratio to blocking in the same round.
# SET=KEY=VALUE: one more setting for all. CONFIGURATIONS (default "small medium large"): which ones.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

rounds=${1:-5}
build=${2:-build}
ours=$build/bench/step_bench
[[ -x $ours ]] || die "$ours is missing; run scripts/build.sh $build"
choose_openblas_kernels

results=$(mktemp)
trap 'rm -f "$results"' EXIT
# name, steps a round, model
configurations=(
  "small 8 --dim 128 --layers 4 --heads 4 --tokens-attn 128 --tokens-ffn 512 --vocab 256 --seq 256 --batch 16"
  "medium 5 --dim 256 --layers 6 --heads 8 --tokens-attn 256 --tokens-ffn 1024 --vocab 4096 --seq 256 --batch 8"
  "large 3 --dim 768 --layers 12 --heads 12 --tokens-attn 768 --tokens-ffn 3072 --vocab 50304 --seq 512 --batch 2"
)
for ((round = 1; round <= rounds; ++round)); do
  for configuration in "${configurations[@]}"; do
    read -r name steps model <<<"$configuration"
    [[ " ${CONFIGURATIONS:-small medium large} " == *" $name "* ]] || continue
    echo "round $round of $rounds: $name" >&2
    for way in blocking nonblocking polled; do
      read -ra arguments <<<"$model --steps $steps --threads 1 --set parallel.reduction=$way ${SET:+--set $SET}"
      printf '%s %s %s\n' "$name" "$way" "$(mpirun -n 2 "$ours" "${arguments[@]}" | tail -n 1)" >>"$results"
    done
  done
done

python3 - "$results" <<'PY'
import json, statistics, sys
runs = {}
for line in open(sys.argv[1]):
    name, way, text = line.split(maxsplit=2)
    runs.setdefault(name, {}).setdefault(way, []).append(json.loads(text))
print(f"{'':8} {'':12} {'fastest':>9} {'median':>9} {'exposed':>9} {'MB':>7}   time / blocking (each round)")
for name, ways in runs.items():
    for way, results in ways.items():
        def median(key):
            return statistics.median(run[key] for run in results)
        ratios = [a["ms_per_step"] / b["ms_per_step"] for a, b in zip(results, ways["blocking"])]
        fastest = min(run["ms_min"] for run in results)
        print(f"{name:8} {way:12} {fastest:9.1f} {median('ms_per_step'):9.1f} {median('exposed_ms'):9.1f} {median('peak_rss_mb'):7.0f}   "
              f"{statistics.median(ratios):5.2f} ({', '.join(f'{r:.2f}' for r in ratios)})")
PY
