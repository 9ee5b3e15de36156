#!/usr/bin/env python3
"""TokenFormer, Transformer or MemoryFormer in plain PyTorch, as a user would write it: the peer of step_bench. Prints one JSON line.

The model is that of the paper's public configuration (pre-norm, non-parametric LayerNorm, Pattention l2_norm_gelu,
rotary embedding on a quarter of each head, tied head) in f32, with AdamW and a clipped global norm; --dtype bf16
computes under autocast, with parameters and moments in f32. A step is forward, backward, clip and update on random tokens; the median over --steps is reported after --warmup steps. Several
--ranks are processes under DistributedDataParallel over gloo, which share --batch. An option that the installed
PyTorch lacks is refused, never replaced.
"""
import argparse
import inspect
import json
import math
import os
import resource
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class Pattention(nn.Module):
    def __init__(self, dim, tokens, value_std):
        super().__init__()
        self.key = nn.Parameter(torch.randn(tokens, dim) * 0.02)
        self.value = nn.Parameter(torch.randn(tokens, dim) * value_std)
        self.scale = math.sqrt(tokens)

    def forward(self, x):
        scores = x @ self.key.t()
        return F.gelu(scores * (self.scale / scores.norm(dim=-1, keepdim=True))) @ self.value


class Rotary(nn.Module):
    def __init__(self, width, length, base=10000.0):
        super().__init__()
        self.width = width
        frequency = base ** (-torch.arange(0, width, 2).float() / width)
        angle = torch.outer(torch.arange(length).float(), frequency)
        angle = torch.cat([angle, angle], dim=-1)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, x):  # [B, H, S, head_dim]
        turned, kept = x[..., : self.width], x[..., self.width :]
        first, second = turned.chunk(2, dim=-1)
        half = torch.cat([-second, first], dim=-1)
        return torch.cat([turned * self.cos + half * self.sin, kept], dim=-1)


class Block(nn.Module):
    def __init__(self, args, rotary, mask):
        super().__init__()
        std = 2 / (args.layers * math.sqrt(args.dim))
        self.heads, self.rotary, self.sdpa = args.heads, rotary, args.attention == "sdpa"
        self.register_buffer("mask", mask)
        self.query, self.key, self.value, self.proj = (Pattention(args.dim, args.tokens_attn, std) for _ in range(4))
        self.ffn = Pattention(args.dim, args.tokens_ffn, std)

    def attention(self, x):
        batch, length, dim = x.shape
        q, k, v = (f(x).view(batch, length, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        q, k = self.rotary(q), self.rotary(k)
        if self.sdpa:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(dim // self.heads)
            mixed = (scores + self.mask).softmax(dim=-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, dim))

    def forward(self, x):
        x = x + self.attention(F.layer_norm(x, x.shape[-1:]))
        return x + self.ffn(F.layer_norm(x, x.shape[-1:]))


class DenseBlock(nn.Module):
    """GPT-NeoX, serial: LayerNorm with parameters, biases, GELU between two layers."""

    def __init__(self, args, rotary, mask):
        super().__init__()
        self.heads = args.heads
        self.sdpa = args.attention == "sdpa"
        self.rotary = rotary
        self.register_buffer("mask", mask)
        self.norms = nn.ModuleList(nn.LayerNorm(args.dim) for _ in range(2))
        self.qkv, self.proj = nn.Linear(args.dim, 3 * args.dim), nn.Linear(args.dim, args.dim)
        wide = args.ffn_dim or 4 * args.dim
        self.ffn = nn.Sequential(nn.Linear(args.dim, wide), nn.GELU(), nn.Linear(wide, args.dim))

    def attention(self, x):
        batch, length, dim = x.shape
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        q, k = self.rotary(q), self.rotary(k)
        if self.sdpa:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(dim // self.heads)
            mixed = (scores + self.mask).softmax(dim=-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, dim))

    def forward(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.ffn(self.norms[1](x))


class MemoryHash(nn.Module):
    """Rows of the tables, all tables one below the other, and the weights p of chunks of `bits` coordinates."""

    def __init__(self, width, bits):
        super().__init__()
        self.bits, self.tables = bits, width // bits
        self.register_buffer("powers", 2 ** torch.arange(bits - 1, -1, -1))
        self.register_buffer("offsets", torch.arange(self.tables) * 2**bits)

    def forward(self, x):
        chunks = x.reshape(-1, self.tables, self.bits)
        rows = ((chunks >= 0) * self.powers).sum(-1) + self.offsets
        return rows, torch.sigmoid(2 * chunks.abs()).prod(-1)


class MemoryLayer(nn.Module):
    def __init__(self, tables, bits, width, std):
        super().__init__()
        self.table = nn.Parameter(torch.randn(tables * 2**bits, width) * std * bits)
        self.bias = nn.Parameter(torch.randn(width) * 0.001)

    def forward(self, hashed):
        rows, weights = hashed
        return F.embedding_bag(rows, self.table, mode="sum", per_sample_weights=weights) + self.bias


class MemoryFormerBlock(nn.Module):
    """Memory Layers of --hash-bits bits, two more in the second of the Memory Block; no projection behind attention."""

    def __init__(self, args, rotary, mask):
        super().__init__()
        self.heads, self.rotary, self.sdpa = args.heads, rotary, args.attention == "sdpa"
        self.register_buffer("mask", mask)
        bits, tables = args.hash_bits, args.dim // args.hash_bits
        wide, std = tables * (bits + 2), math.sqrt(0.4 / args.dim)
        self.norms = nn.ModuleList(nn.LayerNorm(d) for d in (args.dim, args.dim, wide))
        self.hash, self.inner_hash = MemoryHash(args.dim, bits), MemoryHash(wide, bits + 2)
        self.query, self.key, self.value = (MemoryLayer(tables, bits, args.dim, std) for _ in range(3))
        self.ffn_in = MemoryLayer(tables, bits, wide, 0.02)
        self.ffn_out = MemoryLayer(tables, bits + 2, args.dim, 0.02)

    def attention(self, x):
        batch, length, dim = x.shape
        hashed = self.hash(x)
        q, k, v = (
            f(hashed).view(batch, length, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        q, k = self.rotary(q), self.rotary(k)
        if self.sdpa:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(dim // self.heads)
            mixed = (scores + self.mask).softmax(dim=-1) @ v
        return mixed.transpose(1, 2).reshape(batch, length, dim)

    def forward(self, x):
        x = x + self.attention(self.norms[0](x))
        inner = self.norms[2](self.ffn_in(self.hash(self.norms[1](x))))
        return x + self.ffn_out(self.inner_hash(inner)).view_as(x)


class LanguageModel(nn.Module):
    def __init__(self, args):
        super().__init__()
        kind = {"tokenformer": Block, "transformer": DenseBlock, "memoryformer": MemoryFormerBlock}[args.kind]
        self.embedding = nn.Embedding(args.vocab, args.dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        rotary = Rotary(int(0.25 * (args.dim // args.heads)), args.seq)
        mask = torch.full((args.seq, args.seq), float("-inf")).triu(1)
        self.blocks = nn.ModuleList(kind(args, rotary, mask) for _ in range(args.layers))
        self.norm = nn.LayerNorm(args.dim)

    def forward(self, tokens, targets):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits = self.norm(x) @ self.embedding.weight.t()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def parser(description):
    """What every peer is told about the model and its input."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in [
        ("dim", 128), ("layers", 4), ("heads", 4), ("tokens-attn", 128), ("tokens-ffn", 512), ("vocab", 256),
        ("seq", 256), ("batch", 16), ("threads", 2), ("ffn-dim", 0), ("hash-bits", 8),
    ]:
        result.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    result.add_argument("--kind", choices=("tokenformer", "transformer", "memoryformer"), default="tokenformer")
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    result.add_argument("--attention", choices=("naive", "sdpa"), default="naive", help="default naive")
    return result


def parse():
    arguments = parser(__doc__)
    for name, default in [("steps", 10), ("warmup", 2), ("ranks", 1)]:
        arguments.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    for name, choices in [
        ("optimizer", ("loop", "foreach", "fused")),
        ("compile", ("off", "default", "max-autotune")),
        ("dtype", ("f32", "tf32", "bf16")),
    ]:
        arguments.add_argument(f"--{name}", choices=choices, default=choices[0], help=f"default {choices[0]}")
    args = arguments.parse_args()

    lacks = [
        what
        for what, wanted, there in [
            ("scaled_dot_product_attention", args.attention == "sdpa", hasattr(F, "scaled_dot_product_attention")),
            ("fused AdamW", args.optimizer == "fused", "fused" in inspect.signature(torch.optim.AdamW).parameters),
            ("torch.compile", args.compile != "off", hasattr(torch, "compile")),
        ]
        if wanted and not there
    ]
    if lacks:
        arguments.exit(2, f"{arguments.prog}: PyTorch {torch.__version__} has no {' and no '.join(lacks)}\n")
    if args.device == "cuda" and (args.ranks > 1 or not torch.cuda.is_available()):
        arguments.exit(2, f"{arguments.prog}: --device cuda is for one rank and a device that PyTorch finds\n")
    if args.batch % args.ranks:
        arguments.exit(2, f"{arguments.prog}: --batch {args.batch} cannot be dealt to {args.ranks} ranks\n")
    return args


def run(rank, args, meeting):
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    torch.backends.cuda.matmul.allow_tf32 = args.dtype == "tf32"
    model = LanguageModel(args).to(args.device)
    parameters = sum(p.numel() for p in model.parameters())
    if args.ranks > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=args.ranks)
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    if args.compile != "off":
        model = torch.compile(model, mode=args.compile)
    kind = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}[args.optimizer]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, **kind)
    text = torch.randint(args.vocab, (args.batch, args.seq + 1)).chunk(args.ranks)[rank].to(args.device)

    seconds, last_loss = [], None
    for step in range(args.warmup + args.steps):
        start = time.perf_counter()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bf16"):
            loss = model(text[:, :-1], text[:, 1:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        last_loss = loss.item()
        if args.device == "cuda":
            torch.cuda.synchronize()
        if step >= args.warmup:
            seconds.append(time.perf_counter() - start)

    megabytes = torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)
    if args.ranks > 1:
        dist.all_reduce(megabytes)
        dist.destroy_process_group()
    if rank == 0:
        median = statistics.median(seconds)
        print(json.dumps({
            "what": f"PyTorch {torch.__version__.split('+')[0]}",
            "tokens_per_s": round(args.batch * args.seq / median, 1),
            "ms_per_step": round(1000 * median, 2),
            "ms_min": round(1000 * min(seconds), 2),
            "ms_max": round(1000 * max(seconds), 2),
            "peak_rss_mb": round(megabytes.item(), 1),
            "peak_device_mb": round(torch.cuda.max_memory_allocated() / 1e6, 1) if args.device == "cuda" else 0,
            "parameters": parameters,
            "loss": last_loss,
            "ranks": args.ranks,
            "threads": args.threads,
        }))


def main():
    args = parse()
    if args.ranks == 1:
        run(0, args, None)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run, args=(args, f"{folder}/meeting"), nprocs=args.ranks)


if __name__ == "__main__":
    main()
