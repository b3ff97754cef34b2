"""The search for scales with the C++ library and with torch alone: ``python benchmarks/grid_search.py [--rows 4096]``.

Seconds for one weight ``[rows, columns]``, the faster of two each, on a machine with nothing else on it, and the share
of groups where both find the same scale: sums in another order make others as good.
"""

import argparse
import time
from unittest.mock import patch

import torch
from ptq_kernels.cpu import library

from ptq.formats.codec import Scheme
from ptq.grid import Grid
from ptq.grid_search import search_grid

SCHEMES = (Scheme(4, 128, True), Scheme(4, 128, False), Scheme(3, 32, True), Scheme(4, -1, True))


def timed(weight: torch.Tensor, importance: torch.Tensor, scheme: Scheme) -> tuple[float, Grid]:
    """Seconds of the faster of two, and what was found."""
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        grid = search_grid(weight, importance, scheme)
        seconds.append(time.perf_counter() - started)
    return min(seconds), grid


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    options = parser.parse_args()
    found = library.best()
    name = found.name if found else "no library"
    print(f"{options.rows} x {options.columns}, {torch.get_num_threads()} threads, {name}")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(options.rows, options.columns, generator=generator)
    importance = torch.rand(options.columns, generator=generator) + 0.01
    print("| bits | group size | symmetric | library, s | torch, s | ratio | same scales |")
    print("|---|---|---|---|---|---|---|")
    for scheme in SCHEMES:
        ours, grid = timed(weight, importance, scheme)
        with patch.object(library, "best", lambda: None):
            theirs, other = timed(weight, importance, scheme)
        same = float((grid.scales == other.scales).float().mean())
        print(
            f"| {scheme.bits} | {scheme.group_size} | {'yes' if scheme.symmetric else 'no'} | {ours:.2f} | "
            f"{theirs:.2f} | {theirs / ours:.1f} | {100 * same:.2f} % |"
        )


if __name__ == "__main__":
    main()
