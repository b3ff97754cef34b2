"""Products of 16-bit floats on the CPU, torch's own and `ptq.half_products`, beside those of float32.

``python benchmarks/half_products.py [--threads 2] [--repeats 3] [--json FILE]``: milliseconds of the fastest call.
Where a processor has units for a dtype the two columns of it are the same thing.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from ptq.half_products import fast_half_products
from ptq.report import hardware

CPU = torch.device("cpu")
# Rows, input features, output features; a batch in front for a batched product.
SHAPES = [
    (8, 4096, 4096),
    (16, 4096, 4096),
    (512, 512, 1536),
    (512, 4096, 14336),
    (512, 14336, 4096),
    (8, 512, 64, 512),
]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def milliseconds(work: Callable[[], Tensor], repeats: int) -> float:
    """Of the fastest call after a first one."""
    work()
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return 1000 * best


def measured(shape: tuple[int, ...], repeats: int) -> dict[str, float]:
    """A row of figures."""
    *rows, features, outputs = shape
    x, weight = torch.randn(*rows, features), torch.randn(*rows[:-1], outputs, features)
    product = linear if len(rows) == 1 else lambda x, weight: torch.bmm(x, weight.mT)
    found = {"float32": milliseconds(lambda: product(x, weight), repeats)}
    for name, dtype in DTYPES.items():
        a, b = x.to(dtype), weight.to(dtype)
        found[name] = milliseconds(lambda a=a, b=b: product(a, b), repeats)
        with fast_half_products(CPU):
            found[f"{name}, ptq"] = milliseconds(lambda a=a, b=b: product(a, b), repeats)
    return found


@torch.no_grad()
def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, dict[str, float]] = {}
    for shape in SHAPES:
        name = " x ".join(map(str, shape))
        row = found[name] = measured(shape, options.repeats)
        if len(found) == 1:
            print(f"{'':18}" + "".join(f"{column:>16}" for column in row))
        print(f"{name:18}" + "".join(f"{value:16.1f}" for value in row.values()), flush=True)
    if options.json:
        about = {**hardware(CPU), "torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}
        options.json.write_text(json.dumps({"about": about, "milliseconds": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
