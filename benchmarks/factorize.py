"""How fast a Hessian is factorised and coded with, against the machine's rate of float32 matrix products.

``python benchmarks/factorize.py [--sizes 1024 4096 14336] [--threads 2] [--repeats 3] [--json FILE]``: Cholesky and the
inversion of the factor (K^3/3 operations each, a multiply and an add being two), LAPACK's two calls for the same, and
the update of the columns still to come by a block of 128 finished ones. A product of a K x K matrix with (at most) 2048
columns is timed before and after every step; the faster one is what the step is held against. With one thread the clock
is the processor's, which other processes disturb less.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptq.gptq.inverse import invert_to_factor

BLOCK = 128
COLUMNS = 2048  # of a product


def seconds(action: Callable[[], object], prepare: Callable[[], object], repeats: int) -> float:
    """Of the fastest call."""
    best, clock = float("inf"), time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(repeats):
        prepare()
        started = clock()
        action()
        best = min(best, clock() - started)
    return best


def lapack(H: Tensor) -> Tensor:
    """The same factor by Cholesky and a triangular solve."""
    R = torch.linalg.cholesky_ex(H.flip(0, 1))[0].flip(0, 1)
    return torch.linalg.solve_triangular(R, torch.eye(len(R)), upper=True)


def measured(size: int, repeats: int, with_lapack: bool) -> dict[str, Any]:
    """A row of figures."""
    X = torch.randn(size, min(size, COLUMNS))
    H = torch.mm(X, X.t())
    H.diagonal().add_(0.01 * float(H.diagonal().mean()))
    U, other = H.clone(), torch.empty_like(X)
    errors, weight = torch.randn(BLOCK, size), torch.randn(size, size)

    def product() -> float:
        return 2 * size**2 * X.shape[1] / seconds(lambda: torch.mm(H, X, out=other), lambda: None, repeats)

    def against(action: Callable[[], object], operations: float) -> tuple[float, float]:
        before = product()
        rate = operations / seconds(action, lambda: U.copy_(H), repeats)
        return rate, rate / max(before, product())

    rows = {"inverse factor": against(lambda: invert_to_factor(U), 2 / 3 * size**3)}
    if with_lapack:
        rows["LAPACK"] = against(lambda: lapack(H), 2 / 3 * size**3)
    update = 2 * BLOCK * size * size
    rows["block update"] = against(lambda: weight.addmm_(H[:BLOCK].t(), errors, alpha=-1), update)
    figures = {name: {"gflops": round(rate / 1e9, 1), "share": round(share, 3)} for name, (rate, share) in rows.items()}
    return {"size": size, "product_gflops": round(product() / 1e9, 1), **figures}


def main() -> None:
    """Print a line for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096, 14336])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lapack-up-to", type=int, default=4096, help="it is slow on large ones")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    for size in options.sizes:
        row = measured(size, options.repeats, size <= options.lapack_up_to)
        rows.append({"threads": options.threads, **row})
        parts = [f"{k} {v['gflops']} ({v['share']:.0%})" for k, v in row.items() if isinstance(v, dict)]
        print(f"K {size:6d}: product {row['product_gflops']} GFLOP/s, " + ", ".join(parts), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
