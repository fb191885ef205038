"""Which way to orthogonalise a matrix: in bfloat16 or float32, on the matrix or on its Gram matrix. Time and accuracy.

The input is like a momentum: random directions and singular values over three powers of ten, in bfloat16. Error is the
distance to what float64 makes of it with the same polynomials, relative to its norm. The JSON object is the last line.

    python benchmarks/muon.py --shapes 8192x2048,2048x2048,1024x2048 --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from braniac.model.lean_optim import orthogonal_rows
from braniac.model.muon import iterate


def momentum_like(rows: int, cols: int) -> Tensor:
    """bfloat16 [1, rows, cols] of a known spread; columns and rows are turned at random, not exactly orthogonally."""
    dice = torch.Generator().manual_seed(0)
    inner = min(rows, cols)
    left = torch.randn(rows, inner, generator=dice) / rows**0.5
    right = torch.randn(inner, cols, generator=dice) / cols**0.5
    return ((left * torch.logspace(0, -3, inner)) @ right)[None].bfloat16()


def plain(x: Tensor) -> Tensor:
    return iterate(x.mT).mT if x.shape[-2] > x.shape[-1] else iterate(x)


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "matrix, float32": lambda x: plain(x.float()),
    "matrix, bfloat16": plain,
    "Gram matrix, float32": lambda x: torch.cat([rows.clone() for _, rows in orthogonal_rows(x)])[None],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="2048x512,512x512,256x512")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip", default="", help="part of the names of ways to leave out, such as bfloat16")
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    options = parser.parse_args()
    found = []
    for shape in options.shapes.split(","):
        rows, cols = map(int, shape.split("x"))
        x = momentum_like(rows, cols)
        exact = plain(x.double())
        ways = {name: way for name, way in WAYS.items() if not options.skip or options.skip not in name}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        errors = {}
        for _ in range(options.rounds):
            for name, way in ways.items():
                began = time.perf_counter()
                result = way(x)
                seconds[name].append(time.perf_counter() - began)
                errors[name] = ((result.double() - exact).norm() / exact.norm()).item()
        for name in ways:
            found.append({"shape": shape, "way": name, "s": statistics.median(seconds[name]), "error": errors[name]})
            if not options.json:
                print(f"{shape:12}{name:24}{found[-1]['s']:9.3f} s   error {errors[name]:.2e}")
    print(json.dumps({"threads": torch.get_num_threads(), "results": found}))


if __name__ == "__main__":
    main()
