"""Times 4-bit linear layers on a GPU beside bfloat16 cuBLAS and other 4-bit kernels, and writes JSON.

Run:    python kernels/bench/gpu_linear.py out.json [--peer NAME] [--peers FOLDER] [--tiny]
Weights are random and rotated past the L2; times are medians of CUDA-graph replays, with their spread. A second timing
of bfloat16 shows the noise. ``--peer`` measures one peer instead, so that one that fails takes nothing else with it.
"""

import argparse
import contextlib
import copy
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_peers
import gpu_timing
import ptq_kernels
from gpu_peers import Weight

# (out, in): Llama-3-8B
SHAPES = [(4096, 4096), (1024, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336), (128256, 4096)]
ROWS = gpu_peers.ROWS
GROUP = 128


def random_weight(n: int, k: int, device: torch.device) -> Weight:
    """Scales that keep the sums near 1."""
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device)
    scales = (torch.rand(n, k // GROUP, device=device) + 0.5) * (0.25 / k**0.5)
    return Weight(codes, scales.to(torch.bfloat16))


def ours(weight: Weight) -> tuple[Callable[[Tensor], Tensor], int]:
    """(the product, bytes of a weight)."""
    k = weight.codes.shape[1]
    scheme = {"bits": 4, "group_size": GROUP}
    packed = ptq_kernels.pack(weight.codes, 4)
    prepared = ptq_kernels.prepare(packed, weight.scales, in_features=k, impl="triton", **scheme)
    product = partial(_matmul, prepared, scheme)
    return product, prepared.qweight.numel()


def _matmul(prepared: ptq_kernels.Prepared, scheme: dict[str, int], x: Tensor) -> Tensor:
    arguments = (x, prepared.qweight, prepared.scales)
    return ptq_kernels.matmul(*arguments, layout=prepared.layout, impl="triton", **scheme)


def rotated(build: Callable[[], Callable[[Tensor], Tensor]], size: int) -> list[Callable[[Tensor], Tensor]]:
    """The same product over copies of its weight; a module is copied, for some take long to build."""
    first = build()
    count = gpu_timing.copies(size) - 1
    copied = isinstance(first, torch.nn.Module)
    return [first, *(copy.deepcopy(first) if copied else build() for _ in range(count))]


class Records:
    """What was measured so far, written after every cell: nothing that goes wrong later takes it away."""

    def __init__(self, output: Path, bandwidth: float) -> None:
        self.output, self.bandwidth = output, bandwidth
        self.records: list[dict[str, Any]] = []

    def add(self, record: dict[str, Any]) -> None:
        """Keep, print and write."""
        self.records.append(record)
        what = record.get("kernel") or record["failed"]
        how = f"{record['median']:9.2f} us" if "kernel" in record else f"failed: {record['error']}"
        print(f"{what:10s} {record['n']:6d} x {record['k']:5d}  M {record.get('m', '-'):>4}  {how}", flush=True)
        result = {"copy_bytes_per_second": self.bandwidth, "records": with_ratios(self.records, self.bandwidth)}
        unfinished = self.output.with_suffix(".partial")
        unfinished.write_text(json.dumps(result, indent=1))
        unfinished.replace(self.output)

    @contextlib.contextmanager
    def guarded(self, name: str, n: int, k: int, **cell: int) -> Iterator[None]:
        """A failure of one kernel is a record of its text."""
        try:
            yield
        except gpu_peers.FAILURES as error:
            self.add({"failed": name, "n": n, "k": k, **cell, "error": f"{type(error).__name__}: {error}"})


def relative_error(product: Callable[[Tensor], Tensor], x: Tensor, dense: Tensor) -> float:
    """Of the first, middle and last rows and the first and last columns, written into memory full of NaN."""
    rows = sorted({0, len(x) // 2, len(x) - 1})
    columns = [*range(min(2048, len(dense))), *range(max(2048, len(dense) - 2048), len(dense))]
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory
    y = product(x)
    torch.use_deterministic_algorithms(False)
    want = x[rows].double() @ dense[columns].double().T
    return float(torch.linalg.vector_norm(y[rows][:, columns].double() - want) / torch.linalg.vector_norm(want))


def measure(name: str, products: list[Any], weight: Weight, rows: list[int], seconds: float, records: Records) -> None:
    """A record for each number of rows; one of its text for a product that is wrong."""
    n, k = weight.codes.shape
    dense = weight.dense()
    for m in rows:
        with records.guarded(name, n, k, m=m):
            x = torch.randn(m, k, device=dense.device).to(torch.float16 if name in gpu_peers.HALVES else torch.bfloat16)
            errors = [relative_error(product, x, dense) for product in (products[0], products[-1])]
            if not all(error < 2e-2 for error in errors):
                raise ValueError(f"{name} must agree with the dense weight within 2 %, it is off by {errors}")
            times = gpu_timing.timed([partial(product, x) for product in products], seconds)
            records.add({"kernel": name, "n": n, "k": k, "m": m, "error": max(errors), **times._asdict()})


def bench_shape(shape: tuple[int, int], options: argparse.Namespace, device: torch.device, records: Records) -> None:
    """Every kernel asked for."""
    weight = random_weight(*shape, device)
    if options.peer:
        build = gpu_peers.PEERS[options.peer]
        with records.guarded(options.peer, *shape):
            products = rotated(lambda: build(weight), weight.codes.numel() // 2)
            measure(options.peer, products, weight, options.rows, options.seconds, records)
        return
    dense = weight.dense()
    linears = rotated(lambda: partial(_dense, dense.clone()), 2 * dense.numel())
    measure("bf16", linears, weight, options.rows, options.seconds, records)
    measure("bf16 again", linears, weight, options.rows[:1], options.seconds, records)
    del linears
    with records.guarded("ptq", *shape):
        products = rotated(lambda: ours(weight)[0], ours(weight)[1])
        measure("ptq", products, weight, options.rows, options.seconds, records)


def _dense(dense: Tensor, x: Tensor) -> Tensor:
    return functional.linear(x, dense)


def with_ratios(records: list[dict[str, Any]], bandwidth: float) -> list[dict[str, Any]]:
    """Add the ratio to bfloat16 and the fraction of the copy bandwidth that the packed weight, x and y move at."""
    timed = [r for r in records if "kernel" in r]
    dense = {(r["n"], r["k"], r["m"]): r["median"] for r in timed if r["kernel"] == "bf16"}
    for r in timed:
        n, k, m = r["n"], r["k"], r["m"]
        bits = 16 if r["kernel"].startswith("bf16") else 4 + 16 / GROUP
        r["fraction_of_copy"] = (n * k * bits / 8 + 2 * m * (n + k)) / r["median"] * 1e6 / bandwidth
        if (n, k, m) in dense:
            r["ratio_to_bf16"] = dense[n, k, m] / r["median"]
    return records


def main() -> int:
    """Parse the command line, measure, write; 1 if a product that is no peer's failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--peer", choices=list(gpu_peers.PEERS))
    parser.add_argument("--peers", type=Path, help="folder with the packages of other kernels")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--seconds", type=float, default=0.1, help="measuring time of one cell")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on any machine, to try the bench itself")
    options = parser.parse_args()
    gpu_peers.present(options.peers)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = [(256, 256), (128, 512)] if options.tiny else SHAPES
    options.rows = options.rows[:3] if options.tiny else options.rows
    torch.manual_seed(0)
    records = Records(options.output, gpu_timing.copy_bandwidth(device))
    for shape in shapes:
        bench_shape(shape, options, device, records)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return int(any(record.get("failed") in ("bf16", "bf16 again", "ptq") for record in records.records))


if __name__ == "__main__":
    sys.exit(main())
