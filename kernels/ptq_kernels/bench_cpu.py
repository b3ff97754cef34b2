"""Times a 4-bit linear layer on this machine's CPU beside dense layers and torch's own int4 paths.

``python -m ptq_kernels.bench_cpu --shapes 4096x4096 --rows 1 16 --threads 1 2 --json out.json``

Threads are pinned to cores: unpinned, two OpenMP threads of a small virtual machine may share one core for 8 ms at a
time, and timings are noise. Every call takes another copy of its weight, and the copies together exceed the last-level
cache, as the layers of a model do. The columns take turns, so that what else the machine does hits all of them.
Before a cell is timed its result, written into memory full of NaN, is compared with float64.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ptq_kernels import api, bitstream, layouts
from ptq_kernels.cpu import aten_int4, library, strips
from ptq_kernels.layouts import PackedWeight

SHAPES = ("4096x4096", "4096x14336", "14336x4096", "4096x1024", "512x1536")  # K x N
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
BITS, GROUP = 4, 128
# Relative, of the whole result: bfloat16 weights and rows give about 2.5e-3, normal rows in 8 bits about 1e-2.
MOST_ERROR, MOST_INT8_ERROR = 1e-2, 2e-2
INT8, COMPILED = "library int8", "compiled int4"
# Two copies each in bfloat16, float32 and at least two packed layouts, the reference in float32 and float64.
_BYTES_A_WEIGHT = 26
_BYTES_A_VALUE = 12  # of x and y: a dtype, float32 or float64, and both of the comparison
_PINNED = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

Call = Callable[[], Tensor]


class Copies:
    """Copies of one weight, handed out in turn, together larger than the last-level cache."""

    def __init__(self, make: Callable[[], Tensor], most_bytes: int) -> None:
        """Of what `make` makes: two copies at least, `most_bytes` or 2000 copies at most."""
        weight = make()
        count = most_bytes // (weight.numel() * weight.element_size())
        self._items = [weight, *(make() for _ in range(min(max(1, count), 2000)))]
        self._at = 0

    def all(self) -> list[Tensor]:
        """Every copy."""
        return self._items

    def next(self) -> Tensor:
        """The copy whose turn it is."""
        self._at = (self._at + 1) % len(self._items)
        return self._items[self._at]


class Cell(NamedTuple):
    """One measurement."""

    shape: str
    rows: int
    threads: int
    column: str
    best_ms: float
    median_ms: float
    error: float  # relative to float64
    compile_s: float | None = None


def last_level_cache() -> int:
    """Bytes, as Linux tells; 32 MiB where it does not."""
    sizes = [path.read_text().strip() for path in sorted(_CACHES.glob("index*/size"))]
    return max((int(size.rstrip("K")) << 10 for size in sizes if size.endswith("K")), default=32 << 20)


def read_bandwidth() -> float:
    """GB/s of summing memory that no cache holds: a lower bound of what the machine can."""
    values = torch.ones(max(1 << 28, 2 * last_level_cache()) // 4)
    return values.numel() * 4e-9 / min(_seconds(values.sum) for _ in range(5))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Layer:
    """One random layer, with zeros, in every form under test."""

    def __init__(self, shape: str, compiled: bool) -> None:
        """`shape`: "KxN"; `compiled`: with torch.compile's int4 path."""
        self.shape, self.compiled = shape, compiled
        self.compile_seconds = 0.0  # of the last call of `calls`
        self.columns, self.out_features = (int(part) for part in shape.split("x"))
        generator = torch.Generator().manual_seed(0)
        scales_shape = (self.out_features, self.columns // GROUP)
        codes = torch.randint(0, 16, (self.out_features, self.columns), dtype=torch.uint8, generator=generator)
        self.scales = (torch.rand(scales_shape, generator=generator) * 0.02 + 0.005).bfloat16()
        self.zeros = torch.randint(0, 16, scales_shape, dtype=torch.uint8, generator=generator)
        qweight = bitstream.pack(codes, BITS)
        self.weight = PackedWeight(qweight, self.scales, self.zeros, BITS, GROUP, self.columns)
        self.dense = api.dequantize(
            qweight, self.scales, self.zeros, bits=BITS, group_size=GROUP, in_features=self.columns
        )
        most = max(3 * last_level_cache() // 2, 1 << 28)
        floats = (torch.bfloat16, torch.float32)
        self._dense = {dtype: Copies(partial(self.dense.to, dtype, copy=True), most) for dtype in floats}
        self._packed = {name: Copies(self._laid_out(name), most) for name in self.layouts()}

    def _laid_out(self, layout: str) -> Callable[[], Tensor]:
        """Makes the weight as loading would; what a layout does not change is copied."""

        def make() -> Tensor:
            qweight = layouts.convert(self.weight, layout).qweight
            return qweight.clone() if qweight is self.weight.qweight else qweight

        return make

    def packed_bytes(self) -> int:
        """What the library reads of one weight; 0 without a library."""
        return self._packed["strips"].next().numel() if "strips" in self._packed else 0

    def layouts(self) -> list[str]:
        """Those that exist here for this layer."""
        names = ("strips", "aten_int4", "canonical")
        fitting = [name for name in names if layouts.get(name).refuse(self.weight) is None]
        return [name for name in fitting if name != "canonical" or "aten_int4" not in fitting]

    def calls(self, rows: int) -> dict[str, tuple[Tensor, Call]]:
        """x and the product, by column."""
        x = torch.randn(rows, self.columns, generator=torch.Generator().manual_seed(rows))
        bf16, fp16 = x.bfloat16(), x.half()
        found: dict[str, tuple[Tensor, Call]] = {
            "dense bf16": (bf16, lambda: functional.linear(bf16, self._dense[torch.bfloat16].next())),
            "dense fp32": (x, lambda: functional.linear(x, self._dense[torch.float32].next())),
        }
        if "aten_int4" in self._packed:
            aten = self.weight._replace(layout="aten_int4")
            found["aten int4"] = (
                bf16,
                lambda: aten_int4.matmul(bf16, aten._replace(qweight=self._packed["aten_int4"].next())),
            )
        if self.compiled:
            found[COMPILED] = (bf16, self._compile(bf16))
        found["torch only"] = (bf16, self._ours(bf16, self.layouts()[-1], "cpu-torch"))
        if "strips" in self._packed:
            for name, like in (("bf16", bf16), ("fp16", fp16), ("fp32", x)):
                found[f"library {name}"] = (like, self._ours(like, "strips", "cpu"))
            if strips.refuse_int8(self.weight._replace(layout="strips"), library.best()) is None:
                found[INT8] = (bf16, self._ours(bf16, "strips", "cpu", "int8"))
            for name in ("high", "medium"):
                found[f"fp32 {name}"] = (x, _with_precision(name, self._ours(x, "strips", "cpu")))
        return found

    def _ours(self, x: Tensor, layout: str, impl: str, activation: str | None = None) -> Call:
        copies = self._packed[layout]

        def product(x: Tensor, qweight: Tensor) -> Tensor:
            return api.matmul(
                *(x, qweight, self.scales, self.zeros),
                bits=BITS,
                group_size=GROUP,
                layout=layout,
                impl=impl,
                activation=activation,
            )

        for qweight in copies.all() if layout == "strips" else ():  # the first call with a weight checks it
            product(x[:1], qweight)
        return lambda: product(x, copies.next())

    def _compile(self, x: Tensor) -> Call:
        """torch.compile's own kernel; it takes its weight as a constant, so one copy, cached where it fits."""
        from torch._inductor import config

        codes = bitstream.unpack(self.weight.qweight, BITS, self.columns)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        scales = self.scales.float()
        pairs = torch.stack([scales, (8 - self.zeros.float()) * scales], -1).transpose(0, 1).contiguous().bfloat16()

        class Product(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("packed", packed)
                self.register_buffer("pairs", pairs)

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, GROUP, self.pairs)
                return y

        torch._dynamo.reset()
        module = torch.compile(Product().eval())
        with torch.no_grad(), config.patch(freezing=True, max_autotune=True, force_disable_caches=True):
            self.compile_seconds = _seconds(lambda: module(x))

        def call() -> Tensor:
            with torch.no_grad():
                y: Tensor = module(x)
            return y

        return call


def _with_precision(name: str, call: Call) -> Call:
    def run() -> Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(name)
        y = call()
        torch.set_float32_matmul_precision(before)
        return y

    return run


def _error(call: Call, want: Tensor) -> float:
    """Relative to `want`, the result written into memory full of NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory
    got = call().double()
    torch.use_deterministic_algorithms(False)
    return float((got - want).norm() / want.norm())


def measure(layer: Layer, rows: int, threads: int, seconds: float) -> list[Cell]:
    """All columns of one row of the table; RuntimeError for a wrong result."""
    calls = layer.calls(rows)
    dense = layer.dense.double()
    errors = {name: _error(call, x.double() @ dense.T) for name, (x, call) in calls.items()}
    del dense
    for name, error in errors.items():
        if not error <= (most := MOST_INT8_ERROR if name == INT8 else MOST_ERROR):
            raise RuntimeError(
                f"{name} of {layer.shape} with {rows} rows must be within {most} of float64, found {error:.2e}; "
                "rebuild with `python -m ptq_kernels.build` and report it if it stays"
            )
    times: dict[str, list[float]] = {name: [] for name in calls}
    # several times in turn: what disturbs a shared machine for a second must not take all timings of one column
    while unfinished := [name for name, taken in times.items() if len(taken) < 9 or sum(taken) < seconds]:
        for name in unfinished:
            times[name] += [_seconds(calls[name][1]) for _ in range(3)]
    cells = [
        Cell(layer.shape, rows, threads, name, 1e3 * min(t), 1e3 * sorted(t)[len(t) // 2], errors[name])
        for name, t in times.items()
    ]
    return [c._replace(compile_s=layer.compile_seconds) if c.column == COMPILED else c for c in cells]


def _line(cells: Sequence[Cell]) -> str:
    dense = cells[0].best_ms
    return "".join(f"{c.best_ms:10.3f} {dense / c.best_ms:5.2f}x" for c in cells)


def _notes(layer: Layer, cells: Sequence[Cell], bandwidth: float) -> str:
    """What to know beside the table of one shape and number of threads."""
    in_bytes = [c.error for c in cells if c.column == INT8]
    lines = [f"relative error at most {max(c.error for c in cells if c.column != INT8):.1e}"]
    if in_bytes:
        lines[0] += f"; {INT8}: {max(in_bytes):.1e}"
    for cell in cells:
        if cell.rows == 1 and cell.column == "library bf16":
            rate = layer.packed_bytes() / cell.best_ms * 1e-6
            share = f"{rate / bandwidth:.2f} of what torch.sum reads"
            lines.append(f"{cell.column}, 1 row: {rate:.1f} GB/s of packed weights, {share}")
    taken = [c.compile_s for c in cells if c.compile_s is not None]
    if taken:
        lines.append(f"torch.compile took {min(taken):.0f} to {max(taken):.0f} s for each number of rows")
    return "\n".join(lines)


def run(
    shapes: Sequence[str], rows: Sequence[int], bandwidth: dict[int, float], seconds: float, compiled: bool
) -> list[Cell]:
    """Measure in this process and print as it goes. bandwidth: GB/s by the number of threads."""
    cells: list[Cell] = []
    for shape in shapes:
        layer = Layer(shape, compiled)
        for count in bandwidth:
            torch.set_num_threads(count)
            title = f"{shape.replace('x', ' -> ')}, {BITS} bits, group {GROUP}, {count} thread(s)"
            print(f"\n{title}; best ms, times dense bf16")
            found: list[Cell] = []
            for m in rows:
                row = measure(layer, m, count, seconds)
                if m == rows[0]:
                    print(" rows" + "".join(f"{c.column:>17}" for c in row))
                print(f"{m:5d}" + _line(row), flush=True)
                found += row
            print(_notes(layer, found, bandwidth[count]), flush=True)
            cells += found
    return cells


def _refusal(shapes: Sequence[str], rows: Sequence[int]) -> str | None:
    """Why nothing can be measured."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for shape in shapes:
        k, n = (int(part) for part in shape.split("x"))
        needed = k * n * _BYTES_A_WEIGHT + max(rows) * (k + n) * _BYTES_A_VALUE
        if needed > memory:
            return (
                f"a shape must fit into memory: {shape} with {max(rows)} rows needs {needed / 1e9:.0f} GB in all its "
                f"forms, this machine has {memory / 1e9:.0f} GB"
            )
    return None


def main(
    shapes: Sequence[str] = SHAPES,
    rows: Sequence[int] = ROWS,
    threads: Sequence[int] = (1,),
    json_path: str | None = None,
    compiled: bool = False,
    seconds: float = 0.3,
) -> int:
    """Run the bench in a new process with pinned threads; its exit code. `compiled` adds torch.compile's int4 path."""
    refusal = _refusal(shapes, rows)
    if refusal:
        print(f"bench: {refusal}", file=sys.stderr)
        return 2
    options = [
        "--shapes",
        *shapes,
        "--rows",
        *map(str, rows),
        "--threads",
        *map(str, threads),
        "--seconds",
        str(seconds),
    ]
    options += ["--json", json_path] if json_path else []
    options += ["--compiled"] if compiled else []
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *sys.path])
    environment = {**os.environ, **_PINNED, "OMP_NUM_THREADS": str(max(threads)), "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-m", "ptq_kernels.bench_cpu", *options], env=environment).returncode


def _worker() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="KxN")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--seconds", type=float, default=0.3, help="measuring time of one cell")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--compiled", action="store_true", help="add torch.compile's int4 path (needs a compiler)")
    o = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in _PINNED.items()):
        return main(o.shapes, o.rows, o.threads, o.json, o.compiled, o.seconds)
    best = library.best()
    bandwidth = {}
    for count in o.threads:
        torch.set_num_threads(count)
        bandwidth[count] = round(read_bandwidth(), 1)
    machine = {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "library": best.name if best else None,
        "machine": platform.processor() or platform.machine(),
        "last_level_cache": last_level_cache(),
        "read_gb_per_s": bandwidth,
    }
    print(json.dumps(machine))
    cells = run(o.shapes, o.rows, bandwidth, o.seconds, o.compiled)
    if o.json:
        Path(o.json).write_text(json.dumps({"machine": machine, "cells": [c._asdict() for c in cells]}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(_worker())
