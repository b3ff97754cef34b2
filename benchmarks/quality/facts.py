"""What a result depends on besides the tools: the machine, the repository's commit, the parent's weights."""

import hashlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.quality.environments import ROOT


def hardware(threads: int) -> dict[str, Any]:
    """What times depend on. ``load`` is the number of processes that wanted to run in the last minute."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return {
        "cpu": model or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "instructions": [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags],
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "threads": threads,
        "load": round(os.getloadavg()[0], 1),
    }


def commit() -> str:
    """The repository's commit, with ``+`` when files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "ptq", "kernels") else "")


def weights_hash(directory: Path) -> str:
    """First 16 digits of the SHA-256 of a model's safetensors files."""
    digest = hashlib.sha256()
    for file in sorted(directory.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
