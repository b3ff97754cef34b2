"""Models on disk, and the processes that time them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.quality.environments import ROOT
from benchmarks.whole_model.checkpoints import write_checkpoint
from benchmarks.whole_model.rows import LLAMA_CPP, Row
from benchmarks.whole_model.shapes import SHAPES

HERE = Path(__file__).resolve().parent
WORK = HERE / ".work"
GROUPED_ATTENTION = "1"  # attention reads each KV head once; transformers asks torch for that on a CPU only if told so


class Task(NamedTuple):
    """One process."""

    shape: str
    row: Row
    threads: int
    prompt: int  # tokens
    new: int  # tokens
    repeats: int


def prepare(shape: str, row: Row, llama_cpp: Path | None) -> None:
    """Write the weights of a row unless they are there."""
    path = WORK / shape / row.model
    if row.kind == LLAMA_CPP:
        subprocess.run([str(llama_cpp), str(HERE / "gguf_model.py"), shape, str(path)], check=True)
    else:
        write_checkpoint(SHAPES[shape], row.packing, path)


def run(task: Task, llama_cpp: Path | None) -> dict[str, Any]:
    """What the process of `task` printed, or its last words as ``error``."""
    row = task.row
    order: dict[str, Any] = {
        "path": str(WORK / task.shape / row.model),
        **{key: getattr(task, key) for key in ("threads", "prompt", "new", "repeats")},
    }
    if row.kind == LLAMA_CPP:
        command = [str(llama_cpp), str(HERE / "decode_gguf.py")]
        order["flash_attention"] = row.flash_attention
    else:
        command = [sys.executable, "-m", "benchmarks.whole_model.generate"]
        order |= {"compiled": row.compiled, "head_bits": row.head_bits}
    done = subprocess.run(
        [*command, json.dumps(order)], cwd=ROOT, env=_environment(task), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        words = done.stderr.strip().splitlines()
        return {"error": words[-1] if words else f"exit status {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _environment(task: Task) -> dict[str, str]:
    # Unpinned threads can share one core of a virtual machine.
    pinned = {"OMP_NUM_THREADS": str(task.threads), "OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    chosen = {"TORCHINDUCTOR_CACHE_DIR": str(WORK / "inductor"), "TRANSFORMERS_SDPA_FORCE_GQA": GROUPED_ATTENTION}
    return {**os.environ, **pinned, **chosen, "PYTHONPATH": path}
