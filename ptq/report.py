"""``report.json``: what was run, on what, with which result; and the table a run ends with."""

import platform
import resource
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from ptq.errors import FormatError
from ptq.formats.staging import read_json
from ptq.gptq.columns import columns_library
from ptq.version import VERSION

PACKAGES = ("transformers", "safetensors", "accelerate", "datasets", "triton", "greenlet")
# What of report.json is read again, for pages, cards and comparisons: an object's keys (``*``: any other; ``!``:
# required where the object is), a list's entries, a type, or a tuple of alternatives. No finite number: null.
_NUMBER = (int, float)
_FIGURE = (int, float, NoneType)
_USED = {"predicted!": _NUMBER, "actual!": _NUMBER}
_TEXT = (str, [str])
_SHAPE: Any = {
    "versions": {"*": str},
    "hardware": {},
    "configuration": {
        "model!": str, "method!": str, "format!": str, "awq": {}, "refine": {"steps": int, "model_steps": int},
        "calibration!": {"dataset!": {"name": (str, NoneType), "files": [str]}},
    },
    "parent": ({"name": (str, NoneType), "card": ({}, NoneType)}, NoneType),
    "calibration": {"sequences!": int, "tokens!": int, "seed!": int},
    "budget": {
        "budget!": _NUMBER, "average_bits!": _NUMBER, "widths!": [int], "predicted_kl!": _FIGURE,
        "groups!": [{"modules!": [str], "bits!": int, "predicted_kl!": {"*": _FIGURE},
                     "predicted_relative_loss!": {"*": _FIGURE}}],
    },
    "modules": {"*": {
        "bits!": int, "group_size!": int, "symmetric!": bool, "solver": str, "relative_loss": _FIGURE,
        "relative_rounding_loss": _FIGURE, "rescues": ([str], NoneType), "routed": int, "tokens": int,
    }},
    "kept_in_float": [str],
    "size": {"before!": int, "after!": int, "bits_per_weight!": _NUMBER},
    "memory": {"peak_on_gpu": int},
    "peak_bytes": {"*": int},
    "prediction": {"memory!": _USED, "seconds!": _USED},
    "seconds": {"*": _NUMBER},
    "evaluation": {
        "text!": _TEXT, "tokens!": int, "window!": int, "stride!": int,
        "models!": {"*": {"perplexity": _FIGURE, "kl": _FIGURE, "top1": _FIGURE, "megabytes": _FIGURE}},
    },
    "kernels": ({"evaluation!": {"*": str}, "*": {"*": str}}, {"*": str}),
}  # fmt: skip
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "null",
          dict: "an object", list: "a list"}  # fmt: skip


@dataclass
class Report:
    """Everything a run has to say for itself; `document` is what `report.json` holds."""

    output: Path
    document: dict[str, Any] = field(default_factory=dict)

    @property
    def modules(self) -> dict[str, dict[str, Any]]:
        """One row for each quantized Linear."""
        rows: dict[str, dict[str, Any]] = self.document["modules"]
        return rows


def read_report(path: Path) -> dict[str, Any]:
    """What a ``report.json`` holds, where everything that is read of one is of the type that a run writes.

    Raises:
        FormatError: as `read_json`, or for the first value of another type.
    """
    document = read_json(path)
    if mistake := _mistake(document, _SHAPE, ""):
        raise FormatError(f"{path}: {mistake}: the report was changed; correct it, or quantize again")
    return document


def _mistake(value: Any, shape: Any, key: str) -> str:
    """What is wrong with ``value``, at ``key``, for ``shape``; empty where nothing is."""
    if isinstance(shape, tuple):
        found = [_mistake(value, each, key) for each in shape]
        inner = [said for said, each in zip(found, shape, strict=True) if type(each) is type(value)]
        return "" if "" in found else (inner or [_other(value, shape, key)])[0]
    if isinstance(shape, type):
        fits = type(value) is shape and (not isinstance(value, int) or abs(value) < 2**63)
        return "" if fits else _other(value, (shape,), key)
    if type(value) is not type(shape):
        return _other(value, (shape,), key)
    if isinstance(shape, list):
        return next(filter(None, (_mistake(each, shape[0], f"{key}[{i}]") for i, each in enumerate(value))), "")
    missing = [name[:-1] for name in shape if name.endswith("!") and name[:-1] not in value]
    if missing:
        return f"{key}.{missing[0]} is required, found none".removeprefix(".")
    for name, each in value.items():
        expected = shape.get(name, shape.get(f"{name}!", shape.get("*")))
        if expected is not None and (said := _mistake(each, expected, f"{key}.{name}".removeprefix("."))):
            return said
    return ""


def _other(value: Any, shapes: tuple[Any, ...], key: str) -> str:
    kinds = [shape if isinstance(shape, type) else type(shape) for shape in shapes]
    words = [_WORDS[kind] for kind in kinds if kind is not int or float not in kinds]  # "a number" has the whole ones
    return f"{key} must be {' or '.join(words)}, found {value!r:.60}"


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    # torch's own version says which build it is; its package's may not
    found = {"ptq": VERSION, "python": platform.python_version(), "torch": str(torch.__version__)}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine a result was made on, and on a CPU the library that solved its columns (``torch``: none)."""
    row: dict[str, Any] = {"device": str(device), "machine": platform.machine(), "threads": torch.get_num_threads()}
    if device.type == "cpu":
        row["columns"] = columns_library() or "torch"
    if device.type == "cuda":
        row["gpu"] = torch.cuda.get_device_name(device)
    return row


def resident_bytes(*, peak: bool = False) -> int:
    """Resident memory of this process now, or its peak."""
    status = Path("/proc/self/status")
    if status.exists():
        key = "VmHWM:" if peak else "VmRSS:"
        for line in status.read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    # elsewhere only the peak is to be had; macOS counts bytes
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if platform.system() == "Darwin" else used * 1024


class PeakMemory:
    """Watches the anonymous memory of this process from entering to leaving; maps of files do not count."""

    def __init__(self, period: float = 0.02) -> None:
        self.bytes = anonymous_bytes()
        self._period = period
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End; `bytes` holds the peak."""
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self._period):
            self.bytes = max(self.bytes, anonymous_bytes())


def anonymous_bytes() -> int:
    """Resident memory that is not a map of a file; where the system does not tell, all resident memory."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return resident_bytes()


def table(rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Rows as aligned text. ``columns`` maps a key to its format specification."""
    head = ["", *columns]
    body = [[name, *(_cell(row.get(key), spec) for key, spec in columns.items())] for name, row in rows.items()]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]

    def aligned(cells: list[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]).rstrip()

    return "\n".join([aligned(head), "  ".join("-" * width for width in widths), *map(aligned, body)])


def _cell(value: Any, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def summary(report: Report) -> str:
    """The table a run ends with."""
    document = report.document
    size = document["size"]
    lines = [
        f"{len(report.modules)} modules quantized, {size['bits_per_weight']:.3f} bits a weight, "
        f"{size['before'] / 1e6:.1f} MB -> {size['after'] / 1e6:.1f} MB"
    ]
    rescued = [name for name, row in report.modules.items() if row.get("rescues")]
    if rescued:
        lines.append(f"{len(rescued)} modules needed a numerical rescue, see the report: {', '.join(rescued[:3])}")
    experts = [row for row in report.modules.values() if "routed" in row]
    if experts:
        starved = sum(row["routed"] < row["tokens"] for row in experts)
        few = f"{starved} of which few tokens were routed to and saw all tokens"
        lines.append(f"{len(experts)} modules of experts, {few}")
    if "prediction" in document:
        memory, seconds = document["prediction"]["memory"], document["prediction"]["seconds"]
        lines.append(
            f"solve: peak memory {memory['predicted'] / 1e9:.2f} GB predicted, {memory['actual'] / 1e9:.2f} GB used; "
            f"time {seconds['predicted']:.1f} s predicted, {seconds['actual']:.1f} s taken"
        )
    lines += ["", f"checkpoint  {report.output}", f"report      {report.output / 'report.json'}"]
    return "\n".join(lines)


def start_counting_peak() -> None:
    """Let the kernel count the peak of resident memory from here on (Linux; elsewhere it is the process's peak)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
