#!/usr/bin/env python3
"""PyTorch's causal scaled-dot-product attention by each of its backends, cuDNN's and FlashAttention's among them: the yardsticks
of our kernels. Prints one JSON line: milliseconds of a call, forward and backward, the least of --repeats; a backend
that has no kernel for the shape says why.
"""
import argparse
import json
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 8), ("heads", 12), ("seq", 2048), ("head-dim", 64), ("repeats", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("f32", "tf32", "bf16"), default="bf16")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = args.dtype == "tf32"
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    shape = (args.batch, args.heads, args.seq, args.head_dim)
    q, k, v = (torch.randn(shape, device=args.device, dtype=dtype, requires_grad=True) for _ in range(3))
    gradient = torch.randn(shape, device=args.device, dtype=dtype)

    def now():
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def measure(backend):
        best = [float("inf"), float("inf")]
        with sdpa_kernel(backend):
            for _ in range(args.repeats + 2):  # the first ones warm up, and are hardly ever the least
                begun = now()
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                between = now()
                out.backward(gradient)
                ended = now()
                q.grad = k.grad = v.grad = None
                best = [min(best[0], between - begun), min(best[1], ended - between)]
        return {"forward_ms": 1e3 * best[0], "backward_ms": 1e3 * best[1]}

    found = {"what": f"PyTorch {torch.__version__}"}
    for name, backend in BACKENDS.items():
        try:
            found[name] = measure(backend)
        except RuntimeError as error:
            found[name] = {"none": str(error).splitlines()[0]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
