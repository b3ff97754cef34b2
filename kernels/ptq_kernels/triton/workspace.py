"""Memory kept between launches: parts and counters of the split-K kernel, and rows gathered for act-order."""

from typing import NamedTuple

import torch
from torch import Tensor

PART_BYTES = 16 * 2**20
COUNTERS = 16384
GATHERED_BYTES = 16 * 2**20  # 512 rows of 16384 columns in bfloat16; more is allocated by the call


class Workspace(NamedTuple):
    """Of one stream: two launches that overlap must not share it."""

    parts: Tensor  # float32, PART_BYTES in all
    counters: Tensor  # int32 [COUNTERS], zero


_of_stream: dict[tuple[torch.device, int], Workspace] = {}
_spare: dict[torch.device, Workspace] = {}
_gathered: dict[tuple[torch.device, int], Tensor] = {}  # bytes


def _allocate(device: torch.device) -> Workspace:
    parts = torch.empty(PART_BYTES // 4, dtype=torch.float32, device=device)
    return Workspace(parts, torch.zeros(COUNTERS, dtype=torch.int32, device=device))


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def get(device: torch.device, stream: int) -> Workspace:
    """The workspace of a stream; RuntimeError if a new one is needed while a CUDA graph is captured.

    A graph is captured on a stream of its own, where zeroing the counters would become part of the graph, and where
    new memory belongs to the graph. So a spare workspace a device is made on the default stream, and the stream of a
    capture takes it. Graphs captured on one stream share its workspace and must not be replayed at the same time.
    """
    key = (device, stream)
    found = _of_stream.get(key)
    if found is None:
        found = _spare.pop(device, None)
        if found is None:
            if _capturing(device):
                raise RuntimeError(
                    f"a CUDA graph on stream {stream} of {device} needs a workspace of its own, none is spare; call "
                    "ptq_kernels.triton.launch.warmup, or matmul once outside the capture, before each new stream"
                )
            found = _allocate(device)
        _of_stream[key] = found
    if stream == 0 and device not in _spare and not _capturing(device):
        _spare[device] = _allocate(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the counters are zero before another stream takes them
    return found


def gathered(x: Tensor, stream: int) -> Tensor:
    """Room for a tensor like x ``[M, K]``: the same memory for every call on a stream, which runs them one by one.

    Inside a CUDA graph it is memory of the graph, which no later call can replace.
    """
    size = x.numel() * x.element_size()
    if size > GATHERED_BYTES or _capturing(x.device):
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    found = _gathered.get((x.device, stream))
    if found is None or found.numel() < size:
        found = torch.empty(size, dtype=torch.uint8, device=x.device)
        _gathered[x.device, stream] = found
    return found[:size].view(x.dtype).view(x.shape)
