#!/usr/bin/env python3
"""Writes tests/golden/transformer.h5: the Transformer of bench/pytorch_peer.py in f64, what it gives and its gradients.

The tensors have the names and layouts of TokenForge, so that tf_inspect --compare reads them. Needs PyTorch and h5py.
    python3 tests/golden/transformer.py tests/golden/transformer.h5
"""

import argparse
import pathlib
import sys

import h5py
import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "bench"))
from pytorch_peer import LanguageModel  # noqa: E402

SHAPE = {"layers": 2, "dim": 32, "heads": 4, "vocab": 97, "ffn_dim": 90}
BATCH, SEQ = 3, 19
MODEL = "[model]\nkind = \"transformer\"\nmax_seq = 19\nrotary_fraction = 0.25\n" + "".join(
    f"{key} = {value}\n" for key, value in SHAPE.items())


def rotary_in_f64(rotary):
    frequency = 10000.0 ** (-torch.arange(0, rotary.width, 2, dtype=torch.float64) / rotary.width)
    angle = torch.outer(torch.arange(SEQ, dtype=torch.float64), frequency)
    angle = torch.cat([angle, angle], dim=-1)
    rotary.cos, rotary.sin = angle.cos(), angle.sin()


def ours(model, of):
    """Our parameters by path, from `of` (the value or the gradient) of theirs."""
    tensors = {"embedding": of(model.embedding.weight), "final_norm.weight": of(model.norm.weight),
               "final_norm.bias": of(model.norm.bias)}
    for i, block in enumerate(model.blocks):
        at = f"layers.{i}."
        for norm, name in zip(block.norms, ["attention", "ffn"]):
            tensors[at + name + ".norm.weight"], tensors[at + name + ".norm.bias"] = of(norm.weight), of(norm.bias)
        for name, weight, bias in zip(["query", "key", "value"], of(block.qkv.weight).chunk(3), of(block.qkv.bias).chunk(3)):
            tensors[at + f"attention.{name}.weight"], tensors[at + f"attention.{name}.bias"] = weight, bias[:, None]
        tensors[at + "attention.proj.weight"] = of(block.proj.weight).t()
        tensors[at + "attention.proj.bias"] = of(block.proj.bias)
        tensors[at + "ffn.in.weight"], tensors[at + "ffn.in.bias"] = of(block.ffn[0].weight), of(block.ffn[0].bias)[:, None]
        tensors[at + "ffn.out.weight"], tensors[at + "ffn.out.bias"] = of(block.ffn[2].weight).t(), of(block.ffn[2].bias)
    return tensors


def main():
    torch.manual_seed(11)
    args = argparse.Namespace(kind="transformer", attention="naive", seq=SEQ, **SHAPE)
    model = LanguageModel(args).double()
    rotary_in_f64(model.blocks[0].rotary)  # one for all blocks
    with torch.no_grad():
        for parameter in model.parameters():  # far from birth: no bias 0, no norm 1
            parameter += 0.2 * torch.randn_like(parameter)
    tokens = torch.randint(SHAPE["vocab"], (BATCH, SEQ))
    labels = torch.randint(SHAPE["vocab"], (BATCH, SEQ))
    with h5py.File(sys.argv[1], "w") as file:
        file.attrs["config"] = MODEL
        file.attrs["batch"], file.attrs["seq"] = BATCH, SEQ
        file["tokens"], file["labels"] = tokens.int().numpy(), labels.int().numpy()
        x = model.embedding(tokens)
        for i, block in enumerate(model.blocks):
            x = block(x)
            file[f"hidden/{i}"] = x.detach().numpy()
        logits = model.norm(x) @ model.embedding.weight.t()
        file["logits"] = logits.detach().numpy()
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        file.attrs["loss"] = loss.item()
        for path, value in ours(model, lambda p: p.detach()).items():
            file["weights/" + path] = value.contiguous().numpy()
        for path, value in ours(model, lambda p: p.grad).items():
            file["grads/" + path] = value.contiguous().numpy()


main()
