"""ptq.load(compile=True): generate runs its decoding step through torch.compile, and gives the same tokens.

Oracle: the same model without it.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

import ptq
from benchmarks.whole_model.checkpoints import Packing, write_checkpoint
from benchmarks.whole_model.shapes import SHAPES

PROMPT = torch.arange(5, 17).view(1, -1)


@pytest.fixture(scope="module", params=["tiny", "tiny-qwen3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiled") / "model"
    write_checkpoint(SHAPES[request.param], Packing(128, head=False), path)
    return path


def tokens(path: Path, **options: Any) -> torch.Tensor:
    model = ptq.load(path, device="cpu", fuse=True, **options)
    return model.generate(PROMPT, max_new_tokens=8, do_sample=False, cache_implementation="static")


def test_the_decoding_step_alone_is_compiled(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []

    def compiled(function: Any, **settings: Any) -> Any:
        assert settings["options"] == {"cpp_wrapper": True}
        return lambda *a, **k: (rows.append(k["input_ids"].shape[1]), function(*a, **k))[1]

    want = tokens(checkpoint)
    monkeypatch.setattr(torch, "compile", compiled)
    assert torch.equal(tokens(checkpoint), want)
    assert not rows
    assert torch.equal(tokens(checkpoint, compile=True), want)
    assert rows == [1] * 7  # the first token is the prefill's


@pytest.mark.slow
def test_what_is_compiled_gives_the_same_tokens(checkpoint: Path) -> None:
    torch._dynamo.reset()
    assert torch.equal(tokens(checkpoint, compile=True), tokens(checkpoint))


def test_a_saved_model_does_not_ask_for_it(checkpoint: Path, tmp_path: Path) -> None:
    model = ptq.load(checkpoint, device="cpu", compile=True)
    model.save_pretrained(tmp_path / "copy")
    again = ptq.load(tmp_path / "copy", device="cpu")
    assert again.generation_config.compile_config is None
    assert again.generation_config.cache_implementation is None
