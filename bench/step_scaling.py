#!/usr/bin/env python3
"""Time of a training step against width, sequence and batch, as a table in Markdown; scripts/bench_scaling.sh runs it.

One quantity at a time is changed from d 256, seq 256, batch 8 in a model of two blocks with d / 4d parameter tokens,
heads of 32 and a vocabulary of 256. The points run in turn in each round, and a point's time is its median over the
rounds. Exponents are least squares in log-log: of the time, and of the FLOPs of compare_step.py on the same points,
which is what the time's exponent would be at a constant rate.
"""
import argparse
import math
import statistics
import sys

from compare_step import flops, median, model, tokenforge

BLOCKS, VOCAB, STEPS = 2, 256, 5
POINTS = {"dim": [128, 192, 256, 384, 512], "seq": [128, 256, 512, 1024, 2048], "batch": [2, 4, 8, 16, 32]}


def shape(dim=256, seq=256, batch=8):
    return model(dim, BLOCKS, dim // 32, dim, 4 * dim, VOCAB, seq, batch)


def exponent(x, y):
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", required=True, metavar="FOLDER")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2, help="threads")
    args = parser.parse_args()

    ours = tokenforge(args.cores, args.build)
    threads = ours.settings[0]
    runs = {}  # (quantity, value): one result a round
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
        for quantity, values in POINTS.items():
            for value in values:
                result = ours.measure(shape(**{quantity: value}), STEPS, threads)
                runs.setdefault((quantity, value), []).append(result)

    print("| | ms per step (GFLOP/s) | exponent of time | of FLOPs |\n|---|---|---|---|")
    for quantity, values in POINTS.items():
        work = [flops(shape(**{quantity: value}), runs[quantity, value][0]["parameters"]) for value in values]
        times = [median(runs[quantity, value], "ms_per_step") for value in values]
        cells = ", ".join(f"{v}: {t:.1f} ({w / t / 1e6:.0f})" for v, t, w in zip(values, times, work))
        print(f"| {quantity} | {cells} | **{exponent(values, times):.2f}** | {exponent(values, work):.2f} |")


if __name__ == "__main__":
    main()
