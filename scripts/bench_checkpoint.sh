#!/usr/bin/env bash
# scripts/bench_checkpoint.sh [folder [megabytes [rounds [build folder]]]]: time to save and to restore a checkpoint
# with 1, 2 and 4 ranks, beside plain writes and reads of as many bytes in the same folder (default: a new one in
# $TMPDIR; 1000 MB; 5 rounds), then how long training waits for its checkpoints with run.save = "async" and "blocking".
# Needs a quiet machine and three times the bytes on the disk.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

folder=${1:-$(mktemp -d)}
megabytes=${2:-1000}
rounds=${3:-5}
build=${4:-build}
[[ -x $build/bench/checkpoint_bench ]] || die "$build/bench/checkpoint_bench is missing; run scripts/build.sh $build"
choose_openblas_kernels
mkdir -p "$folder"
work=$(mktemp -d "$folder/bench_checkpoint.XXXXXX")
trap 'rm -rf "$work"' EXIT

for ranks in 1 2 4; do
  echo "$ranks ranks" >&2
  mpirun --oversubscribe -n "$ranks" "$build/bench/checkpoint_bench" --folder "$work" --megabytes "$megabytes" \
    --rounds "$rounds" >>"$work/results"
done
python3 - "$work/results" <<'PY'
import json, statistics, sys
runs = {}
for line in open(sys.argv[1]):
    run = json.loads(line)
    runs.setdefault(run["ranks"], []).append(run)
print("GB/s of the tensors' bytes, median of the rounds; in brackets the time over that of the plain pass of the same round")
print(f"{'ranks':>5} {'plain write':>12} {'save':>16} {'plain read':>12} {'restore':>16} {'cold read':>12} {'cold restore':>16}")
for ranks, rounds in runs.items():
    def rate(key):
        return statistics.median(r["megabytes"] / 1e3 / r[key] for r in rounds)
    def over(key, plain):
        return f"{rate(key):8.2f} ({statistics.median(r[key] / r[plain] for r in rounds):4.2f})"
    print(f"{ranks:5} {rate('plain_write'):12.2f} {over('save', 'plain_write'):>16} {rate('plain_read'):12.2f} "
          f"{over('restore', 'plain_read'):>16} {rate('plain_read_cold'):12.2f} {over('restore_cold', 'plain_read_cold'):>16}")
print("\nseconds of the parts of a save; training waits for copy, layout, seal and commit of an asynchronous one")
parts = ["copy", "layout", "rows", "seal", "digests", "commit"]
print("ranks " + " ".join(f"{part:>9}" for part in parts))
for ranks, rounds in runs.items():
    print(f"{ranks:5} " + " ".join(f"{statistics.median(r[part] for r in rounds):9.3f}" for part in parts))
PY

# A model whose checkpoint has about as many bytes: 3 numbers of 4 bytes a parameter, 2 * 12 * 768 rows a token of each layer.
tokens=$((megabytes * 1000000 / 12 / (2 * 12 * 768 * 8)))
bible -f gen1:1-exo40:38 >"$work/text"
"$build/jobs/tf_prepare" "$work/text" --document-start '^(Ge|Exo?)[0-9]+:1 ' --vocab 400 --output "$work/data.h5" >/dev/null 2>&1
cat >"$work/config.toml" <<EOF
[model]
kind = "tokenformer"
layers = 12
dim = 768
heads = 12
max_seq = 64
[model.tokens]
query = $tokens
key = $tokens
value = $tokens
proj = $tokens
ffn = $((4 * tokens))
[data]
path = "$work/data.h5"
[train]
batch = 4
steps = 24
eval_every = 0
[run]
save_every = 8
keep_last = 1
threads = 1
EOF
for ranks in 1 2 4; do
  for mode in async blocking; do
    mpirun --oversubscribe -n "$ranks" "$build/jobs/tf_train" --config "$work/config.toml" --quiet --set run.dir="$work/run" \
      --set run.save=$mode
    python3 - "$ranks" "$mode" "$work/run/metrics.jsonl" <<'PY'
import json, statistics, sys
ranks, mode, path = sys.argv[1:]
lines = [json.loads(line) for line in open(path)]
saves = [line for line in lines if "saved_step" in line][:-1]  # the last one of a run is never beside the training
steps = {line["step"]: line["step_seconds"] for line in lines if "step_seconds" in line}
beside = [s for step, s in steps.items() if any(v["saved_step"] < step <= v["step"] for v in saves)]
alone = [s for step, s in steps.items() if step > 2 and not any(v["saved_step"] < step <= v["step"] for v in saves)]
print(f"{ranks} ranks, {mode:8}: {saves[0]['save_bytes'] / 1e6:.0f} MB in "
      f"{statistics.median(s['save_seconds'] for s in saves):.2f} s, training waited "
      f"{statistics.median(s['save_stall_seconds'] for s in saves):.3f} s; a step takes {statistics.median(alone):.3f} s"
      + (f", {statistics.median(beside):.3f} s beside a save" if beside else ""))
PY
    rm -rf "$work/run"
  done
done
