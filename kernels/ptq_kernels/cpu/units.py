"""Which 16-bit floats torch multiplies by units of the processor made for them."""

from functools import cache

import torch


@cache
def has_units(dtype: torch.dtype) -> bool:
    """Whether matrix products of a dtype are at least as fast as of float32.

    Without, as on processors that have AVX2 alone, torch takes several times as long for bfloat16 and float16 as for
    float32. A torch without oneDNN has no such units either.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return dtype == torch.float32
    if not torch.backends.mkldnn.is_available():
        return False
    ops = torch.ops.mkldnn
    return bool(ops._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else ops._is_mkldnn_fp16_supported())
