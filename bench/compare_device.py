#!/usr/bin/env python3
"""A training step of TokenForge beside PyTorch's on a CUDA device, in the sizes of the published TokenFormers with
sequences of 2048, as a table in Markdown; scripts/bench_device.sh runs it.

Size by size, so that what is done is on the screen whatever comes after it. PyTorch is bench/pytorch_peer.py under autocast
with scaled-dot-product attention and fused AdamW; a first pass picks the fastest torch.compile mode of those that run. In
each round both run in turn, and TokenForge measures the rates of a large product and of a large sum in the same process.
FLOPs of a step are (6 N + 6 L S d) T for both, as in compare_step.py; utilisation is their rate beside that of the product.
The table has medians over the rounds. Then one step more of TokenForge, kernel by kernel beside its own floor, and its
attention beside each backend of PyTorch's (bench/pytorch_attention.py), cuDNN's among them.

Exits 1 when TokenForge is less than 1.2 times as fast as PyTorch, or below 45 % of the product's rate at 450m; 2 when
a program fails.
"""
import argparse
import os
import re
import statistics
import subprocess
import sys

from compare_step import flops, median, model, run

# dim, layers, heads, parameter tokens of attention and of the FFN, vocabulary, sequence, batch
CONFIGURATIONS = {
    "150m": model(768, 12, 12, 768, 3072, 50304, 2048, 8),
    "450m": model(1024, 24, 16, 1024, 4096, 50304, 2048, 8),
    "900m": model(1280, 32, 16, 1280, 5120, 50304, 2048, 4),
}
FACTOR = 1.2
UTILISATION = {"450m": 0.45}
COMPILE = ["off", "default", "max-autotune"]


def beside(name):
    """The path of a program in this folder."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), name)


def compare_attention(name, shape, profile, peer, threads):
    """A call of our attention, by the profile of a step, beside PyTorch's backends at the same shape."""
    calls = dict(re.findall(r"^causal_attention_(forward|backward) +(\d+ +[\d.]+)", profile, re.MULTILINE))
    ours = {way: float(text.split()[1]) / int(text.split()[0]) for way, text in calls.items()}
    found = run([*peer, f"--batch={shape['batch']}", f"--heads={shape['heads']}", f"--seq={shape['seq']}",
                 f"--head-dim={shape['dim'] // shape['heads']}"], threads)
    print(f"\n{name}: attention of a layer, ms forward / backward: TokenForge {ours['forward']:.3f} / {ours['backward']:.3f}")
    for backend, times in found.items():
        if backend != "what":
            print(f"  {found['what']} {backend}: " + (times.get("none") or f"{times['forward_ms']:.3f} / {times['backward_ms']:.3f}"))


def with_wheels(python):
    """An environment in which CUDA's libraries are found where PyTorch's wheels brought them, behind those of the system."""
    code = "import glob, sysconfig; print(':'.join(glob.glob(sysconfig.get_paths()['purelib'] + '/nvidia/*/lib')))"
    wheels = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    return {"LD_LIBRARY_PATH": ":".join(filter(None, [os.environ.get("LD_LIBRARY_PATH"), wheels]))}


def tried(command, threads):
    """The result of run(), or None for a program that failed, whose reason it has printed."""
    try:
        return run(command, threads)
    except SystemExit:
        return None


def measure(name, ours, peer, args, threads, libraries):
    """The results of both over the rounds, and the peer's mode. The first rounds, which are not counted, are a trial of ours
    and one of each mode of torch.compile."""
    run(ours, threads, libraries)
    modes = {}
    for mode in args.compile:
        result = tried([*peer, "--compile", mode], threads)
        if result:
            modes[mode] = result
            print(f"{name}, {result['what']}, compile {mode}: {result['tokens_per_s']:.0f} tokens/s", file=sys.stderr, flush=True)
    if not modes:
        sys.exit(f"{name}: PyTorch ran in no mode")
    best = max(modes, key=lambda mode: modes[mode]["tokens_per_s"])
    mine, theirs = [], []
    for number in range(args.rounds):
        mine.append(run(ours, threads, libraries))
        theirs.append(run([*peer, "--compile", best], threads))
        print(f"{name}, round {number + 1} of {args.rounds}: {mine[-1]['tokens_per_s']:.0f} and {theirs[-1]['tokens_per_s']:.0f} tokens/s",
              file=sys.stderr, flush=True)
    return mine, theirs, best


def show(name, shape, mine, theirs, mode):
    """The table of one size; whether it meets its targets."""
    step, rate = flops(shape, mine[0]["parameters"]), median(mine, "gemm_gflops")
    print("\n| size | program | tokens/s | ms | MB on the device | TFLOP/s | of the product | ratio (each round) | |")
    print("|---" * 9 + "|")

    def row(what, some, memory, ratios, verdict):
        speed = step / median(some, "ms_per_step") / 1e6  # GFLOP/s
        print(f"| {name} | {what} | {median(some, 'tokens_per_s'):.0f} | {median(some, 'ms_per_step'):.1f} | "
              f"{median(some, memory):.0f} | {speed / 1e3:.2f} | {speed / rate:.0%} | {ratios} | {verdict} |")

    each = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(mine, theirs)]
    ratio, wanted = statistics.median(each), UTILISATION.get(name)
    enough = wanted is None or step / median(mine, "ms_per_step") / 1e6 / rate >= wanted
    row("TokenForge", mine, "peak_tensor_mb", "", "" if wanted is None else f"{'ok' if enough else 'FAILED'}: {wanted:.0%} wanted")
    row(f"{theirs[0]['what']}, compile {mode}", theirs, "peak_device_mb",
        f"**{ratio:.2f}** ({', '.join(f'{r:.2f}' for r in each)})", f"{'ok' if ratio >= FACTOR else 'FAILED'}: {FACTOR} wanted")
    print(f"\n{name}: product {rate / 1e3:.1f} TFLOP/s, sum {median(mine, 'memory_gbytes'):.0f} GB/s")
    return enough and ratio >= FACTOR


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step-bench", required=True, metavar="PROGRAM", help="bench/step_bench of a build, or of a bundle")
    parser.add_argument("--python", required=True, help="Python with PyTorch for CUDA")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a run")
    parser.add_argument("--dtype", choices=("f32", "tf32", "bf16"), default="bf16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the comparison itself")
    parser.add_argument("--compile", nargs="+", choices=COMPILE, default=COMPILE, help="modes of torch.compile to try")
    parser.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--shrink", type=int, default=1, metavar="N", help="divides sequence, layers and vocabulary: a trial")
    args = parser.parse_args()

    settings = {"f32": [], "tf32": ["--set=train.tf32=true"], "bf16": ["--set=train.dtype=bf16"]}[args.dtype]
    if args.device == "cuda":
        settings.append("--set=run.products=measured")
    ours = [args.step_bench, f"--set=run.device={args.device}", *settings, "--ceilings"]
    peer = [args.python, beside("pytorch_peer.py"), "--device", args.device, "--dtype", args.dtype, "--attention", "sdpa",
            "--optimizer", "fused"]

    def shape_of(name):
        shape = dict(CONFIGURATIONS[name])
        for key in ("seq", "layers", "vocab"):
            shape[key] = max(1, shape[key] // args.shrink)
        return shape

    threads = os.cpu_count() if args.device == "cuda" else 2
    libraries = with_wheels(args.python)
    holds = True
    for name in args.configurations:
        words = [f"--{key}={value}" for key, value in shape_of(name).items()] + [f"--steps={args.steps}"]
        mine, theirs, mode = measure(name, [*ours, *words, f"--threads={threads}"], [*peer, *words], args, threads, libraries)
        if {r["parameters"] for r in mine + theirs} != {mine[0]["parameters"]}:
            sys.exit(f"{name}: the models differ in size")
        holds = show(name, shape_of(name), mine, theirs, mode) and holds
        done = subprocess.run([*ours, *words, f"--threads={threads}", "--profile"], env={**os.environ, **libraries},
                              capture_output=True, text=True, check=False)
        profile = done.stderr.rstrip()
        print(f"\n{profile}", flush=True)
        if done.returncode != 0:
            return 2
        compare_attention(name, shape_of(name), profile, [args.python, beside("pytorch_attention.py"), "--device", args.device,
                                                          "--dtype", args.dtype], threads)
        print(flush=True)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
