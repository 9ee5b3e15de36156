#!/usr/bin/env bash
# scripts/bench_data.sh TEXT [build folder]: what data costs. First tf_prepare on TEXT (some tens of MB of WikiText) beside
# sentencepiece's own encoder with the same model, which gets as many processes as tf_prepare has threads (THREADS,
# default 2), each with its share of the lines. Then the time that training steps wait for samples, as a part of the
# step, with the dataset's file out of memory (cold) and in it (warm), in the three sizes of bench_step.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ $# -ge 1 && -r $1 ]] || die "which text? scripts/bench_data.sh TEXT [build folder]"
text=$(absolute "$1")
build=$(absolute "${2:-$PWD/build}")
threads=${THREADS:-2}
[[ -x $build/jobs/tf_prepare ]] || die "$build/jobs/tf_prepare is missing; run scripts/build.sh"
command -v spm_encode >/dev/null || die "spm_encode is missing (Debian: sentencepiece)"
python=$(python_with h5py numpy)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

# seconds FILE COMMAND...: runs the command, and writes the seconds and processor seconds that it took to FILE.
seconds() {
  local to=$1
  shift
  /usr/bin/time -f '%e %U %S' -o "$to" "$@" >/dev/null 2>>log || { tail log >&2; die "$* failed"; }
}

# A document begins at every line that looks like a title of WikiText.
prepare=("$build/jobs/tf_prepare" "$text" --document-start '^ = [^=]' --threads "$threads")
"${prepare[@]}" --vocab 4096 --output first.h5 >>log 2>&1 || { tail log >&2; die "tf_prepare failed"; }
"$python" -c "
import h5py
open('bpe.model', 'wb').write(h5py.File('first.h5')['/tokenizer/model'][:].tobytes())"
split -n "l/$threads" "$text" part.
for round in ${ROUNDS:-1 2 3}; do
  seconds "ours.$round" "${prepare[@]}" --tokenizer bpe.model --output data.h5 --force
  # shellcheck disable=SC2016
  seconds "peer.$round" bash -c 'for part in part.??; do spm_encode --model bpe.model --output_format id --output "$part.ids" "$part" & done; wait'
done
"$python" - "$(stat -c %s "$text")" "$threads" <<'PY'
import statistics, sys
size, threads = int(sys.argv[1]) / 1e6, sys.argv[2]
def rounds(side):
    return [[float(x) for x in open(f"{side}.{r}").read().split()] for r in (1, 2, 3)]
ours, peer = rounds("ours"), rounds("peer")
print(f"preparation of {size:.1f} MB, {threads} threads or processes, median of 3 rounds")
for name, side in (("tf_prepare", ours), ("spm_encode", peer)):
    wall, cpu = statistics.median(r[0] for r in side), statistics.median(r[1] + r[2] for r in side)
    print(f"  {name}  {wall:7.2f} s  {size / wall:7.1f} MB/s  {cpu:7.2f} s of processor time")
print("  ratio of time ", ", ".join(f"{p[0] / o[0]:.1f}" for o, p in zip(ours, peer)))
PY

# configuration NAME STEPS BATCH SEQ DIM LAYERS HEADS TOKENS FFN_TOKENS: writes NAME.toml.
configuration() {
  cat >"$1.toml" <<TOML
[model]
layers = $6
dim = $5
heads = $7
vocab = 4096
max_seq = $4
tokens = { query = $8, key = $8, value = $8, proj = $8, ffn = $9 }
[data]
path = "data.h5"
[train]
steps = $2
warmup_steps = 1
batch = $3
eval_every = 0
[run]
save_every = 0
threads = $threads
TOML
}
configuration small 8 16 256 128 4 4 128 512
configuration medium 6 8 256 256 6 8 256 1024
configuration large 5 1 512 768 12 12 768 3072
echo "exposed wait for samples, part of the step: median and largest of the steps after the first, and the first"
for name in small medium large; do
  for file in cold warm; do
    if [[ $file == cold ]]; then dd if=data.h5 iflag=nocache count=0 status=none; else cat data.h5 >/dev/null; fi
    "$build/jobs/tf_train" --config "$name.toml" --set "run.dir=$name-$file" >>log 2>&1 || { tail log >&2; die "tf_train failed"; }
    "$python" - "$name" "$file" "$name-$file/metrics.jsonl" <<'PY'
import json, statistics, sys
steps = [json.loads(line) for line in open(sys.argv[3])]
steps = [s for s in steps if "data_wait_seconds" in s]
parts = [s["data_wait_seconds"] / s["step_seconds"] for s in steps]
print(f"  {sys.argv[1]:7} {sys.argv[2]}  median {statistics.median(parts[1:]):9.6f}  largest {max(parts[1:]):9.6f}  "
      f"first {parts[0]:9.6f} ({1e6 * steps[0]['data_wait_seconds']:.0f} us)")
PY
  done
done
