"""C++ libraries of ptq_kernels.cpu no older than their sources: those beside them, or new ones of this test run."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from ptq_kernels import build
from ptq_kernels.cpu import library


def current_libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The body of a fixture: where they are, while `library` finds them there."""
    if reason := build.refuse():
        pytest.skip(reason)
    directory = build.SOURCE.parent
    newest = max(path.stat().st_mtime for path in (*directory.glob("*.h"), *directory.glob("*.cpp")))
    built = [directory / build.file_name(name) for name in build.of_this_machine()]
    with pytest.MonkeyPatch.context() as patch:
        if not all(path.exists() and path.stat().st_mtime >= newest for path in built):
            directory = _compiled(tmp_path_factory.getbasetemp() / "libraries")
            patch.setattr(library, "_DIRECTORY", directory)
        library.forget()
        yield directory
    library.forget()


def the_only_one(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let that library be the one that is used, whose name it returns; skip where this machine cannot."""
    if reason := library.refuse(name):
        pytest.skip(reason)
    found = library.get(name)
    monkeypatch.setattr(library, "best", lambda: found)
    return name


@cache
def _compiled(directory: Path) -> Path:
    directory.mkdir()
    if all(build.compile_all(directory).values()):
        pytest.skip("no C++ compiler here")
    return directory
