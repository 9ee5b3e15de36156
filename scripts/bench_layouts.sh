#!/usr/bin/env bash
# scripts/bench_layouts.sh [rounds [build folder]]: what run.deterministic = "layout_independent" costs. On each layout
# dp x tp of 1, 2 and 4 ranks, one thread a rank, a step is timed in turn in the ordinary mode, in the mode with one
# virtual shard a rank (the price of adding in order) and in the mode with 4 x 4 shards. The table gives the fastest step
# of all rounds (by default 3), the ratio to the ordinary mode in the same round (median), the largest tensors of rank 0
# and the bytes that it hands to collectives.
# MODEL: another model and batch, as options of step_bench.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

rounds=${1:-3}
build=${2:-build}
ours=$build/bench/step_bench
[[ -x $ours ]] || die "$ours is missing; run scripts/build.sh $build"
choose_openblas_kernels

results=$(mktemp)
trap 'rm -f "$results"' EXIT
model=${MODEL:---dim 256 --layers 6 --heads 8 --tokens-attn 256 --tokens-ffn 1024 --vocab 4096 --seq 256 --batch 8}
for ((round = 1; round <= rounds; ++round)); do
  for layout in 1x1 2x1 1x2 2x2 4x1; do
    echo "round $round of $rounds: $layout" >&2
    dp=${layout%x*} tp=${layout#*x}
    for shards in none "$layout" 4x4; do
      read -ra arguments <<<"$model --steps 4 --warmup 1 --threads 1 --tp $tp --set parallel.reduction=blocking"
      if [[ $shards != none ]]; then
        arguments+=(--set run.deterministic=layout_independent --set "parallel.virtual_dp=${shards%x*}"
          --set "parallel.virtual_tp=${shards#*x}")
      fi
      # The name of a mode is the same on every layout.
      [[ $shards == "$layout" ]] && shards=one-a-rank
      printf '%s %s %s\n' "$layout" "$shards" "$(mpirun -n $((dp * tp)) "$ours" "${arguments[@]}" | tail -n 1)" >>"$results"
    done
  done
done

python3 - "$results" <<'PY'
import json, statistics, sys
runs = {}
for line in open(sys.argv[1]):
    layout, shards, text = line.split(maxsplit=2)
    runs.setdefault(layout, {}).setdefault(shards, []).append(json.loads(text))
print(f"{'dp x tp':8} {'shards':11} {'fastest ms':>10} {'ratio':>6} {'tensors MB':>10} {'sent MB':>8}")
for layout, modes in runs.items():
    for shards, results in modes.items():
        ratio = statistics.median(a["ms_min"] / b["ms_min"] for a, b in zip(results, modes["none"]))
        fastest = min(run["ms_min"] for run in results)
        print(f"{layout:8} {shards:11} {fastest:10.1f} {ratio:6.2f} {results[0]['peak_tensor_mb']:10.1f} "
              f"{results[0]['communication_bytes'] / 1e6:8.2f}")
PY
