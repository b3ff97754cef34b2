"""Running the peers, each in its own environment, and ptq."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.foreign.cells import Cell
from benchmarks.quality.environments import PEERS, ROOT, python_of

HERE = Path(__file__).resolve().parent
DRIVERS = {
    "GPTQModel": "run_gptqmodel.py",
    "llm-compressor": "run_llmcompressor.py",
    "AutoRound": "run_autoround.py",
    "vLLM": "run_vllm.py",
}
LONGEST = 900  # seconds for one checkpoint


class FailedError(Exception):
    """A tool could not do what was asked; the message is the end of what it said."""


def drive(tool: str, job: Mapping[str, Any], place: Path) -> dict[str, str]:
    """Run a peer's driver.

    Returns:
        The versions of what ran.

    Raises:
        FailedError: the tool failed, or ran longer than a quarter of an hour.
    """
    report = place / "report.json"
    file = place / "job.json"
    file.write_text(json.dumps({**job, "report": str(report)}))
    command = [str(python_of(tool)), str(HERE / "drivers" / DRIVERS[tool]), str(file)]
    _run(command, place, {"PYTHONPATH": "", **PEERS[tool].variables})
    versions: dict[str, str] = json.loads(report.read_text())
    return versions


def quantize(cell: Cell, parent: Path, output: Path, place: Path) -> None:
    """Write one of our checkpoints. Raises FailedError."""
    changes = {"model": parent, "output": output, "method": "rtn", "group_size": 64, "evaluation": "null",
               "device": "cpu", **cell.settings}  # fmt: skip
    arguments = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "ptq", "quantize", "--config", "demo.yaml", *arguments]
    _run(command, place, {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])})


def _run(command: Sequence[str], place: Path, variables: Mapping[str, str]) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1",
                   **variables}  # fmt: skip
    log = place / "log.txt"
    with log.open("ab") as stream:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, timeout=LONGEST
            )
        except subprocess.TimeoutExpired:
            raise FailedError(f"ran longer than {LONGEST} s") from None
    if done.returncode:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        lines = [line for line in lines if not line.startswith("For further information")]
        raise FailedError(lines[-1][-300:] if lines else f"exit code {done.returncode}")
