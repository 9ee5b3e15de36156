#!/usr/bin/env bash
# scripts/campaign.sh faults [options]: builds and runs the long form of the campaign of faults (docs/reliability.md),
# about half an hour on two cores. Options go to tests/faults/campaign.py: `scripts/campaign.sh faults kill --seed 7`.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ ${1:-} == faults ]] || die "which campaign? There is: faults"
shift
scripts/setup.sh
scripts/build.sh build
exec "$(python_with h5py)" tests/faults/campaign.py --build build --long "$@"
