"""Memory kept between launches: parts and counters of the split-K kernel."""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

PART_BYTES = 16 * 2**20
COUNTERS = 16384


class Workspace(NamedTuple):
    """Of one stream: two launches that overlap must not share it."""

    parts: Tensor  # float32, PART_BYTES in all
    counters: Tensor  # int32 [COUNTERS], zero


_of_stream: dict[tuple[torch.device, int], Workspace] = {}
_spare: dict[torch.device, Workspace] = {}


def _allocate(device: torch.device) -> Workspace:
    """On a thread of its own: torch.compile claims what its warm-ups allocate on theirs for its CUDA graphs."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_make, device).result()


def _make(device: torch.device) -> Workspace:
    parts = torch.empty(PART_BYTES // 4, dtype=torch.float32, device=device)
    made = Workspace(parts, torch.zeros(COUNTERS, dtype=torch.int32, device=device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the counters are zero before another stream takes them
    return made


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def get(device: torch.device, stream: int) -> Workspace:
    """The workspace of a stream; RuntimeError if a new one is needed while a CUDA graph is captured.

    A graph is captured on a stream of its own, where zeroing the counters would become part of the graph, and where
    new memory belongs to the graph. So every product outside of a capture leaves a spare workspace behind, and the
    stream of a capture takes it. Graphs captured on one stream share its workspace and must not be replayed at the same
    time: sums would be wrong, and counters left above zero, so that later ones were wrong as well.
    """
    key = (device, stream)
    found = _of_stream.get(key)
    if found is None:
        found = _spare.pop(device, None)
        if found is None:
            if capturing(device):
                raise RuntimeError(
                    f"a CUDA graph on stream {stream} of {device} needs a workspace of its own, none is spare; call "
                    "ptq_kernels.warmup, or matmul once outside the capture, before each new stream"
                )
            found = _allocate(device)
        _of_stream[key] = found
    if device not in _spare and not capturing(device):
        _spare[device] = _allocate(device)
    return found
