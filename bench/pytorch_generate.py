#!/usr/bin/env python3
"""Generation and evaluation of a TokenFormer in plain PyTorch: the peer of generate_bench. Prints one JSON line.

The model is that of pytorch_peer.py, without gradients. `generate` continues random prompts greedily with a key-value
cache; every way to write cache and attention listed in VARIANTS is tried once and the fastest is timed. `evaluate` is
the forward pass with its loss, with the faster attention. The median over --rounds is reported.
"""
import itertools
import json
import math
import statistics
import time

import torch
import torch.nn.functional as F

from pytorch_peer import LanguageModel, parser

CACHES = ["preallocated", "concatenated"]
ATTENTIONS = ["plain"] + (["scaled_dot_product_attention"] if hasattr(F, "scaled_dot_product_attention") else [])
VARIANTS = list(itertools.product(CACHES, ATTENTIONS))


class Watch:
    """Seconds and seconds of processor time since it was made."""

    def __init__(self):
        self.start = time.perf_counter(), time.process_time()

    def read(self):
        return time.perf_counter() - self.start[0], time.process_time() - self.start[1]


def queries_keys_values(block, x):
    return block.qkv(x).chunk(3, dim=-1) if hasattr(block, "qkv") else [f(x) for f in (block.query, block.key, block.value)]


def normed(block, which, x):
    return block.norms[which](x) if hasattr(block, "norms") else F.layer_norm(x, x.shape[-1:])


class Generator:
    def __init__(self, model, batch, length, variant):
        self.model, self.batch, self.length = model, batch, length
        self.cache, self.attention = variant

    def turn(self, rotary, x, first):
        """Rotary embedding of positions first, first + 1, ... of x [B, H, S, head_dim]."""
        cos, sin = (t[first : first + x.shape[2]] for t in (rotary.cos, rotary.sin))
        turned, kept = x[..., : rotary.width], x[..., rotary.width :]
        a, b = turned.chunk(2, dim=-1)
        return torch.cat([turned * cos + torch.cat([-b, a], dim=-1) * sin, kept], dim=-1)

    def extended(self, layer, k, v, first):
        """Keys and values of all positions so far, the new ones from `first` on."""
        if self.cache == "concatenated":
            if first > 0:
                k, v = (torch.cat([old, new], dim=2) for old, new in zip(self.seen[layer], (k, v)))
            self.seen[layer] = (k, v)
            return k, v
        last = first + k.shape[2]
        for old, new in zip(self.seen[layer], (k, v)):
            old[:, :, first:last] = new
        return (t[:, :, :last] for t in self.seen[layer])

    def attend(self, block, layer, x, first):
        batch, length, dim = x.shape
        q, k, v = (t.view(batch, length, block.heads, -1).transpose(1, 2) for t in queries_keys_values(block, x))
        q, k = self.turn(block.rotary, q, first), self.turn(block.rotary, k, first)
        k, v = self.extended(layer, k, v, first)
        if self.attention == "plain":
            scores = q @ k.transpose(-2, -1) / math.sqrt(dim // block.heads)
            if length > 1:
                scores = scores + block.mask[:length, :length]
            out = scores.softmax(dim=-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        return block.proj(out.transpose(1, 2).reshape(batch, length, dim))

    def next_token(self, tokens, first):
        x = self.model.embedding(tokens)
        for layer, block in enumerate(self.model.blocks):
            x = x + self.attend(block, layer, normed(block, 0, x), first)
            x = x + block.ffn(normed(block, 1, x))
        return (self.model.norm(x[:, -1]) @ self.model.embedding.weight.t()).argmax(dim=-1, keepdim=True)

    def run(self, prompt, added):
        blocks = self.model.blocks
        head_dim = self.model.embedding.weight.shape[1] // blocks[0].heads
        shape = (self.batch, blocks[0].heads, self.length, head_dim)
        self.seen = [None if self.cache == "concatenated" else (torch.empty(shape), torch.empty(shape)) for _ in blocks]
        tokens, first = prompt, 0
        watch = Watch()
        for _ in range(added):
            following = self.next_token(tokens, first)
            first += tokens.shape[1]
            tokens = following
            tokens.tolist()  # whoever prints them needs them now
        return watch.read()


def timed_generation(args, model):
    prompt = torch.randint(args.vocab, (args.batch, args.prompt))
    generators = [Generator(model, args.batch, args.seq, variant) for variant in VARIANTS]
    for generator in generators:
        generator.run(prompt, 2)
    best = min(generators, key=lambda g: g.run(prompt, args.tokens))
    times = [best.run(prompt, args.tokens) for _ in range(args.rounds)]
    return times, args.batch * args.tokens, f"{best.cache} cache, {best.attention} attention"


def timed_evaluation(args, model):
    text = torch.randint(args.vocab, (args.batch, args.seq + 1))

    def run(attention):
        for block in model.blocks:
            block.sdpa = attention != "plain"
        watch = Watch()
        model(text[:, :-1], text[:, 1:]).item()
        return watch.read()

    for attention in ATTENTIONS:
        run(attention)
    best = min(ATTENTIONS, key=run)
    return [run(best) for _ in range(args.rounds)], args.batch * args.seq, f"forward and loss, {best} attention"


def main():
    arguments = parser(__doc__)  # --attention is not looked at: the fastest is taken
    arguments.add_argument("--what", choices=["generate", "evaluate"], default="generate")
    for name, default in [("prompt", 32), ("tokens", 224), ("rounds", 3)]:
        arguments.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    with torch.no_grad():
        model = LanguageModel(args)
        times, tokens, how = (timed_generation if args.what == "generate" else timed_evaluation)(args, model)
    print(json.dumps({
        "what": f"PyTorch {torch.__version__}",
        "tokens_per_s": round(tokens / statistics.median(seconds for seconds, _ in times), 1),
        "tokens_per_cpu_s": round(tokens / statistics.median(cpu for _, cpu in times), 1),
        "how": how,
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": args.threads,
    }))


if __name__ == "__main__":
    main()
