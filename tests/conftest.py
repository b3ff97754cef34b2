"""One setting for all tests: generated examples are the same in every run, so that a failure is one of the change."""

import gc
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # some tests ask torch for determinism, on a GPU too

if find_spec("hypothesis"):  # a machine lent for a GPU check has pytest and little else
    from hypothesis import settings

    settings.register_profile("fixed", derandomize=True)
    settings.load_profile("fixed")


def pytest_collection_finish() -> None:
    """What all test modules import stays to the end: no search for garbage looks at it again, which takes seconds."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is filled with NaN, so an element that nobody writes shows."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Every launch of a Triton kernel runs in the emulator (emulated_launches.py)."""
    from emulated_launches import emulated

    yield from emulated(monkeypatch, tmp_path)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """Writes a file of a name and content."""

    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write
