"""Results on disk: one JSON document, one line a checkpoint, written after each."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.quality.environments import ROOT

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
