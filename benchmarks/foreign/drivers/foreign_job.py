"""What every driver does around its library. Standard library only.

A driver is run as ``python run_X.py JOB.json`` in its library's own environment. The job holds ``output`` (directory),
``method``, ``settings`` and ``report`` (JSON, written here), and to write a checkpoint ``parent`` (directory) and
``ids`` (rows of token ids), to read one ``prompt`` (rows of token ids) and ``logits`` (the file they go to).
"""

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

Job = SimpleNamespace


def main(write: Callable[[Job], None], read: Callable[[Job], None], *packages: str) -> None:
    """Run one half of a driver and write the versions of what ran."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    (read if hasattr(job, "logits") else write)(job)
    versions = {name: version(name) for name in ("torch", "transformers", *packages)}
    Path(job.report).write_text(json.dumps(versions))


def rows_of(job: Job) -> list[list[int]]:
    """The calibration sequences."""
    return job.ids
