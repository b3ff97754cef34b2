"""The product with a weight in fragment order: which kernel by the number of rows, and a launch with little overhead.

All of it happens inside one torch operator, so a new number of rows neither recompiles a graph nor breaks it. What does
not depend on the call (plans, compiled kernels) is kept for each kind of layer in a `_Layer`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from ptq_kernels import tiles
from ptq_kernels.layouts import PackedWeight
from ptq_kernels.triton import clusters, configs, dense, enqueue, recipes, w4a16, workspace
from ptq_kernels.triton.configs import Gpu, Plan, Problem

ORDERS = {"tile_sm90": 90, "tile_sm80": 80}
_INTERPRETED_GPU = Gpu(90, 132)  # whose table the interpreter follows
_MOST_DESCRIBED = 65536  # weights of one shape


@cache
def gpu(index: int) -> Gpu:
    """The capability and the number of multiprocessors of a CUDA device."""
    properties = torch.cuda.get_device_properties(index)
    return Gpu(10 * properties.major + properties.minor, properties.multi_processor_count)


def gpu_of(device: torch.device) -> Gpu:
    """That of a CUDA device; for the interpreter the one whose table it follows."""
    return gpu(device.index or 0) if device.type == "cuda" else _INTERPRETED_GPU


class _Launch:
    """The kernel of a tile with one set of constants, for any rows that `plan` serves."""

    def __init__(self, plan: Plan, layer: "_Layer") -> None:
        self.plan = plan
        self.tile, self.splits, early = plan
        if w4a16.interpreted() or not recipes.begins_early(layer.gpu):
            early = 0
        self.cluster = 1 if w4a16.interpreted() else recipes.cluster(layer.gpu, plan.tile, self.splits)
        self.constants = recipes.constants(
            plan.tile,
            **layer.scheme,
            bias=layer.has_bias,
            splits=self.splits,
            cluster=self.cluster,
            even=layer.shape[1] % plan.tile.block_k == 0,
            early=early,
            assembly=not w4a16.interpreted(),
        )
        self.options = recipes.options(plan.tile, early > 0)
        steps = -(-layer.shape[1] // plan.tile.block_k)
        if self.cluster > steps or self.cluster not in (1, *configs.CLUSTERS):
            raise ValueError(  # a program without a step would never end
                f"a pipelined tile must be split into {', '.join(map(str, configs.CLUSTERS))} programs with a step of "
                f"{plan.tile.block_k} columns each, or not at all, found {self.splits} splits of {steps} steps"
            )
        if self.tile.kind == "slim" and (self.splits > 1 or layer.shape[1] % self.tile.block_k):
            raise ValueError(  # columns beyond the last whole step would be left out
                f"a slim tile must not be split and its steps of {self.tile.block_k} columns must divide those of the "
                f"weight, found {self.splits} splits and {layer.shape[1]} columns"
            )
        self.takes_parts = "parts_ptr" in recipes.kernel_of(self.tile).arg_names
        self.compiled: Any = None
        self.described: dict[int, Any] = {}  # descriptors of weights, by their addresses

    def __call__(
        self, sizes: tuple[int, int, int], x: Tensor, qweight: Tensor, bias: Tensor | None, y: Tensor, stream: int
    ) -> None:
        """Fill y with M, N, K. Every tensor is contiguous and aligned: the compiled kernel takes that for granted."""
        rows, outputs, columns = sizes
        grid = (-(-outputs // self.tile.block_n) * -(-rows // self.tile.block_m), self.splits // self.cluster, 1)
        described = self._describe(x, qweight, sizes)
        tensors: tuple[Tensor, ...] = (qweight, x if bias is None else bias, y)
        if not described:
            tensors = (x, *tensors)
        if self.takes_parts:
            tensors = (*tensors, *workspace.get(x.device, stream))
        if self.compiled is not None:
            self.compiled(grid, stream, described, tensors, sizes)
            return
        if workspace.capturing(x.device) and not w4a16.interpreted():
            raise RuntimeError(
                f"the kernel for {rows} rows of a {outputs} x {columns} weight must be compiled before a CUDA graph is "
                "captured, it is not; call ptq_kernels.warmup, or matmul once with so many rows, before"
            )
        kernel, arguments = recipes.kernel_of(self.tile), (*described, *tensors, *sizes)
        if w4a16.interpreted():
            kernel[grid](*arguments, **self.constants, **self.options)
            return
        compiled = kernel.warmup(*arguments, grid=grid, **self.constants, **self.options)
        if self.cluster > 1:
            clusters.join(compiled, self.cluster, self.tile.block_m, self.tile.block_n)
        self.compiled = enqueue.Compiled(compiled, tuple(self.constants.values()))
        self.compiled(grid, stream, described, tensors, sizes)

    def _describe(self, x: Tensor, qweight: Tensor, sizes: tuple[int, int, int]) -> tuple[Any, ...]:
        """What the copy engine is told of x and of the weight, where the kernel uses it."""
        if self.tile.kind != "pipelined":
            return ()
        rows, outputs, columns = sizes
        address = qweight.data_ptr()
        words = self.described.get(address)
        if words is None:
            if len(self.described) == _MOST_DESCRIBED:  # of weights that may be gone long ago
                self.described.clear()
            words = self.described[address] = recipes.describe_tiles(address, outputs, columns, self.tile)
        return recipes.describe_rows(x, rows, columns, self.tile), words


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, from a multiple of 16 bytes on, as all memory of torch is; a slice of rows may not be."""
    if tensor.data_ptr() & 15:
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.contiguous()


class _Layer:
    """All weights of one shape and scheme, with one dtype of rows and one of the bias, on one device."""

    def __init__(self, x: Tensor, weight: PackedWeight, has_bias: bool) -> None:
        self.gpu = gpu_of(x.device)
        self.order = ORDERS[weight.layout]
        # A layout made for another GPU runs as well, with that one's tiles.
        self.table = self.gpu if self.gpu.order == self.order else Gpu(self.order, self.gpu.processors)
        self.span = tiles.span(weight) or tiles.SPANS[-1]
        group = 0 if weight.group_size == weight.in_features else weight.group_size
        asymmetric = weight.zeros is not None
        self.bits = weight.bits
        self.scheme = {
            "order": self.order,
            "group": group,
            "scales": dense.DTYPES[weight.scales.dtype],
            "asymmetric": asymmetric,
        }
        self.has_bias = has_bias
        self.shape = (weight.out_features, weight.in_features)
        same = weight.scales.dtype == x.dtype  # as the kernel multiplies them
        self.explicit = same and not w4a16.interpreted() and recipes.explicit(self.gpu, self.shape[1])
        self.most_rows = self._most_rows() if x.dtype != torch.float32 else 0  # and more are dequantized for
        self.launches: dict[int, _Launch] = {}
        self.dense = dense.Dense(self.gpu, {"bits": self.bits, **self.scheme}, self.span, self.shape, x.dtype)

    def _most_rows(self) -> int:
        if _forced:
            return 0 if _forced[-1] is None else configs.BUCKETS[-1] + 1
        most = min(configs.dequantize_from(self.gpu), configs.USUAL_ROWS + 1)
        for size in configs.BUCKETS:
            if size >= most > configs.USUAL_ROWS and configs.listed(self.table, self._problem(size)):
                most = size + 1
        return most

    def _problem(self, rows: int) -> Problem:
        return Problem(self.bits, self.span, rows, *self.shape, self.explicit)

    def plan(self, rows: int) -> Plan:
        """How a number of rows is computed."""
        forced = _forced[-1] if _forced else None
        return forced or configs.plan(self.table, self._problem(rows))

    def launch(self, rows: int) -> _Launch:
        """The launcher of the bucket of `rows`."""
        found = self.launches.get(rows)
        if found is None:
            bucket = configs.bucket(rows)
            found = self.launches.get(bucket)
            if found is None:
                plan = self.plan(bucket)
                same = (each for each in self.launches.values() if each.plan == plan)
                found = next(same, None) or _Launch(plan, self)
            self.launches[bucket] = self.launches[rows] = found  # to find the bucket takes longer than to look it up
        return found


_layers: dict[tuple[Any, ...], _Layer] = {}
_forced: list[Plan | None] = []
generation = 0  # of the layers; another one once they were dropped


def layer_of(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> _Layer:
    """The layer of such rows, such a weight and such a bias."""
    key = (
        x.device, x.dtype, weight.scales.shape, weight.scales.dtype, weight.in_features, weight.bits, weight.group_size,
        weight.layout, weight.zeros is None, None if bias is None else bias.dtype,
    )  # fmt: skip
    found = _layers.get(key)
    if found is None:
        found = _layers[key] = _Layer(x, weight, bias is not None)
    return found


def forget() -> None:
    """Drop every plan, so that the tables are read again."""
    _drop_layers()
    configs.forget()


def _drop_layers() -> None:
    global generation
    generation += 1
    _layers.clear()


@contextmanager
def forced(plan: Plan | None) -> Iterator[None]:
    """Every product inside uses this plan, or, without one, the dequantized weight."""
    _forced.append(plan)
    _drop_layers()
    try:
        yield
    finally:
        _forced.pop()
        _drop_layers()


def matmul(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """``x [M, K] @ weight.T + bias``, ``[M, N]`` in ``x.dtype``; canonical weights take the simple kernel.

    A permutation is one gather of x before the kernel. Inside it, x would be read two bytes at a time and no longer be
    copied ahead of its use: compiled for 9.0 and 16 rows, 2.9 instructions a weight instead of 2.5, and spills.
    """
    stream = current_stream(x.get_device())
    if stream is None:
        with torch.cuda.device(x.device):
            return matmul(x, weight, bias)
    return _matmul(x, weight, bias, stream)


def current_stream(index: int) -> int | None:
    """The stream to launch on, 0 for the CPU (-1); None where another CUDA device is the current one."""
    if index < 0:
        return 0
    if torch.cuda.current_device() != index:
        return None
    return int(triton.runtime.driver.active.get_current_stream(index))


def _matmul(x: Tensor, weight: PackedWeight, bias: Tensor | None, stream: int) -> Tensor:
    if weight.perm is not None:
        x = x.index_select(1, weight.perm)
    if weight.layout == "canonical":
        return w4a16.matmul(x, weight, bias)
    layer = layer_of(x, weight, bias)
    rows = x.shape[0]
    y = torch.empty(rows, layer.shape[0], dtype=x.dtype, device=x.device)
    qweight = _aligned(weight.qweight)
    if rows < layer.most_rows:
        bias = None if bias is None else _aligned(bias)
        layer.launch(rows)((rows, *layer.shape), _aligned(x), qweight, bias, y, stream)
        return y
    bias = None if bias is None else bias.to(x.dtype)
    for start, part in layer.dense.chunks(qweight, rows, stream):
        stop = start + part.shape[0]
        if bias is None:
            torch.mm(x, part.T, out=y[:, start:stop])
        else:
            torch.addmm(bias[start:stop], x, part.T, out=y[:, start:stop])
    return y


def grad_input(grad: Tensor, weight: PackedWeight) -> Tensor:
    """``grad [M, N] @ weight``, ``[M, K]`` in ``grad.dtype``: a chunk of the weight is dequantized at a time."""
    stream = current_stream(grad.get_device())
    if stream is None:
        with torch.cuda.device(grad.device.index):
            return grad_input(grad, weight)
    layer = layer_of(grad, weight, None)
    total = torch.zeros(grad.shape[0], weight.in_features, dtype=torch.float32, device=grad.device)
    for start, part in layer.dense.chunks(_aligned(weight.qweight), grad.shape[0], stream):
        total += grad[:, start : start + part.shape[0]] @ part
    return total.to(grad.dtype)


def warmup(weight: PackedWeight, dtype: torch.dtype, has_bias: bool = False) -> None:
    """Compile what every number of rows needs, and make the workspaces, before a CUDA graph is captured."""
    device = weight.qweight.device
    bias = torch.zeros(weight.out_features, dtype=dtype, device=device) if has_bias else None
    for rows in _warmup_rows(weight, dtype):
        matmul(torch.zeros(rows, weight.in_features, dtype=dtype, device=device), weight, bias)


def _warmup_rows(weight: PackedWeight, dtype: torch.dtype) -> list[int]:
    """A number of rows for each way in which the weight is multiplied."""
    if weight.layout == "canonical":
        return [w4a16.SMALL_ROWS, w4a16.SMALL_ROWS + 1]
    most = layer_of(torch.empty(0, dtype=dtype, device=weight.qweight.device), weight, None).most_rows
    by_kernel = {min(size, most - 1) for size in configs.BUCKETS} if most else set()
    return sorted(by_kernel | {max(most, 1)})


def describe(weight: PackedWeight) -> str:
    """What `matmul` does with such a weight, for the log and the report."""
    if weight.layout == "canonical":
        return "fused dequantize-matmul kernel"
    return "fused kernel on fragment-order tiles, dequantize and cuBLAS for many rows"
