"""What a person watches while a run goes on: a live display on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from ptq.report import anonymous_bytes, resident_bytes, start_counting_peak


class Progress:
    """Reports stages, modules and finished blocks to a stream, and keeps what each stage took: seconds, and
    the peak of resident memory in bytes.

    On a terminal a bar shows block, module, loss, time and memory; elsewhere every finished block and stage is a line.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream if stream is not None else sys.stderr, highlight=False, soft_wrap=True)
        self._bar: Bar | None = None
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[None]:
        """Time a stage of ``total`` steps; the time is added up over stages of the same name. Stages do not nest."""
        started = time.perf_counter()
        start_counting_peak()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TimeRemainingColumn(), TextColumn("{task.fields[note]}"))  # fmt: skip
        try:
            if self._console.is_terminal:
                with Bar(*columns, console=self._console, transient=True) as self._bar:
                    self._bar.add_task(name, total=total, note="")
                    yield
            else:
                yield
        finally:
            self._bar = None
            seconds = time.perf_counter() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            self.peaks[name] = max(self.peaks.get(name, 0), resident_bytes(peak=True))
        self._console.print(f"{name}: {seconds:.1f} s, {_memory()}", markup=False)

    def module(self, path: str) -> None:
        """The module being worked on."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], note=f"{path}, {_memory()}")

    def step(self, index: int, total: int, losses: Sequence[float] = (), seconds: float = 0.0) -> None:
        """One finished block: its mean loss relative to round-to-nearest, seconds, memory."""
        loss = f"loss {sum(losses) / len(losses):.3f} of rounding, " if losses else ""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=1, note=f"{loss}{_memory()}")
        elif losses:
            self._console.print(f"block {index + 1}/{total}: {loss}{seconds:.1f} s, {_memory()}", markup=False)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False)


def _memory() -> str:
    """Of the process by itself, at this moment; libraries and mapped files do not count."""
    return f"{anonymous_bytes() / 1e9:.2f} GB now"
