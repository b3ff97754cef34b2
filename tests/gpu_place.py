"""Where the stages of tiles_on_gpu.py run, and what several of them need. Import it first: it sets the environment."""

import os
from collections.abc import Callable

os.environ["PTQ_KERNELS_CONFIGS"] = os.devnull + ".json"  # no table of this machine's user
os.environ.setdefault("TRITON_INTERPRET", "0" if os.path.exists("/dev/nvidiactl") else "1")
# With it cuBLAS is deterministic; without it torch refuses its products where fresh memory is to hold NaN.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import tile_cases
import torch
from packed_weights import random_case
from ptq_kernels.layouts import PackedWeight
from ptq_kernels.triton import launch
from torch import Tensor

ON_GPU = os.environ["TRITON_INTERPRET"] == "0"
DEVICE = "cuda" if ON_GPU else "cpu"
if not ON_GPU:
    from quick_interpreter import quick

    to_the_end = quick()
    to_the_end.__enter__()


def on_device(layout: str, n: int, k: int, group: int, *, symmetric: bool) -> tuple[tile_cases.Case, PackedWeight]:
    """A random case, and its weight where the kernels are."""
    case = random_case(n, k, group, 4, symmetric, torch.bfloat16)
    return case, tile_cases.on_device(tile_cases.tiled(case, layout), DEVICE)


def moved(tensor: Tensor | None) -> Tensor | None:
    """To where the kernels are."""
    return tensor if tensor is None else tensor.to(DEVICE)


def native() -> str:
    """The layout of this GPU."""
    order = launch.gpu(0).order if ON_GPU else 90
    return next(name for name, value in launch.ORDERS.items() if value == order)


def captured(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call in a CUDA graph; without a GPU the call itself."""
    if not ON_GPU:
        return call
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        y = call()

    def replay() -> Tensor:
        recorded.replay()
        torch.cuda.synchronize()
        return y

    return replay
