"""Times 4-bit linear layers on a GPU beside bfloat16 cuBLAS and other 4-bit kernels, and writes JSON.

Run:    python kernels/bench/gpu_linear.py out.json [--peer NAME] [--peers FOLDER] [--tiny]
Weights are random and rotated past the L2; times are medians of CUDA-graph replays, with their spread. A second timing
of bfloat16 shows the noise. ``--peer`` measures one peer instead, so that one that fails takes nothing else with it.
"""

import argparse
import json
import sys
from collections.abc import Callable
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
ROWS = [1, 4, 16, 64, 128, 256, 512, 2048]
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
    """The same product over copies of its weight."""
    return [build() for _ in range(gpu_timing.copies(size))]


def relative_error(y: Tensor, want: Tensor) -> float:
    """NaN stays NaN, and is not small."""
    return float(torch.linalg.vector_norm(y.double() - want) / torch.linalg.vector_norm(want))


def measure(name: str, products: list[Any], weight: Weight, rows: list[int], seconds: float) -> list[dict[str, Any]]:
    """A record for each number of rows; ValueError for a product that is wrong."""
    n, k = weight.codes.shape
    dense = weight.dense()
    found = []
    for m in rows:
        x = torch.randn(m, k, device=dense.device).to(torch.float16 if name in gpu_peers.HALVES else torch.bfloat16)
        some = x[:4]
        want = some.double() @ dense[:4096].double().T
        error = relative_error(products[0](x)[:4, :4096], want)
        if not error < 2e-2:
            raise ValueError(f"{name} must agree with the dense weight within 2 %, it is off by {error} at M = {m}")
        times = gpu_timing.timed([partial(product, x) for product in products], seconds)
        found.append({"kernel": name, "n": n, "k": k, "m": m, "error": error, **times._asdict()})
        print(f"{name:10s} {n:6d} x {k:5d}  M {m:4d}  {times.median:9.2f} us", flush=True)
    return found


def guarded(shape: tuple[int, int], options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """`bench_shape`, with a peer's failure as a record of its text."""
    if not options.peer:
        return bench_shape(shape, options, device)
    try:
        return bench_shape(shape, options, device)
    except gpu_peers.FAILURES as error:
        print(f"{options.peer:10s} {shape[0]:6d} x {shape[1]:5d}  failed: {error}", flush=True)
        return [{"failed": options.peer, "n": shape[0], "k": shape[1], "error": f"{type(error).__name__}: {error}"}]


def bench_shape(shape: tuple[int, int], options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Records of every kernel asked for."""
    weight = random_weight(*shape, device)
    rows, seconds = options.rows, options.seconds
    if options.peer:
        build = gpu_peers.PEERS[options.peer]
        return measure(options.peer, rotated(lambda: build(weight), weight.codes.numel() // 2), weight, rows, seconds)
    dense = weight.dense()
    linears = rotated(lambda: partial(_dense, dense.clone()), 2 * dense.numel())
    found = measure("bf16", linears, weight, rows, seconds) + measure("bf16 again", linears, weight, rows[:1], seconds)
    del linears
    return found + measure("ptq", rotated(lambda: ours(weight)[0], ours(weight)[1]), weight, rows, seconds)


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


def main() -> None:
    """Parse the command line, measure, write."""
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
    bandwidth = gpu_timing.copy_bandwidth(device)
    records: list[dict[str, Any]] = []
    for shape in shapes:
        records += guarded(shape, options, device)
        result = {"copy_bytes_per_second": bandwidth, "records": with_ratios(records, bandwidth)}
        options.output.write_text(json.dumps(result, indent=1))  # what there is survives a time limit
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
