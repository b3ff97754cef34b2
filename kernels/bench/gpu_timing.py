"""Times calls on a GPU by CUDA graphs; without one, by the clock, so that everything can be tried anywhere."""

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import NamedTuple

import torch
from torch import Tensor

LEAST_BYTES = 128 * 2**20  # of rotated weights: over twice the largest L2
LEAST_MICROSECONDS = 200  # of a graph: a microsecond between two replays counts little, for every kernel alike
MOST_CALLS = 400  # in a graph


class Times(NamedTuple):
    """Microseconds of one call."""

    median: float
    low: float  # a tenth of the replays is faster
    high: float  # a tenth is slower
    eager: float  # the time of one call from Python, without a graph
    replays: int = 1


def copies(size: int) -> int:
    """How many weights of `size` bytes to rotate, so that no cache holds the next one."""
    return max(LEAST_BYTES // max(size, 1) + 1, 2) if torch.cuda.is_available() else 1


def timed(calls: Sequence[Callable[[], Tensor]], seconds: float) -> Times:
    """Rotate through the calls for about `seconds`."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        calls[0]()
        return Times(*[1e6 * (time.perf_counter() - start)] * 4)
    from ptq_kernels.triton.tune import LEAST_CALLS, graph_times

    rough = statistics.median(graph_times(calls, 3))
    count = max(LEAST_CALLS, len(calls), min(int(LEAST_MICROSECONDS / rough) + 1, MOST_CALLS))
    rotated = list(islice(cycle(calls), count))
    times = sorted(graph_times(rotated, min(max(int(1e6 * seconds / (rough * count)), 5), 100)))
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in rotated:
        call()
    issued = time.perf_counter() - start
    torch.cuda.synchronize()
    tenth = len(times) // 10
    return Times(statistics.median(times), times[tenth], times[-1 - tenth], 1e6 * issued / len(rotated), len(times))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a large buffer: the better of a copy and of a kernel that changes each word.

    Copies in a graph reached 2.7 TB/s on an H200; a graph may leave them to an engine that is slower than the kernel.
    """
    size = 2**32 if device.type == "cuda" else 2**22
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(0, 255).view(torch.int32)
    target = torch.empty_like(source)
    calls = (lambda: target.copy_(source), lambda: torch.bitwise_not(source, out=target))
    return 2 * size / min(timed([call], 0.3).median for call in calls) * 1e6
