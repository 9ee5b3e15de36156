#!/usr/bin/python3
"""The campaign of faults: the real jobs are killed, signalled, starved and damaged, and must lose nothing.

Every trial is decided by the seed and its number, so that one that fails can be repeated alone:

  campaign.py                         the short form of every kind
  campaign.py --long                  the long form
  campaign.py kill --trial 17         one trial; its folder is kept

A table at the end says for each kind how many trials there were, how they ended, and how many failed. Exit code 1 when
one failed.
"""

import argparse
import collections
import concurrent.futures
import os
import platform
import random
import shutil
import subprocess
import sys
import time
import traceback

from damage import Damage
from full_disk import FullDisk
from kill import Kill
from outputs import Outputs
from power_loss import PowerLoss
from signals import Signals
from slurm import Slurm
from world import Failed, World

LEFT_OUT = 77  # exit code when nothing could be tried
KINDS = {kind.name: kind for kind in [Kill, Damage, PowerLoss, Signals, FullDisk, Outputs, Slurm]}


class Result:
    def __init__(self, name):
        self.name, self.endings, self.failures, self.seconds = name, collections.Counter(), [], 0.0


def run_kind(kind, world, arguments):
    result = Result(kind.name)
    began = time.monotonic()
    campaign = kind(world)
    count = arguments.trials or (campaign.long if arguments.long else campaign.short)
    numbers = [arguments.trial] if arguments.trial is not None else range(arguments.first, count)

    def trial(number):
        try:
            return number, campaign.trial(number, random.Random(f"{arguments.seed} {kind.name} {number}")), None
        except Failed as failed:
            return number, None, str(failed)
        except Exception:
            return number, None, traceback.format_exc()

    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for number, ending, failure in pool.map(trial, numbers):
            if failure:
                result.failures.append(number)
                again = f"campaign.py {kind.name} --seed {arguments.seed} --trial {number}"
                print(f"FAILED: {again}\n{failure}", flush=True)
            else:
                result.endings.update(ending if isinstance(ending, collections.Counter) else [ending])
                if arguments.verbose or arguments.trial is not None:
                    print(f"{kind.name} {number}: {ending}", flush=True)
            if not failure and arguments.trial is None:
                shutil.rmtree(world.folder / f"{kind.name}_{number}", ignore_errors=True)
    if hasattr(campaign, "close"):
        campaign.close()
    result.seconds = time.monotonic() - began
    return result


def print_table(results, arguments):
    job = os.path.join(arguments.build, "jobs/tf_train")
    version = subprocess.run([job, "--version"], capture_output=True, text=True).stdout.strip()
    print(f"\n{version}; {time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores; "
          f"seed {arguments.seed}, {'long' if arguments.long else 'short'} form\n")
    print(f"{'kind':<12} {'trials':>6} {'failed':>6} {'seconds':>8}  endings")
    for result in results:
        trials = sum(result.endings.values()) + len(result.failures)
        head = f"{result.name:<12} {trials:>6} {len(result.failures):>6} {result.seconds:>8.0f}  "
        for ending, count in sorted(result.endings.items(), key=lambda item: -item[1]) or [("none passed", 0)]:
            print(f"{head}{count} {ending}")
            head = " " * len(head)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--build", default="build", help="build folder")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--trials", type=int, help="of each kind")
    parser.add_argument("--first", type=int, default=0, metavar="NUMBER", help="goes on from this trial of each kind")
    parser.add_argument("--trial", type=int, metavar="NUMBER", help="only this one")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time")
    parser.add_argument("--verbose", action="store_true", help="one line a trial")
    arguments = parser.parse_args()
    for name in arguments.kinds:
        if name not in KINDS:
            parser.error(f"there is no kind {name}; there are {', '.join(KINDS)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    kinds = [KINDS[name] for name in arguments.kinds or KINDS]
    for kind in [kind for kind in kinds if hasattr(kind, "missing") and kind.missing()]:
        print(f"{kind.name} IS LEFT OUT: {kind.missing()}", flush=True)
        kinds.remove(kind)
    if not kinds:
        return LEFT_OUT
    world = World(arguments.build)
    results = [run_kind(kind, world, arguments) for kind in kinds]
    print_table(results, arguments)
    failed = any(result.failures for result in results)
    if failed or arguments.trial is not None:
        print(f"\nkept: {world.folder}")
    else:
        world.remove()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
