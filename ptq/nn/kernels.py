"""Which kernels multiply with packed weights, for reports."""

from collections.abc import Iterable
from contextlib import AbstractContextManager

import ptq_kernels
import torch

from ptq.formats.codec import Scheme


def kernels_recorded() -> AbstractContextManager[dict[str, str]]:
    """What ran meanwhile, for a report: implementation, device, bits and layout, and why. It is there at the end."""
    return ptq_kernels.recorded()


def kernels_to_come(weights: Iterable[tuple[Scheme, tuple[int, int]]], device: torch.device) -> dict[str, str]:
    """What `prepare_` would choose on ``device`` for weights of these schemes and shapes ``(N, K)``."""
    found = (
        ptq_kernels.foreseen(
            n, k, bits=scheme.bits, group_size=scheme.columns(k), symmetric=scheme.symmetric, device=device
        )
        for scheme, (n, k) in dict.fromkeys(weights)
    )
    return dict(sorted(found))
