#!/usr/bin/env python3
"""The fastest bare f32 product of a step: what step_bench and pytorch_peer are measured against. Prints one JSON line.

Each product runs alone, on warm operands, through torch.mm, which is MKL in PyPI's PyTorch and the system's OpenBLAS
in Debian's: of ffn's scores and of the logits, with T = batch * seq rows, the product of the forward pass, that of the
input's gradient and that of the weight's. A product's rate is the median over its calls.
"""
import argparse
import json
import statistics
import time

import torch

SECONDS = 0.3  # for one product


def rate(left, right):
    """Median GFLOP/s of left @ right."""
    out = torch.mm(left, right)
    seconds = []
    while len(seconds) < 3 or sum(seconds) < SECONDS:
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        seconds.append(time.perf_counter() - start)
    return 2e-9 * left.shape[0] * left.shape[1] * right.shape[1] / statistics.median(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("dim", "tokens-ffn", "vocab", "seq", "batch", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args, _ = parser.parse_known_args()  # the other options of a configuration
    torch.set_num_threads(args.threads)

    rows, rates = args.batch * args.seq, {}
    x = torch.randn(rows, args.dim)
    for wide in (args.tokens_ffn, args.vocab):
        weight, y = torch.randn(wide, args.dim), torch.randn(rows, wide)
        rates[f"{rows}x{args.dim} by {args.dim}x{wide}"] = rate(x, weight.t())
        rates[f"{rows}x{wide} by {wide}x{args.dim}"] = rate(y, weight)
        rates[f"{wide}x{rows} by {rows}x{args.dim}"] = rate(y.t(), x)
    product = max(rates, key=rates.get)
    what = f"PyTorch {torch.__version__.split('+')[0]}"
    print(json.dumps({"what": what, "product": product, "gflops": rates[product], "all": rates}))


if __name__ == "__main__":
    main()
