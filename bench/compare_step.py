#!/usr/bin/env python3
"""A training step of TokenForge beside PyTorch's in three sizes, as a table in Markdown; scripts/bench_step.sh runs it.

A first pass finds the setting in which each PyTorch is fastest. Then, in each round, TokenForge in its layouts, each
PyTorch in that setting and bare matrix products run in turn, so that whatever else the machine does falls on all of
them. The table has the median over the rounds; a ratio is that of TokenForge's fastest layout to the peer, round by
round.

FLOPs of a step are (6 N + 6 L S d) T for both sides: N parameters in products forward and twice backward, and
attention's two products over the causal half alone, whether or not a program computes the other half too. A MemoryFormer
looks its parameters up instead, so only its head (V d parameters) counts as products. The sgemm rate is the fastest bare product of bench/sgemm_rate.py in the same round, by any BLAS of the comparison.

A row holds when TokenForge is faster than the peer by the factor wanted, or when the peer itself passes 65 % of the
sgemm rate and TokenForge reaches a share of it that leaves little to gain (80 %; 70 % for the small model, whose
products are small too). At d=768 the peak resident set, summed over ranks, is to be under 0.8 of the smallest peer's.
Exits 1 when one does not hold, 2 when a program fails.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys


def model(dim, layers, heads, tokens_attn, tokens_ffn, vocab, seq, batch):
    return {"dim": dim, "layers": layers, "heads": heads, "tokens-attn": tokens_attn, "tokens-ffn": tokens_ffn, "vocab": vocab,
            "seq": seq, "batch": batch}


# name: (model, timed steps of a run, factor wanted over Debian's PyTorch, share of the sgemm rate that also counts)
CONFIGURATIONS = {
    "small": (model(128, 4, 4, 128, 512, 256, 256, 16), 8, 1.3, 0.70),
    "medium": (model(256, 6, 8, 256, 1024, 4096, 256, 8), 5, 1.3, 0.80),
    "large": (model(768, 12, 12, 768, 3072, 50304, 512, 1), 3, 1.2, 0.80),
    "transformer_small": ({**model(128, 4, 4, 128, 512, 256, 256, 16), "kind": "transformer"}, 8, 1.0, 0.70),
    "transformer_124m_short": ({**model(768, 12, 12, 768, 3072, 50304, 64, 4), "kind": "transformer"}, 3, 1.2, 0.80),
    "transformer_124m": ({**model(768, 12, 12, 768, 3072, 50304, 512, 1), "kind": "transformer"}, 3, 1.2, 0.80),
    "memoryformer": ({**model(256, 4, 8, 256, 1024, 4096, 256, 8), "kind": "memoryformer"}, 5, 1.0, 1.0),
}
BY_DEFAULT = ["small", "medium", "large"]
FACTOR_OVER_NEWEST = 1.0
PEER_SHARE = 0.65
MOST_MEMORY = 0.8
OPENBLAS = "/usr/lib/x86_64-linux-gnu/openblas-openmp"  # what Debian's PyTorch loads; the default one is twice as slow
NEWEST = ["--attention", "sdpa", "--optimizer", "fused"]


def run(command, threads, environment=None):
    """The JSON of a program's last line. A program that fails ends the comparison."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **(environment or {})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        print(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr.rstrip()}", file=sys.stderr)
        sys.exit(2)
    return json.loads(done.stdout.splitlines()[-1])


class Side:
    """A program in its settings; a setting is (name, processes, further options)."""

    def __init__(self, name, cores, program, settings, environment=None):
        self.name, self.cores, self.program, self.settings, self.environment = name, cores, program, settings, environment

    def possible(self, shape):
        """Processes that share a batch need a sequence each."""
        return [s for s in self.settings if s[1] == 1 or "--tp" in s[2] or shape["batch"] % s[1] == 0]

    def measure(self, shape, steps, setting):
        _, ranks, options = setting
        threads = self.cores // ranks
        command = self.program(ranks) + [f"--{key}={value}" for key, value in shape.items()]
        return run([*command, f"--steps={steps}", f"--threads={threads}", *options], threads, self.environment)


def tokenforge(cores, build):
    settings = [(f"1 rank, {cores} threads", 1, []), (f"dp {cores}, 1 thread", cores, []),
                (f"tp {cores}, 1 thread", cores, ["--tp", str(cores)])]
    program = f"{build}/bench/step_bench"
    return Side("TokenForge", cores, lambda ranks: [program] if ranks == 1 else ["mpirun", "-n", str(ranks), program], settings)


def pytorch(name, cores, python, options, compiled, environment=None):
    kinds = [("", [])] + [(f", compile {mode}", ["--compile", mode]) for mode in compiled]
    settings = [(f"{cores} threads{text}", 1, options + more) for text, more in kinds]
    settings += [(f"{cores} processes{text}", cores, options + more) for text, more in kinds]
    return Side(name, cores, lambda ranks: [python, "bench/pytorch_peer.py", f"--ranks={ranks}"], settings, environment)


def flops(shape, parameters):
    """Of a step."""
    attention = 6 * shape["layers"] * shape["seq"] * shape["dim"]
    if shape.get("kind") == "memoryformer":
        parameters = shape["vocab"] * shape["dim"]
    return (6 * parameters + attention) * shape["batch"] * shape["seq"]


def median(runs, key):
    return statistics.median(r[key] for r in runs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", required=True, metavar="FOLDER")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2, help="threads, or processes of one thread")
    parser.add_argument("--debian", required=True, metavar="PYTHON", help="Python with Debian's PyTorch")
    parser.add_argument("--newest", metavar="PYTHON", help="Python with PyPI's PyTorch")
    parser.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=BY_DEFAULT)
    args = parser.parse_args()

    ours = tokenforge(args.cores, args.build)
    peers = [pytorch("debian", args.cores, args.debian, [], [], {"LD_LIBRARY_PATH": OPENBLAS})]
    if args.newest:
        peers.append(pytorch("newest", args.cores, args.newest, NEWEST, ["default", "max-autotune"]))

    best = {}  # (configuration, peer): setting
    print("tokens/s of the first pass")
    for name in args.configurations:
        shape, steps, _, _ = CONFIGURATIONS[name]
        for peer in peers:
            tried = [(peer.measure(shape, steps, setting), setting) for setting in peer.possible(shape)]
            best[name, peer.name] = max(tried, key=lambda t: t[0]["tokens_per_s"])[1]
            print(f"{name}, {tried[0][0]['what']}: " + "; ".join(f"{s[0]} {r['tokens_per_s']:.0f}" for r, s in tried), flush=True)
        if shape["batch"] % args.cores:
            print(f"{name}: {shape['batch']} sequence(s) cannot be shared by {args.cores} processes")

    runs = {}  # (configuration, side, setting's name): one result a round
    sgemm = {name: [] for name in args.configurations}  # one rate a round
    for number in range(args.rounds):
        for name in args.configurations:
            print(f"round {number + 1} of {args.rounds}: {name}", file=sys.stderr, flush=True)
            shape, steps, _, _ = CONFIGURATIONS[name]
            for side in (ours, *peers):
                for setting in ours.possible(shape) if side is ours else [best[name, side.name]]:
                    runs.setdefault((name, side.name, setting[0]), []).append(side.measure(shape, steps, setting))
            shapes = [f"--{key}={value}" for key, value in shape.items()] + [f"--threads={args.cores}"]
            rates = [run([p.program(1)[0], "bench/sgemm_rate.py", *shapes], args.cores, p.environment) for p in peers]
            sgemm[name].append(max(rates, key=lambda r: r["gflops"]))

    print("\n| configuration | program | tokens/s | ms | MB | GFLOP/s | of sgemm | ratio (each round) | |")
    print("|---" * 9 + "|")
    holds, summaries = True, []
    for name in args.configurations:
        shape, _, factor, share_wanted = CONFIGURATIONS[name]
        parameters = {r["parameters"] for (of, _, _), some in runs.items() if of == name for r in some}
        if len(parameters) != 1:
            sys.exit(f"{name}: the models differ in size: {sorted(parameters)} parameters")
        step = flops(shape, parameters.pop())
        rate = median(sgemm[name], "gflops")
        mine = [some for (of, side, _), some in runs.items() if of == name and side == ours.name]
        fastest = max(mine, key=lambda some: median(some, "tokens_per_s"))

        def share(some):
            return step / median(some, "ms_per_step") / 1e6 / rate

        for (of, side, setting), some in runs.items():
            if of != name:
                continue
            if side == ours.name:
                what, ratios, verdict = f"{side}, {setting}", "", "fastest" if some is fastest else ""
            else:
                wanted = factor if side == "debian" else FACTOR_OVER_NEWEST
                each = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(fastest, some)]
                ratio = statistics.median(each)
                what = f"{some[0]['what']}, {setting}"
                ratios = f"**{ratio:.2f}** ({', '.join(f'{r:.2f}' for r in each)})"
                by_share = share(some) > PEER_SHARE and share(fastest) >= share_wanted
                holds = holds and (ratio >= wanted or by_share)
                verdict = f"{'ok' if ratio >= wanted else 'FAILED'}: {wanted} wanted"
                if ratio < wanted and by_share:
                    verdict = f"ok: the peer passes {PEER_SHARE:.0%}, TokenForge reaches {share_wanted:.0%}"
            print(f"| {name} | {what} | {median(some, 'tokens_per_s'):.0f} | {median(some, 'ms_per_step'):.0f} | "
                  f"{median(some, 'peak_rss_mb'):.0f} | {share(some) * rate:.0f} | {share(some):.0%} | {ratios} | {verdict} |")
        if shape["dim"] == 768:
            memory = median(fastest, "peak_rss_mb") / min(
                median(some, "peak_rss_mb") for (of, side, _), some in runs.items() if of == name and side != ours.name)
            holds = holds and memory < MOST_MEMORY
            verdict = "ok" if memory < MOST_MEMORY else "FAILED"
            summaries.append(f"{verdict}: {name}'s peak resident set is {memory:.2f} of PyTorch's (under {MOST_MEMORY} wanted)")
    print()
    for name in args.configurations:
        shape = CONFIGURATIONS[name][0]
        typical = sorted(sgemm[name], key=lambda r: r["gflops"])[len(sgemm[name]) // 2]
        print(f"{name}: {' '.join(f'{key} {value}' for key, value in shape.items())}; sgemm {typical['gflops']:.0f} GFLOP/s "
              f"({typical['product']}, {typical['what']})")
    for summary in summaries:
        print(summary)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
