"""Runs that die, each in a process of its own: forked, so that one costs a fraction of a second.

``python crashes.py points DIRECTORY FIRST STEP`` kills a run just before its FIRST call that makes something durable
(fsync, rename, unlink, mkdir), then before every STEP-th after it; ``random DIRECTORY COUNT SEED`` sends SIGKILL at
random moments; ``full DIRECTORY FIRST STEP`` lets an fsync fail because the disk is full; ``small DIRECTORY FIRST
STEP`` runs in a file system of FIRST KiB, then of STEP more until one is large enough (root may mount one). Each time
the same run is made again, with room, and its files are compared with those of a run that was left alone. Several of
these may follow one another. Prints a JSON list of lists of outcomes.
"""

import hashlib
import io
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny_models
import torch
from tiny_models import build, save, settings

from ptq.config import DatasetConfig, GPTQConfig, RunConfig
from ptq.pipeline import quantize
from ptq.progress import Progress

FAST = GPTQConfig(scales="range", sweeps=0)
ROOMY = 1 << 16  # KiB
DURABLE = ("fsync", "rename", "replace", "unlink", "mkdir")


def small_parent(directory: Path, **changes: Any) -> Path:
    """Three narrow blocks."""
    sizes = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2,
             "num_key_value_heads": 2}  # fmt: skip
    return save(build("llama", torch.bfloat16, **{**sizes, **changes}), directory)


def small_run(parent: Path, output: Path, method: str = "gptq", **changes: Any) -> RunConfig:
    """A run of a fraction of a second that follows both streams of hidden states and fills several shards."""
    usual = {"exclude": ("lm_head", "q_proj", "k_proj", "v_proj", "gate_proj"), "max_shard_size": "12KB",
             "gptq": FAST}  # fmt: skip
    config = settings(parent, output, method, **{**usual, **changes})
    text = parent / "text" / "calibration.txt"  # tokenizing all of the usual one takes seconds
    if not text.exists():
        text.parent.mkdir()
        text.write_text(tiny_models.TEXT.read_text(encoding="utf-8")[:2000], encoding="utf-8")
    data = DatasetConfig(files=(str(text),))
    size = {"dataset": data, "samples": 4, "sequence_length": 16, "batch_size": 2}
    return replace(config, calibration=replace(config.calibration, **size))


class Stopping(Progress):
    """Interrupts a run once so many blocks are committed."""

    def __init__(self, after: int) -> None:
        super().__init__(io.StringIO())
        self._after = after

    def step(self, index: int, total: int, losses: Sequence[float] = (), seconds: float = 0.0) -> None:
        if index + 1 == self._after:
            raise KeyboardInterrupt


def stop(config: RunConfig, after: int) -> Path:
    """Interrupt a run after so many blocks; the directory that it leaves."""
    try:
        quantize(config, progress=Stopping(after))
    except KeyboardInterrupt:
        return unfinished(config)
    raise AssertionError(f"the run ended before block {after}")


def unfinished(config: RunConfig) -> Path:
    """The directory of a run."""
    output = Path(config.output)
    return output.with_name(f".{output.name}.run")


def checksums(directory: Path) -> dict[str, str]:
    """Of every file of a checkpoint but the reports, which hold times."""
    files = [path for path in directory.iterdir() if path.stem != "report"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def forked(action: Callable[[], Any], kill_after: float | None = None) -> int:
    """Exit status of a child that does ``action``, 9 where it was killed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException as error:  # noqa: BLE001  (a child must not go on as a second pytest)
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(call: int) -> None:
    """Die before the given call that makes something durable; what an fsync had not yet forced is half lost."""
    count = 0
    forced: set[int] = set()  # files that have been on the disk once

    def patched(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == call:
                if name == "fsync" and _new(args[0], forced):
                    os.truncate(f"/proc/self/fd/{args[0]}", os.fstat(args[0]).st_size // 2)
                os._exit(9)
            if name == "fsync":
                forced.add(os.fstat(args[0]).st_ino)
            return real(*args, **kwargs)

        return wrapper

    for name in DURABLE:
        setattr(os, name, patched(name))


def _new(descriptor: int, forced: set[int]) -> bool:
    found = os.fstat(descriptor)
    return stat.S_ISREG(found.st_mode) and found.st_ino not in forced


def fail_at(call: int) -> None:
    """The given fsync finds the disk full."""
    count, real = 0, os.fsync

    def wrapper(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == call:
            raise OSError(28, "No space left on device")
        real(descriptor)

    os.fsync = wrapper


@contextmanager
def small_disk(directory: Path, kibibytes: int) -> Iterator[None]:
    """A file system of that size at a directory."""
    directory.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "none", directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


def outcome(config: RunConfig, expected: dict[str, str]) -> str:
    """Of making the same run again."""
    status = forked(lambda: tiny_models.run(config))
    output = Path(config.output)
    left = [path.name for path in output.parent.iterdir() if output.name in path.name]
    if status != 0:
        return f"exit {status}"
    return "identical" if checksums(output) == expected and left == [output.name] else f"differs, {left}"


def again(config: RunConfig, expected: dict[str, str], broken: Callable[[], int]) -> dict[str, Any]:
    """One broken run and the one after it."""
    output = Path(config.output)
    for name in (output, output.with_name(f".{output.name}.run")):
        shutil.rmtree(name, ignore_errors=True)
    status = broken()
    found = json.loads((output.with_name(f".{output.name}.run") / "run.json").read_text()) if _begun(output) else None
    finished = output.exists()
    if finished and not _begun(output):  # it was whole before it died: the same command says so
        return {"status": status, "begun": False, "outcome": "identical" if checksums(output) == expected else "bad"}
    return {"status": status, "begun": found is not None, "outcome": outcome(config, expected)}


def _begun(output: Path) -> bool:
    return (output.with_name(f".{output.name}.run") / "run.json").exists()


def on_small_disks(config: RunConfig, size: int, step: int) -> list[dict[str, Any]]:
    """Runs on larger and larger file systems, each made again with room."""
    disk, results = Path(config.output).parent, []
    with small_disk(disk, ROOMY):
        tiny_models.run(config)
        expected = checksums(Path(config.output))
    while not results or results[-1]["status"] != 0:
        with small_disk(disk, size):

            def filled() -> int:
                status = forked(lambda: tiny_models.run(config))
                subprocess.run(["mount", "-o", f"remount,size={ROOMY}k", disk], check=True)
                return status

            results.append({"kibibytes": size, **again(config, expected, filled)})
        size += step
    return results


def outcomes(mode: str, directory: Path, first: int, step: int) -> list[dict[str, Any]]:
    """All outcomes of one mode."""
    parent = small_parent(directory / "parent")
    if mode == "small":
        return on_small_disks(small_run(parent, directory / "disk" / "out"), first, step)
    config = small_run(parent, directory / "out")
    started = time.monotonic()
    tiny_models.run(config)
    lasts = time.monotonic() - started
    expected = checksums(directory / "out")
    results = []
    if mode == "random":
        generator = random.Random(step)
        for _ in range(first):
            delay = generator.uniform(0, lasts)
            results.append(again(config, expected, lambda d=delay: forked(lambda: tiny_models.run(config), d)))
        return results
    inject = die_at if mode == "points" else fail_at
    call = first
    while True:

        def broken(call: int = call) -> int:
            def action() -> None:
                inject(call)
                tiny_models.run(config)

            return forked(action)

        results.append({"call": call, **again(config, expected, broken)})
        if results[-1]["status"] == 0:  # there was no such call any more
            return results
        call += step


if __name__ == "__main__":
    torch.set_num_threads(1)
    wanted = [sys.argv[start : start + 4] for start in range(1, len(sys.argv), 4)]
    print(json.dumps([outcomes(mode, Path(place), int(first), int(step)) for mode, place, first, step in wanted]))
