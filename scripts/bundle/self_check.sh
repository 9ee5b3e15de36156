#!/usr/bin/env bash
# self_check.sh: does this bundle work on this machine? Every test of it, golden files included, on one process or two,
# then prepare -> train on two ranks -> grow -> evaluate. The table comes last; exit code 1 when a
# line of it failed.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
most_seconds=900
. "$root/checks.sh"

for test in "$root"/libexec/tests/*; do
  name=${test##*/}
  case $name in
    checkpoint_test | growth_test | model_test | parallel_test | train_test)
      check "$name, 2 ranks" env OMP_NUM_THREADS=1 TFORGE_EXPECT_RANKS=2 "$root/bin/mpirun" -n 2 "$test"
      ;;
    *) check "$name" "$test" ;;
  esac
done

prepare
check "train, 2 ranks" "$root/bin/mpirun" -n 2 "$root/bin/tf_train" --config "$root/share/tokenforge/configs/demo.toml" \
  --set run.dir=run "${sizes[@]}" --set train.steps=20 --set run.save_every=20
check grow "$root/bin/tf_expand" --checkpoint run/step_00000020.h5 --output grown.h5 \
  --tokens query=128,key=128,value=128,proj=128,ffn=512
check evaluate "$root/bin/tf_eval" --checkpoint grown.h5 --data data.h5
check verify "$root/bin/tf_inspect" --verify grown.h5
finish
