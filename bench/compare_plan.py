#!/usr/bin/env python3
"""What tf_plan predicts beside what a step takes. Each round measures the profile of the device and then steps of each
configuration, so that both see the same machine; what counts is the median of the rounds' ratios. The models of the profile
(bench/device_bench.cpp) are none of the configurations. Prints a table; exits 1 when a ratio of times is off by more than
15 %, or one of memories by more than 5 %."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

from compare_step import CONFIGURATIONS

MOST_TIME, MOST_MEMORY = 0.15, 0.05


def output(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        print(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr.rstrip()}", file=sys.stderr)
        sys.exit(2)
    return done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--build", default="build")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    args = parser.parse_args()
    measured = {name: [] for name in args.configurations}  # (measured, planned) a round
    with tempfile.TemporaryDirectory() as folder:
        profile = os.path.join(folder, "device.toml")
        for number in range(args.rounds):
            output([f"{args.build}/bench/device_bench", "--threads", str(args.cores), "--rounds", "1", "--write-profile",
                    profile])
            for name in args.configurations:
                shape, steps = CONFIGURATIONS[name][:2]
                words = [word for key, value in shape.items() for word in (f"--{key}", str(value))]
                lines = output([f"{args.build}/bench/step_bench", "--threads", str(args.cores), "--steps", str(steps),
                                "--device-profile", profile, *words]).splitlines()
                measured[name].append(tuple(json.loads(line) for line in lines))
                step, plan = measured[name][-1]
                print(f"round {number + 1}: {name}: {step['ms_per_step']:.1f} ms, predicted {plan['predicted_ms']:.1f}",
                      file=sys.stderr)
    print("| configuration | step, ms | predicted, ms | ratio (each round) | tensors, MB | planned, MB |")
    print("|---|---|---|---|---|---|")
    good = True
    for name, rounds in measured.items():
        ratios = [plan["predicted_ms"] / step["ms_per_step"] for step, plan in rounds]
        ratio = statistics.median(ratios)
        tensors, planned = rounds[0][0]["peak_tensor_mb"], rounds[0][1]["planned_tensor_mb"]
        good = good and abs(ratio - 1) <= MOST_TIME and abs(planned / tensors - 1) <= MOST_MEMORY
        print(f"| {name} | {statistics.median(step['ms_per_step'] for step, _ in rounds):.1f} | "
              f"{statistics.median(plan['predicted_ms'] for _, plan in rounds):.1f} | "
              f"**{ratio:.2f}** ({', '.join(f'{r:.2f}' for r in ratios)}) | {tensors} | {planned} |")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
