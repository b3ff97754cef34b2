"""The GPU bench, tried without one: a peer that fails is text in the result, and nothing stops."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "kernels" / "bench" / "gpu_linear.py"


@pytest.mark.parametrize(
    ("peer", "source", "text"),
    [
        ("humming", "raise RuntimeError('no such GPU')", "RuntimeError: no such GPU"),
        ("marlin", "", "ImportError: the folder marlin must hold marlin_cuda.cpp and marlin_cuda_kernel.cu"),
    ],
)
def test_a_peer_that_fails_is_recorded_for_each_shape(peer: str, source: str, text: str, tmp_path: Path) -> None:
    (tmp_path / peer).mkdir()
    (tmp_path / peer / "__init__.py").write_text(source, encoding="utf-8")
    output = tmp_path / "out.json"
    command = [sys.executable, BENCH, output, "--tiny", "--peer", peer, "--peers", tmp_path]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    records = json.loads(output.read_text(encoding="utf-8"))["records"]
    assert [(r["failed"], r["n"], r["k"]) for r in records] == [(peer, 256, 256), (peer, 128, 512)]
    assert all(r["error"].startswith(text) for r in records)
