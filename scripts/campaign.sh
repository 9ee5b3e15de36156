#!/usr/bin/env bash
# scripts/campaign.sh faults [options]: builds and runs the long form of the campaign of faults (docs/reliability.md),
# an hour or more on two cores. Options go to tests/faults/campaign.py: `scripts/campaign.sh faults kill --seed 7`;
# --first NUMBER goes on where it was left. The kind slurm wants root and what `scripts/setup.sh --all` installs.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ ${1:-} == faults ]] || die "which campaign? There is: faults"
shift
scripts/setup.sh
scripts/build.sh build
exec "$(python_with h5py)" tests/faults/campaign.py --build build --long "$@"
