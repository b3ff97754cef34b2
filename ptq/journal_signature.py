"""What the bytes of a checkpoint depend on: a run goes on where it stopped only if none of it has changed."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptq.calibration.data import token_hash
from ptq.distributed import Ranks
from ptq.errors import ConfigError, FormatError
from ptq.formats.digest import digest
from ptq.gptq.columns import columns_library
from ptq.models.description import TOKENIZERS, describes
from ptq.plan import Plan
from ptq.report import versions

# Keys that do not change what is written, and places: what is there goes in instead.
FREE = (
    *("model", "output", "evaluation", "calibration.offload", "calibration.dataset.files"),
    "refine.model_steps",  # no block depends on it, and what does says it
)
READ = ("*.json", "*.jinja", "*.py", *TOKENIZERS)  # of model and tokenizer; other .txt are licences and logs
PACKAGES = ("ptq", "torch", "transformers")
SAMPLES = 256
SAMPLE_BYTES = 4096


def signature_of(plan: Plan, batches: Sequence[Tensor] | None, processes: int) -> dict[str, str]:
    """Dotted name to text of everything that the checkpoint's bytes depend on.

    Weight files go in with name, size, header and 256 samples of 4 KiB (small files are read whole), the other files
    of the model with all their bytes. ``batches`` of None leaves out the
    calibration tokens and the schemes, which may depend on them.
    """
    signature = _flat(asdict(plan.config), "configuration.")
    signature = {key: text for key, text in signature.items() if not _free(key)}
    found = versions()
    signature |= {f"version.{name}": found[name] for name in PACKAGES}
    signature |= {
        "machine.device": plan.device.type,
        "machine.processes": str(processes),
        "machine.threads": str(torch.get_num_threads()),
        "machine.processor": torch.backends.cpu.get_cpu_capability(),
    }
    if plan.device.type == "cpu":
        signature["machine.columns"] = columns_library() or "torch"
    if plan.device.type == "cuda":
        signature["machine.gpu"] = torch.cuda.get_device_name(plan.device)
    signature |= model_signature(plan)
    if batches is not None:
        signature["quantized modules"] = digest(repr(sorted(plan.schemes.items())).encode())
        signature["calibration text"] = token_hash(batches)
    return signature


def model_signature(plan: Plan) -> dict[str, str]:
    """Of `signature_of` what its model's files give."""
    weights = set(plan.reader.files())
    return {
        f"model.{path.name}": _file(path)
        for path in sorted(plan.directory.iterdir())
        if path.is_file() and (path.name in weights or describes(path.name, READ))
    }


def require_unchanged(plan: Plan, before: Mapping[str, str], advice: str) -> None:
    """Raise FormatError where a file of the model is not what it was, by an earlier `model_signature`.

    What has come into the directory since was not read.
    """
    now = model_signature(plan)
    if changed := [name for name, text in before.items() if now.get(name) != text]:
        names = ", ".join(name.removeprefix("model.") for name in changed)
        raise FormatError(
            f"a model must stay as it is while a run reads it; in {plan.directory}, these have changed since it began: "
            f"{names}. {advice}"
        )


def require_same(ranks: Ranks, signature: Mapping[str, str]) -> None:
    """Raise ConfigError in every process where they do not agree; what differs between machines is left out."""
    mine = {name: text for name, text in signature.items() if not name.startswith("machine.")}
    every = ranks.gather(mine)
    for rank, theirs in enumerate(every):
        differing = sorted(name for name in {*every[0], *theirs} if every[0].get(name) != theirs.get(name))
        if differing:
            name = differing[0]
            raise ConfigError(
                f"all processes of a run must have the same configuration, model and text; {name} is "
                f"{every[0].get(name)} in the first and {theirs.get(name)} in process {rank}: start them alike"
            )


def _free(key: str) -> bool:
    plain = key.removeprefix("configuration.")
    return any(plain == name or plain.startswith(f"{name}.") for name in FREE)


def _flat(tree: Mapping[str, Any], prefix: str) -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + str(key)] = str(value)
    return flat


def _file(path: Path) -> str:
    size = path.stat().st_size
    with open(path, "rb") as file:
        if path.suffix != ".safetensors" or size <= SAMPLES * SAMPLE_BYTES:
            return f"{size} bytes, checksum {digest(file.read())}"
        header = 8 + int.from_bytes(file.read(8), "little")
        file.seek(0)
        seen = [file.read(header)]
        for start in range(header, size, (size - header) // SAMPLES + 1):
            file.seek(start)
            seen.append(file.read(SAMPLE_BYTES))
    return f"{size} bytes, checksum {digest(b''.join(seen))}"
