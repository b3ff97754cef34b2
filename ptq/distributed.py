"""Several processes that share one run, as torchrun starts them; torch.distributed carries what they exchange.

Calibration sequences are split, statistics added up, and the rows of every weight solved by whoever they fall to; then
each process has the codes of all rows, and the values it goes on with are the same everywhere. Only the first process
writes the checkpoint. A run of one process does none of this: every method of `ALONE` is the identity.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import groupby
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor
from torch import distributed as dist

from ptq.errors import ConfigError, RankError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

# A process that ends closes its connections, and torchrun ends the others: waiting is only ever for one that works,
# and what the first one does alone (the measurements of a budget) takes long.
PATIENCE = timedelta(hours=24)
GOES_ON = "the same command goes on from the last finished block"


class Ranks:
    """The processes of a run, counted from 0, as one of them sees them."""

    def __init__(self, rank: int = 0, size: int = 1, local: int = 0, store: "Store | None" = None) -> None:
        """``local`` counts the processes of one machine; ``store`` is where they can leave each other word."""
        self.rank, self.size = rank, size
        self._local, self._store = local, store

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def device(self, wanted: torch.device) -> torch.device:
        """Of this process: each has a GPU of its own.

        Raises:
            ConfigError: one GPU was named for all, or there are fewer than processes.
        """
        if self.size == 1 or wanted.type != "cuda":
            return wanted
        if wanted.index is not None:
            raise ConfigError(f"several processes need a GPU each; device is {wanted}: use device: cuda or auto")
        count = torch.cuda.device_count()
        if self._local >= count:
            raise ConfigError(
                f"several processes need a GPU each; this machine has {count} and at least {self._local + 1} "
                f"processes: start {count}, or use device: cpu"
            )
        torch.cuda.set_device(self._local)
        return torch.device("cuda", self._local)

    def share(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """This process's sequences of token batches ``int64 [B, T]``, every ``size``-th, in batches as large.

        Raises:
            ConfigError: there are fewer sequences than processes.
        """
        if self.size == 1 or not batches:
            return list(batches)
        sequences = [sequence for batch in batches for sequence in batch]
        if len(sequences) < self.size:
            raise ConfigError(
                f"every process needs a calibration sequence; found {len(sequences)} for {self.size} processes: start "
                "fewer, or raise calibration.samples"
            )
        rows = max(len(batch) for batch in batches)
        mine = []
        for _, group in groupby(sequences[self.rank :: self.size], key=len):
            same = torch.stack(list(group))
            mine += list(same.split(rows))
        return mine

    def rows(self, count: int) -> slice:
        """This process's part of ``count`` rows; empty where there are more processes."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def stack(self, part: Tensor, count: int) -> Tensor:
        """All ``count`` rows of a tensor ``[count, ...]`` of which each process has its part."""
        if self.size == 1:
            return part
        most = -(-count // self.size)  # parts differ by a row at most
        padded = part.new_zeros(most, *part.shape[1:])
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        with self._reaching():
            dist.all_gather(parts, padded)
        bounds = [rank * count // self.size for rank in range(self.size + 1)]
        return torch.cat([each[: end - start] for each, start, end in zip(parts, bounds, bounds[1:], strict=False)])

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all processes, in place."""
        if self.size > 1:
            with self._reaching():
                dist.all_reduce(tensor)

    def total(self, *numbers: float) -> list[float]:
        """Sums of numbers over all processes."""
        sums = torch.tensor(numbers, dtype=torch.float64)
        self.add_up(sums)
        return sums.tolist()

    def take_over(self, tensor: Tensor) -> None:
        """Replace a tensor by the first process's, in place."""
        if self.size > 1:
            with self._reaching():
                dist.broadcast(tensor, 0)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, which every one gets; anything that can be pickled."""
        if self.size == 1:
            return [value]
        found: list[T | None] = [None] * self.size
        with self._reaching():
            dist.all_gather_object(found, value)
        return [cast(T, each) for each in found]

    def told(self, value: T) -> T:
        """The first process's value, which every one gets; anything that can be pickled."""
        if self.size == 1:
            return value
        box = [value]
        with self._reaching():
            dist.broadcast_object_list(box, 0)
        return box[0]

    def meet(self) -> None:
        """Wait until all processes have come here."""
        self.gather(None)

    def speaks(self) -> bool:
        """Whether this process is to say why the run ends: the first to ask is."""
        if self._store is None:
            return True
        with suppress(RuntimeError):
            return int(self._store.add("said", 1)) == 1
        return True  # the store went with the process that kept it

    def said(self, message: str) -> str:
        """A message with its speaker."""
        return message if self.size == 1 else f"rank {self.rank}: {message}"

    def leave(self) -> None:
        """End this process, one of several, after a run that went well; in a run of one, nothing.

        At once, without Python's own end: a thread of torch that comes back into Python meanwhile is ended within C++,
        which aborts the process ("terminate called without an active exception"), and torchrun then ends the others.
        """
        if self.size > 1:
            dist.destroy_process_group()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if type(error).__name__ == "OutOfMemoryError":
                raise
            raise RankError(
                f"all {self.size} processes of a run must stay to its end; another one has ended: {GOES_ON}"
            ) from error


ALONE = Ranks()


def joined() -> Ranks:
    """The processes that torchrun started with this one; `ALONE` where it started no other.

    Once they have joined, SIGTERM, by which torchrun ends those that are left, is answered by a sentence; before that,
    and SIGHUP at any time, ends the process at once.

    Raises:
        RankError: they could not be reached.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    # A handler in Python waits until C++ comes back, which here has a day's patience.
    for each in (signal.SIGTERM, signal.SIGHUP):
        if callable(signal.getsignal(each)):
            signal.signal(each, signal.SIG_DFL)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        work, words = PrefixStore("work", store), PrefixStore("words", store.clone())
        dist.init_process_group(backend, store=work, rank=rank, world_size=size, timeout=PATIENCE)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise RankError(
            f"all {size} processes of a run must join; one could not be reached ({reason}): it has "
            f"ended, or MASTER_ADDR and MASTER_PORT are not those of the first; {GOES_ON}"
        ) from error
    ranks = Ranks(rank, size, int(os.environ.get("LOCAL_RANK", "0")), words)
    _answer_termination(ranks)
    return ranks


def _answer_termination(ranks: Ranks) -> None:
    """A handler alone would not do: it has to wait until the main thread is back from what it is waiting for."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(write)

    def watch() -> None:
        while os.read(read, 1) != bytes([signal.SIGTERM]):
            pass
        if ranks.speaks():
            reason = f"ended by SIGTERM, which torchrun sends when another process has ended: {GOES_ON}"
            print(f"ptq: {ranks.said(reason)}", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
