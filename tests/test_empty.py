"""Models that are built without memory, and what other threads see of it. Oracle: torch's own modules."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from test_cli import SMALL
from torch import nn

import ptq
from ptq import cli
from ptq.models.empty import empty_parameters

MODEL = Path(__file__).parent.parent / "examples" / "tiny-llama"


class Noted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3), requires_grad=False)
        self.weight.note = "kept"  # type: ignore[attr-defined]
        self.again = self.weight
        self.register_parameter("none", None)
        self.register_buffer("buffer", torch.arange(3))


def test_parameters_are_empty_and_buffers_are_real() -> None:
    with empty_parameters(), empty_parameters():
        module = Noted()
    assert module.weight.device.type == "meta"
    assert not module.weight.requires_grad
    assert module.again.note == "kept"  # type: ignore[attr-defined]
    assert module.none is None
    assert torch.equal(module.buffer, torch.arange(3))
    assert Noted().weight.device.type == "cpu"


@pytest.mark.parametrize("first_leaves_first", [False, True])
def test_modules_of_other_threads_are_as_they_would_be(first_leaves_first: bool) -> None:
    """Two threads that build at once, and leave in either order, beside one that does not."""
    register, entered, leave = nn.Module.register_parameter, threading.Barrier(3), [threading.Event() for _ in "ab"]
    found: dict[int, str] = {}

    def build(number: int) -> None:
        with empty_parameters():
            entered.wait(60)
            found[number] = nn.Linear(2, 2).weight.device.type
            leave[number].wait(60)

    threads = [threading.Thread(target=build, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    entered.wait(60)
    assert nn.Linear(2, 2).weight.device.type == "cpu"
    for number in (0, 1) if first_leaves_first else (1, 0):
        leave[number].set()
        threads[number].join(60)
        assert nn.Linear(2, 2).weight.device.type == "cpu"
    assert found == {0: "meta", 1: "meta"}
    assert nn.Module.register_parameter is register


def test_an_error_leaves_nothing_behind() -> None:
    register = nn.Module.register_parameter
    with pytest.raises(ZeroDivisionError), empty_parameters():
        1 / 0  # noqa: B018
    assert nn.Module.register_parameter is register


def test_torch_transformers_and_safetensors_are_enough_to_load(tmp_path: Path) -> None:
    """In a process that lacks what transformers does not need itself."""
    settings = [f"--set={item}" for item in [f"output={tmp_path / 'out'}", *SMALL, "method=rtn"]]
    assert cli.main(["quantize", "--config", "demo.yaml", *settings]) == 0
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.save(ptq.load(tmp_path / "out", device="cpu")(tokens).logits, tmp_path / "logits")
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['accelerate', 'greenlet', 'datasets', 'peft', 'triton']))\n"
        "import torch, ptq; from transformers import AutoModelForCausalLM\n"
        f"expected = torch.load({str(tmp_path / 'logits')!r})\n"
        "for load in (lambda p: ptq.load(p, device='cpu'), AutoModelForCausalLM.from_pretrained):\n"
        f"    assert torch.equal(load({str(tmp_path / 'out')!r})(torch.arange(3, 40)[None]).logits, expected)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
