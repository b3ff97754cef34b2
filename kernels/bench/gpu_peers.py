"""Other 4-bit products, from one random weight: each peer is a function that returns the product, ready to be called.

torch's own is always there. The others are imported from the folder that ``scripts/gpu_peers`` makes (``--peers``), or
not at all. Their kernels run as they are, with the settings that their own code chooses.
"""

import ast
import ctypes
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROWS = [1, 4, 16, 64, 128, 256, 512, 2048]


class Weight(NamedTuple):
    """A symmetric 4-bit weight in groups of 128."""

    codes: Tensor  # uint8 [N, K]
    scales: Tensor  # bfloat16 [N, K / 128]

    def dense(self) -> Tensor:
        """bfloat16 ``[N, K]``."""
        n, k = self.codes.shape
        grouped = (self.codes.view(n, -1, 128).float() - 8) * self.scales.float().unsqueeze(-1)
        return grouped.view(n, k).to(torch.bfloat16)

    def words(self) -> Tensor:
        """int32 ``[N, K / 8]``: eight codes a word, the first in the lowest bits."""
        n, k = self.codes.shape
        shifts = torch.arange(0, 32, 4, device=self.codes.device, dtype=torch.int32)
        return (self.codes.view(n, k // 8, 8).int() << shifts).sum(-1, dtype=torch.int32)


Product = Callable[[Tensor], Tensor]


def tinygemm(weight: Weight) -> Product:
    """torch's ``_weight_int4pack_mm``; on a CPU a stand-in, so that the bench can be tried there."""
    if weight.codes.device.type != "cuda":
        dense = weight.dense()
        return lambda x: x @ dense.T
    packed = torch.ops.aten._convert_weight_to_int4pack(weight.codes[:, ::2] << 4 | weight.codes[:, 1::2], 8)
    scales = weight.scales.T.contiguous()
    both = torch.stack([scales, torch.zeros_like(scales)], dim=-1).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, 128, both)


def humming(weight: Weight) -> Product:
    """humming-kernels, with the tiles that its heuristics choose for the numbers of rows of the bench.

    Without ``tuning_config`` the first call of a layer compiles some ninety kernels, one for each range of rows.
    """
    from humming.layer import HummingLayer
    from humming.tune import get_heuristics_config
    from humming.utils import nvrtc

    # Its compiler is a program, which may have lost its mode in a copy, and which looks for NVRTC's second library
    # where the dynamic linker does.
    Path(nvrtc.may_build_nvrtc_compile_binary()).chmod(0o755)
    libraries = str(Path(nvrtc.get_nvrtc_library_path()).parent)
    others = [path for path in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if path not in ("", libraries)]
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join([libraries, *others])

    n, k = weight.codes.shape
    config = {"dtype": "uint4", "weight_scale_group_size": 128}
    layer = HummingLayer(shape_n=n, shape_k=k, weight_config=config, torch_dtype=torch.bfloat16).cuda()
    layer.load_from_tensors({"weight": weight.words(), "weight_scale": weight.scales})
    layer.transform()
    steps = zip([0, *ROWS], [*ROWS[:-1], 2**30], ROWS, strict=False)
    tuning = json.dumps([[low, high, get_heuristics_config(layer.humming_config, m)] for low, high, m in steps])
    return lambda x: layer(x, tuning_config=tuning)


def conch(weight: Weight) -> Product:
    """Conch's mixed_precision_gemm: int32 ``[K / 8, N]``; its tiles are the same for any shape."""
    from conch.ops.quantization.gemm import mixed_precision_gemm

    words, scales = weight.words().T.contiguous(), weight.scales.T.contiguous()
    return lambda x: mixed_precision_gemm(x, words, scales, None, 4, 8, 128)


def gemlite(weight: Weight) -> Product:
    """gemlite with the table that it ships for the H100; what the table has no entry for it tunes at the first call.

    In float16, for which the table was made: up to 4 rows it adds up parts in memory, as many as K / 16, and in
    bfloat16 the sums of that many are off by 2 to 4 %.
    """
    import gemlite as package
    from gemlite.core import GEMLITE_TRITON_CONFIG_CACHE
    from gemlite.helper import A16W4_HQQ_INT

    table = Path(package.__file__).parent / "configs" / "h100.json"
    if not package.load_config(str(table)):
        raise FileNotFoundError(f"gemlite's table must be {table}, it does not load")
    n, k = weight.codes.shape
    for entries in GEMLITE_TRITON_CONFIG_CACHE.values():
        borrow(entries, n, k)
    scales = weight.scales.half()
    maker = A16W4_HQQ_INT(device=weight.codes.device, dtype=torch.float16)
    return maker.from_weights(weight.codes, scales, torch.full_like(scales, 8))


def borrow(entries: dict[str, Any], n: int, k: int) -> None:
    """Give a shape that gemlite's table of one kernel lacks, as it does the head's, the entries of the nearest."""
    keys = [ast.literal_eval(text) for text in entries]  # rows, N, K, group, values a word, types
    keys = [key for key in keys if key[3:] == (128, 8, 104)]
    if not keys or any(key[1:3] == (n, k) for key in keys):
        return
    near = min((key[1:3] for key in keys), key=lambda shape: (abs(shape[1] - k), abs(shape[0] - n)))
    for key in keys:
        if key[1:3] == near:
            entries[str((key[0], n, k, *key[3:]))] = entries[str(key)]


def marlin(weight: Weight) -> Product:
    """IST-DASLab's Marlin, float16 only."""
    found = next((path for path in map(Path, sys.path) if (path / "marlin" / "libmarlin.so").exists()), None)
    if found is None:
        raise ImportError("the folder marlin must hold libmarlin.so, which scripts/gpu_peers --marlin compiles")
    sys.modules.setdefault("marlin_cuda", marlin_cuda(found / "marlin" / "libmarlin.so"))
    from marlin import Layer

    n, k = weight.codes.shape
    linear = torch.nn.Linear(k, n, bias=False, dtype=torch.float16, device=weight.codes.device)
    linear.weight.data.copy_(weight.dense())
    layer = Layer(k, n, groupsize=128).to(weight.codes.device)
    layer.pack(linear, weight.scales.half())
    return layer


def marlin_cuda(path: Path) -> ModuleType:
    """What Marlin's extension is to its Python: the same call, without an extension for each version of torch."""
    call = ctypes.CDLL(str(path))["_Z11marlin_cudaPKvS0_PvS1_iiiS1_iiP11CUstream_stiiii"]
    pointer, number = ctypes.c_void_p, ctypes.c_int
    call.argtypes = [*[pointer] * 4, *[number] * 3, pointer, number, number, pointer, *[number] * 4]

    def mul(a: Tensor, b: Tensor, c: Tensor, scales: Tensor, workspace: Tensor, *settings: int) -> None:
        (m, k), n = a.shape, c.shape[1]
        group = -1 if len(scales) == 1 else k // len(scales)
        places = [tensor.data_ptr() for tensor in (a, b, c, scales)]
        stream = torch.cuda.current_stream(a.device).cuda_stream
        failed = call(*places, m, n, k, workspace.data_ptr(), group, a.device.index, stream, *settings)
        if failed:
            raise ValueError(f"Marlin must have a kernel for {m} rows of {n} x {k}, its code is {failed}")

    module = ModuleType("marlin_cuda")
    module.__dict__["mul"] = mul
    return module


PEERS = {"tinygemm": tinygemm, "humming": humming, "conch": conch, "gemlite": gemlite, "marlin": marlin}
HALVES = ("marlin", "gemlite")  # take float16 rows
# What a package may raise, of compilers and launches too: it is recorded, and the rest is tried.
FAILURES = (Exception,)


def present(folder: Path | None) -> list[str]:
    """The peers that can be had: torch's own, and those with a package in the folder, which goes on the path."""
    if folder is None:
        return ["tinygemm"]
    sys.path.append(str(folder))
    return [name for name in PEERS if name == "tinygemm" or (folder / name).is_dir()]
