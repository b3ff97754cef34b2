"""Results on disk: one JSON document, one line a checkpoint, written after each."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.quality.quantize import ROOT

FILE = ROOT / "benchmarks/results/quality.json"


class Store:
    """The document: ``parents`` and ``checkpoints``, by key."""

    def __init__(self, file: Path = FILE) -> None:
        self.file = file
        empty: dict[str, dict[str, Any]] = {"parents": {}, "checkpoints": {}}
        self.document = json.loads(file.read_text()) if file.is_file() else empty

    def has(self, key: str) -> bool:
        """Whether there is a result, a failure included."""
        return key in self.document["checkpoints"]

    def add(self, section: str, key: str, entry: Mapping[str, Any]) -> None:
        """Put in an entry and write the document, whole or not at all."""
        self.document[section][key] = entry
        lines = []
        for name, entries in self.document.items():
            rows = [f"  {json.dumps(k)}: {json.dumps(entries[k])}" for k in sorted(entries)]
            lines.append(f" {json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n }")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        partial.replace(self.file)


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
