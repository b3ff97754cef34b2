"""Other 4-bit products, from one random weight: each peer is a function that returns the product, ready to be called.

torch's own is always there. The others are imported from the folder of their packages (``--peers``), or not at all.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class Weight(NamedTuple):
    """A symmetric 4-bit weight in groups of 128."""

    codes: Tensor  # uint8 [N, K]
    scales: Tensor  # bfloat16 [N, K / 128]

    def dense(self) -> Tensor:
        """bfloat16 ``[N, K]``."""
        n, k = self.codes.shape
        grouped = (self.codes.view(n, -1, 128).float() - 8) * self.scales.float().unsqueeze(-1)
        return grouped.view(n, k).to(torch.bfloat16)


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
    """humming-kernels; it quantizes the dense weight itself, to the same format."""
    from humming.layer import HummingLayer

    n, k = weight.codes.shape
    config = {"dtype": "int4", "weight_scale_group_size": 128}
    layer = HummingLayer(shape_n=n, shape_k=k, weight_config=config, torch_dtype=torch.bfloat16).cuda()
    layer.load_from_unquantized(weight.dense())
    layer.transform()
    return layer


def conch(weight: Weight) -> Product:
    """Conch's mixed_precision_gemm: int32 ``[K / 8, N]``."""
    from conch.ops.quantization.gemm import mixed_precision_gemm

    n, k = weight.codes.shape
    shifts = torch.arange(0, 32, 4, device=weight.codes.device, dtype=torch.int32)
    packed = (weight.codes.view(n, k // 8, 8).int() << shifts).sum(-1, dtype=torch.int32).T.contiguous()
    scales = weight.scales.T.contiguous()
    return lambda x: mixed_precision_gemm(x, packed, scales, None, 4, 8, 128)


def gemlite(weight: Weight) -> Product:
    """gemlite with its table for the H100."""
    import gemlite as package
    from gemlite.helper import A16W4_HQQ_INT

    table = Path(package.__file__).parent / "configs" / "h100.json"
    if table.exists():
        package.load_config(str(table))
    zeros = torch.full_like(weight.scales, 8)
    maker = A16W4_HQQ_INT(device=weight.codes.device, dtype=torch.bfloat16)
    return maker.from_weights(weight.codes, weight.scales, zeros)


def marlin(weight: Weight) -> Product:
    """IST-DASLab's Marlin, float16 only; its extension is compiled from its sources, by nvcc and ninja."""
    from torch.utils.cpp_extension import load

    found = next((Path(p) / "marlin" for p in sys.path if (Path(p) / "marlin" / "marlin_cuda.cpp").exists()), None)
    if found is None:
        raise ImportError("the folder marlin must hold marlin_cuda.cpp and marlin_cuda_kernel.cu, it does not")
    sources = [str(found / name) for name in ("marlin_cuda.cpp", "marlin_cuda_kernel.cu")]
    sys.modules.setdefault("marlin_cuda", load("marlin_cuda", sources))
    from marlin import Layer

    n, k = weight.codes.shape
    linear = torch.nn.Linear(k, n, bias=False, dtype=torch.float16, device=weight.codes.device)
    linear.weight.data.copy_(weight.dense())
    layer = Layer(k, n, groupsize=128).to(weight.codes.device)
    layer.pack(linear, weight.scales.half())
    return layer


PEERS = {"tinygemm": tinygemm, "humming": humming, "conch": conch, "gemlite": gemlite, "marlin": marlin}
HALVES = ("marlin",)  # take float16 rows
# What a package may raise, of compilers and launches too: it is recorded, and the rest is tried.
FAILURES = (Exception,)


def present(folder: Path | None) -> list[str]:
    """The peers that can be had: torch's own, and those with a package in the folder, which goes on the path."""
    if folder is None:
        return ["tinygemm"]
    sys.path.append(str(folder))
    return [name for name in PEERS if name == "tinygemm" or (folder / name).is_dir()]
