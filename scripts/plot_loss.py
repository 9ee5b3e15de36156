#!/usr/bin/env python3
"""Draws the loss over training tokens of one or more stages, one metrics.jsonl each, and marks each growth."""
import argparse
import json

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend comes first)


def read(path, member):
    """Pairs (tokens, value) of the lines that have the member."""
    points = []
    with open(path) as file:
        for line in file:
            entry = json.loads(line)
            if entry.get(member) is not None and "tokens" in entry:
                points.append((entry["tokens"], entry[member]))
    return points


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, metavar="PNG")
    parser.add_argument("metrics", nargs="+", metavar="METRICS.JSONL")
    args = parser.parse_args()

    figure, axes = pyplot.subplots(figsize=(8, 5))
    growth = None
    for stage, path in enumerate(args.metrics):
        training = read(path, "loss")
        if not training:
            raise SystemExit(f"{path}: no line has a loss")
        label = "stage" if len(args.metrics) == 1 else f"stage {stage + 1}"
        axes.plot(*zip(*training), linewidth=1, label=f"{label}, training")
        validation = read(path, "eval_loss")
        if validation:
            axes.plot(*zip(*validation), "o-", markersize=4, label=f"{label}, validation")
        if growth is not None:
            axes.axvline(growth, color="0.4", linestyle="--", linewidth=1)
            axes.annotate(" growth", (growth, 0.98), xycoords=("data", "axes fraction"), va="top", color="0.3")
        growth = training[-1][0]
    axes.set_xlabel("training tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(args.output, dpi=120)


if __name__ == "__main__":
    main()
