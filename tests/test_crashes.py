"""Deaths of the whole process at any moment, and a full disk. Oracle: the bytes of the same run left alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import crashes
import pytest


def crash(mode: str, directory: Path, first: int, step: int):
    """Outcomes of `crashes.main` in a process that has not used threads."""
    root = Path(crashes.__file__).resolve().parent
    paths = os.pathsep.join([str(root.parent), str(root.parent / "kernels"), str(root)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, crashes.__file__, mode, str(directory), str(first), str(step)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert {result["outcome"] for result in results} == {"identical"}, f"{results}\n{done.stderr}"
    return results


def test_sigkill_at_random_moments(tmp_path):
    assert len(crash("random", tmp_path, 3, 0)) == 3


def test_death_before_something_is_durable(tmp_path):
    """Every 29th of the calls that make something durable; the slow test takes all of them."""
    results = crash("points", tmp_path, 17, 29)
    assert results[-1]["status"] == 0
    assert len(results) > 3
    assert sum(result["begun"] for result in results) > 1


def test_a_full_disk(tmp_path):
    results = crash("full", tmp_path, 9, 19)
    assert [result["status"] for result in results][-1] == 0
    assert len(results) > 2


def small_disks(directory, first, step):
    """As `crash`; skipped where nothing can be mounted."""
    probe = directory / "probe"
    probe.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(probe)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("root may mount a small file system; this user may not")
    subprocess.run(["umount", probe], check=True)
    return crash("small", directory, first, step)


def test_a_small_file_system(tmp_path):
    results = small_disks(tmp_path, 20, 60)
    assert len(results) > 2
    assert {result["status"] for result in results[:-1]} == {1}  # an error, not a death


@pytest.mark.slow
def test_many_small_file_systems(tmp_path):
    assert len(small_disks(tmp_path, 8, 4)) > 20


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "first", "step"), [("random", 50, 1), ("points", 1, 1), ("full", 1, 1)])
def test_every_death(mode, first, step, tmp_path):
    crash(mode, tmp_path, first, step)
