"""Deaths of the whole process at any moment, and a full disk. Oracle: the bytes of the same run left alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import crashes
import pytest


def crash(directory: Path, **modes: tuple[int, int]):
    """Outcomes of each mode of `crashes`, in one process that has not used threads."""
    root = Path(crashes.__file__).resolve().parent
    paths = os.pathsep.join([str(root.parent), str(root.parent / "kernels"), str(root)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, crashes.__file__]
    for mode, (first, step) in modes.items():
        place = directory / mode
        place.mkdir()
        command += [mode, str(place), str(first), str(step)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = dict(zip(modes, json.loads(done.stdout), strict=True))
    for results in found.values():
        assert {result["outcome"] for result in results} == {"identical"}, f"{results}\n{done.stderr}"
    return found


def may_mount(directory: Path) -> bool:
    """Small file systems, which root may."""
    probe = directory / "probe"
    probe.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(probe)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return False
    subprocess.run(["umount", probe], check=True)
    return True


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Of each mode a few, in one process; the slow tests take all of them."""
    place = tmp_path_factory.mktemp("crashes")
    modes = {"random": (3, 0), "points": (17, 29), "full": (9, 19)}
    return crash(place, **modes, **({"small": (20, 60)} if may_mount(place) else {}))


def test_sigkill_at_random_moments(few):
    assert len(few["random"]) == 3


def test_death_before_something_is_durable(few):
    """Every 29th of the calls that make something durable."""
    results = few["points"]
    assert results[-1]["status"] == 0
    assert len(results) > 3
    assert sum(result["begun"] for result in results) > 1


def test_a_full_disk(few):
    results = few["full"]
    assert [result["status"] for result in results][-1] == 0
    assert len(results) > 2


def test_a_small_file_system(few):
    if "small" not in few:
        pytest.skip("root may mount a small file system; this user may not")
    results = few["small"]
    assert len(results) > 2
    assert {result["status"] for result in results[:-1]} == {1}  # an error, not a death


@pytest.mark.slow
def test_many_small_file_systems(tmp_path):
    if not may_mount(tmp_path):
        pytest.skip("root may mount a small file system; this user may not")
    assert len(crash(tmp_path, small=(8, 4))["small"]) > 20


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "first", "step"), [("random", 50, 1), ("points", 1, 1), ("full", 1, 1)])
def test_every_death(mode, first, step, tmp_path):
    crash(tmp_path, **{mode: (first, step)})
