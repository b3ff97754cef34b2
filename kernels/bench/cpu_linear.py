"""Times a quantized linear layer on the CPU beside a dense one and beside dequantizing the whole weight on every call.

Run:    python kernels/bench/cpu_linear.py --threads 1
Prints the best time of several calls in milliseconds. One weight is used again and again, so a small layer stays in
the cache; pin the threads (OMP_PROC_BIND=true OMP_PLACES=cores) and repeat on a quiet machine before believing a
difference.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ptq_kernels

BITS, GROUP = 4, 128


def best_ms(call: Callable[[], object], seconds: float) -> float:
    """The shortest of at least three calls within about `seconds`, after one to warm up."""
    call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def bench(size: int, rows: list[int], seconds: float) -> None:
    """One line for each number of rows, for a ``size x size`` 4-bit weight with zeros in groups of 128."""
    codes = torch.randint(0, 2**BITS, (size, size), dtype=torch.uint8)
    scales = torch.rand(size, size // GROUP) * 0.02 + 0.005
    zeros = torch.randint(0, 2**BITS, scales.shape, dtype=torch.uint8)
    scheme = {"bits": BITS, "group_size": GROUP}
    qweight = ptq_kernels.pack(codes, BITS)
    prepared = ptq_kernels.prepare(qweight, scales, zeros, in_features=size, **scheme)

    def whole() -> torch.Tensor:
        return ptq_kernels.dequantize(qweight, scales, zeros, in_features=size, dtype=torch.bfloat16, **scheme)

    dense = whole()
    for m in rows:
        x = torch.randn(m, size).bfloat16()

        def quantized(weight: torch.Tensor, layout: str, x: torch.Tensor = x) -> torch.Tensor:
            return ptq_kernels.matmul(x, weight, scales, zeros, layout=layout, impl="cpu", **scheme)

        want = functional.linear(x.double(), dense.double())
        runs: dict[str, Callable[[], torch.Tensor]] = {
            "dense bf16": lambda x=x: functional.linear(x, dense),
            "whole": lambda x=x: functional.linear(x, whole()),
            "canonical": lambda run=quantized: run(qweight, "canonical"),
            prepared.layout: lambda run=quantized: run(prepared.qweight, prepared.layout),
        }
        for name, run in runs.items():
            error = ((run().double() - want).norm() / want.norm()).item()
            assert error < 1e-2, f"{name} is wrong: relative error {error}"
        cells = "  ".join(f"{name} {best_ms(run, seconds):8.3f}" for name, run in runs.items())
        print(f"{size} x {size}  M {m:4d}  {cells}", flush=True)


def main() -> None:
    """Parse the command line, print the machine and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--seconds", type=float, default=0.3, help="measuring time of one cell")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {capability}, {options.threads} thread(s); best ms, 4 bits, group {GROUP}")
    for size in options.sizes:
        bench(size, options.rows, options.seconds)


if __name__ == "__main__":
    main()
