"""What every driver does around its library: read the job, time the solve, say what it took. Standard library only.

A driver is run as ``python run_X.py JOB.json`` in its library's own environment. The job holds ``parent`` and
``output`` (directories), ``ids`` (JSON: rows of token ids), ``bits``, ``group_size``, ``symmetric``, ``method``,
``options``, ``seed``, ``batch_size`` and ``report`` (JSON, written here). With ``--read`` the driver loads ``output``
with its library's own reader instead and writes the dense values of the Linears named in ``modules`` to ``dense``.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

Job = SimpleNamespace


def main(quantize: Callable[[Job], None], read: Callable[[Job], dict[str, Any]]) -> None:
    """Run one half of a driver."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    if "--read" not in sys.argv:
        quantize(job)
        return
    from safetensors.torch import save_file

    save_file({name: weight.float().contiguous() for name, weight in read(job).items()}, job.dense)


@contextmanager
def measured(job: Job, *packages: str) -> Iterator[None]:
    """Time what happens inside and take its peak of resident memory; write both, and versions, to the report."""
    Path("/proc/self/clear_refs").write_text("5")  # the kernel counts the peak anew
    before = _resident("VmRSS")
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    report = {
        "seconds": round(seconds, 2),
        "memory_before": before,
        "memory_peak": _resident("VmHWM"),
        "versions": {name: version(name) for name in ("torch", "transformers", *packages)},
    }
    Path(job.report).write_text(json.dumps(report))


def token_ids(job: Job) -> list[list[int]]:
    """The calibration sequences."""
    rows: list[list[int]] = json.loads(Path(job.ids).read_text())
    return rows


def through_identity(model: Any, names: list[str]) -> dict[str, Any]:
    """The weights ``[N, K]`` of Linears as their own forward sees them: what it makes of the identity."""
    import torch

    dense = {}
    with torch.no_grad():
        for name in names:
            module = model.get_submodule(name)
            dtype = next((t.dtype for t in module.buffers() if t.is_floating_point()), torch.float32)
            dense[name] = module(torch.eye(module.in_features, dtype=dtype)).t()
    return dense


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status must have {key}; the benchmark runs on Linux only")
