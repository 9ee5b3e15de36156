#!/usr/bin/env python3
"""The last table of the demo: held-out bits per byte before growth, right after it and at the end, beside two
baselines on the same text, and the three claims that follow. Exits 1 when a claim does not hold.

Baselines: the entropy of the scored tokens under their own frequencies, which is the best that any unigram model could
do on them; and bzip2 -9 of the held-out text.
"""
import argparse
import bz2
import json
import math
import sys

import h5py
import numpy

MOST_OF_UNIGRAM = 0.85  # the end must be at least 15 % under the unigram figure
MOST_GROWTH_CHANGE = 1e-5  # bits per byte


def protobuf_fields(data):
    """(number, value) of each field of a protobuf message; lengths give bytes, the others integers or raw bytes."""
    position = 0

    def varint():
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        length = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        yield key >> 3, data[position : position + length]
        position += length


def pieces_of(tokenizer):
    """The bytes of each token: of the 256 bytes, or of a sentencepiece ModelProto."""
    kind = tokenizer.attrs["kind"]
    if (kind.decode() if isinstance(kind, bytes) else kind) == "bytes":
        return [bytes([value]) for value in range(256)]
    byte_piece = 6
    pieces = []
    for number, value in protobuf_fields(tokenizer["model"][:].tobytes()):
        if number == 1:
            piece = dict(protobuf_fields(value))
            text = piece[1]
            pieces.append(bytes([int(text[3:5], 16)]) if piece.get(3) == byte_piece else text.replace(b"\xe2\x96\x81", b" "))
    return pieces


def held_out(path, split):
    """(tokens that are scored, text in bytes) of a split."""
    with h5py.File(path) as file:
        group = file[split]
        tokens = group["tokens"][:].astype(numpy.int64)
        starts = group["offsets"][:-1].astype(numpy.int64)
        pieces = pieces_of(file["tokenizer"])
        text = b"".join(pieces[token] for token in tokens)
        if len(text) != int(group["bytes"][:].sum()):
            sys.exit(f"{path}: the {split} split decodes to {len(text)} bytes, its documents have {group['bytes'][:].sum()}")
    scored = numpy.ones(len(tokens), bool)
    scored[starts] = False  # nothing precedes the first token of a document
    return tokens[scored], text


def parameters_of(checkpoint):
    sizes = []
    with h5py.File(checkpoint) as file:
        file["model"].visititems(lambda _, item: sizes.append(item.size) if isinstance(item, h5py.Dataset) else None)
    return sum(sizes)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="token dataset of tf_prepare")
    for point in ("before", "grown", "after"):
        parser.add_argument(f"--{point}", required=True, metavar="JSON", help="what tf_eval wrote")
    parser.add_argument("--split", default="test")
    args = parser.parse_args()

    results = {}
    for point in ("before", "grown", "after"):
        with open(getattr(args, point)) as file:
            results[point] = json.load(file)
    tokens, text = held_out(args.data, args.split)
    for point, result in results.items():
        if result["scored_tokens"] != len(tokens) or result["bytes"] != len(text):
            sys.exit(f"{point}: tf_eval scored {result['scored_tokens']} tokens of {result['bytes']} bytes, the {args.split} split of "
                     f"{args.data} has {len(tokens)} of {len(text)}")

    counts = numpy.bincount(tokens)
    shares = counts[counts > 0] / len(tokens)
    unigram = float(-(shares * numpy.log2(shares)).sum()) * len(tokens) / len(text)
    bzip2 = 8 * len(bz2.compress(text, 9)) / len(text)
    before, grown, after = (results[point]["bits_per_byte"] for point in ("before", "grown", "after"))

    print(f"held out: {len(text)} bytes, {len(tokens)} scored tokens\n")
    print(f"{'':34}{'bits per byte':>14}{'of unigram':>12}{'parameters':>12}")
    for name, value, point in [
        ("unigram entropy of the same tokens", unigram, None),
        ("bzip2 -9 of the same text", bzip2, None),
        ("stage 1, before growth", before, "before"),
        ("right after growth", grown, "grown"),
        ("stage 2, at the end", after, "after"),
    ]:
        parameters = f"{parameters_of(results[point]['checkpoint']):12d}" if point else ""
        print(f"{name:34}{value:14.6f}{100 * value / unigram:11.1f}%{parameters}")

    claims = [
        (after <= MOST_OF_UNIGRAM * unigram, f"the end is {100 * (1 - after / unigram):.1f} % under the unigram entropy (at least 15 %)"),
        (abs(grown - before) < MOST_GROWTH_CHANGE, f"growth moved it by {abs(grown - before):.1e} bits per byte (less than 1e-5)"),
        (after < grown, f"stage 2 moved it by {after - grown:+.4f} (down)"),
    ]
    print()
    for holds, text in claims:
        print(f"{'ok    ' if holds and math.isfinite(after) else 'FAILED'} {text}")
    return 0 if all(holds for holds, _ in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
