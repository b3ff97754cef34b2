"""Gradients through a model block by block. Oracle: autograd through the whole model, in memory, on the same tokens."""

import io
import os
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from crashes import checksums, small_parent, small_run, stop, unfinished
from tiny_models import build, run, save
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ptq import journal, walk
from ptq import output_moments as measured
from ptq.calibration.data import calibration_batches
from ptq.cli import main
from ptq.config import GPTQConfig, load_config
from ptq.errors import ConfigError, NumericsError, UnsupportedModelError
from ptq.gptq import block, outputs
from ptq.models.loading import load_tokenizer
from ptq.models.structure import linears
from ptq.output_moments import output_moments
from ptq.pipeline import quantize
from ptq.plain import quantize_linears
from ptq.plan import make_plan
from ptq.progress import Progress

TOKENS = 40


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_parent(tmp_path_factory.mktemp("moments") / "parent")


@pytest.fixture(autouse=True)
def _no_commit_is_put_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the disk is while other programs write to it."""
    monkeypatch.setattr(journal, "SECONDS", 3600.0)


def asked(config, tokens: int = TOKENS, **changes):
    return replace(config, gptq=GPTQConfig(gradient_tokens=tokens), **changes)


def interrupted(*_args: object) -> None:
    raise KeyboardInterrupt


def naive(directory: Path, rows: list[Tensor], seed: int) -> dict[str, Tensor]:
    """``E[g g^T]`` of every Linear, whole, drawn towards the identity block by block; by its path in the model."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    draws, seen = torch.Generator().manual_seed(seed), dict[str, list[Tensor]]()

    def note(name: str):
        def hook(_module, _inputs, gradients):
            seen.setdefault(name, []).append(gradients[0].reshape(-1, gradients[0].shape[-1]))

        return hook

    for name, module in linears(model):
        module.register_full_backward_hook(note(name))
    for row in rows:
        log_p = model(input_ids=row).logits.float().log_softmax(-1)
        levels = torch.rand(row.shape, generator=draws).unsqueeze(-1)
        drawn = (log_p.exp().cumsum(-1) < levels).sum(-1, keepdim=True)
        (-log_p.gather(-1, drawn).sum()).backward()
    found = {}
    for name, parts in seen.items():
        g = torch.cat(parts).double()
        found[name] = g.t() @ g / len(g)
        share = outputs.DAMPING + outputs.NOISE * len(found[name]) / len(g)
        found[name] += share * found[name].diagonal().mean() * torch.eye(len(found[name])).double()
    return found


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2", "phi3"])
def test_moments_are_those_of_autograd_through_the_whole_model(name: str, tmp_path: Path) -> None:
    save(build(name), tmp_path / "model")
    config = asked(small_run(tmp_path / "model", tmp_path / "out", group_size=32, exclude=("lm_head",)))
    plan = make_plan(config)
    batches = calibration_batches(config.calibration, load_tokenizer(plan.directory, False))
    found = output_moments(plan, batches, tmp_path / "outputs")
    rows = [row for batch in batches for row in batch.split(1)]
    count = -(-TOKENS // rows[0].numel())
    assert found.tokens == count * rows[0].numel() >= TOKENS
    expected = naive(tmp_path / "model", [rows[i * len(rows) // count] for i in range(count)], config.calibration.seed)
    names = set()
    for index in range(len(found.pieces)):
        for path in {name.rpartition(":")[0] for name in found.pieces[index]}:
            full = f"{plan.blocks}.{index}.{path}"
            names.add(full)
            (only,) = found.of(index, path)  # narrower than a block of G
            torch.testing.assert_close(only.double(), expected[full], rtol=1e-3, atol=1e-5 * float(only.abs().max()))
    assert names == set(plan.targets)
    assert not list((tmp_path / "outputs").glob("hidden-*"))


def test_what_was_measured_serves_the_run_that_goes_on(parent: Path, tmp_path: Path, monkeypatch) -> None:
    config = asked(small_run(parent, tmp_path / "out"))
    run(config)
    expected = checksums(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "before")
    stop(config, 1)
    with monkeypatch.context() as patch:
        patch.setattr(measured, "_there", lambda *_: pytest.fail("measured again"))
        run(config)
    assert checksums(tmp_path / "out") == expected
    assert not unfinished(config).exists()


def test_what_was_measured_outlives_an_interruption_of_the_first_block(parent: Path, tmp_path: Path) -> None:
    """And one in the middle of measuring leaves nothing. Oracle: the run that nothing interrupted."""
    config = asked(small_run(parent, tmp_path / "out"))
    run(config)
    expected = checksums(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "before")
    for place, left in (("_back", "no block was finished"), ("give_back", "with the gradients that were measured")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(measured if place == "_back" else walk, place, interrupted)
            with pytest.raises(KeyboardInterrupt, match=left):
                run(config)
        assert unfinished(config).exists() == (place == "give_back")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured, "_there", lambda *_: pytest.fail("measured again"))
        document = run(config).document
    assert document["resumed"]["blocks"] == 0
    assert "prediction" not in document  # which would compare the whole with what was left of it
    assert checksums(tmp_path / "out") == expected


@pytest.mark.parametrize("damage", ["flipped", "missing", "record"])
def test_what_was_damaged_is_measured_again(damage: str, parent: Path, tmp_path: Path) -> None:
    config = asked(small_run(parent, tmp_path / "out"))
    run(config)
    expected = checksums(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "before")
    stop(config, 1)
    place = unfinished(config) / "outputs"
    file = place / ("record.json" if damage == "record" else "0002.safetensors")
    if damage == "missing":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[-9] ^= 1
        file.write_bytes(bytes(data))
    run(config)
    assert checksums(tmp_path / "out") == expected


def test_the_report_weighs_losses_by_what_they_come_to_at_the_end(parent: Path, tmp_path: Path) -> None:
    """Each row says less than rounding's loss; the codes are not those of rows by themselves."""
    plain = run(small_run(parent, tmp_path / "plain"))
    said = io.StringIO()
    report = quantize(asked(small_run(parent, tmp_path / "out"), 10**6), progress=Progress(said))
    assert "gradients of 64 tokens" in said.getvalue()  # all there are
    rows = report.modules.values()
    assert all(0 < row["relative_loss"] <= row["relative_rounding_loss"] < 1 for row in rows)
    assert {row["relative_loss"] for row in rows} != {row["relative_loss"] for row in plain.modules.values()}


def test_blocks_of_outputs_do_not_depend_on_how_many_are_solved_at_once(
    parent: Path, tmp_path: Path, monkeypatch
) -> None:
    """Two of each Linear here. Oracle: all of them at once."""
    for module in (outputs, block):
        monkeypatch.setattr(module, "BLOCK", 16)
    monkeypatch.setattr(outputs, "PART", 4)
    rows = []
    for size in (1 << 24, 1):
        monkeypatch.setattr(block, "CHUNK_WEIGHTS", size)
        report = run(asked(small_run(parent, tmp_path / str(size))))
        rows.append([row["relative_loss"] for row in report.modules.values()])
    assert rows[0] == pytest.approx(rows[1], rel=1e-3)


def test_moments_of_one_linear_are_held_at_a_time(parent: Path, tmp_path: Path, monkeypatch) -> None:
    """Of a block of many experts they would be as large as the block, which nothing predicts."""
    read_tensor, seen = measured.read_tensor, list[tuple[weakref.ref[Tensor], tuple[Path, str]]]()

    def noted(path: Path, name: str) -> Tensor:
        here = path, name.rpartition(":")[0]
        assert {place for tensor, place in seen if tensor() is not None} <= {here}
        tensor = read_tensor(path, name)
        seen.append((weakref.ref(tensor), here))
        return tensor

    monkeypatch.setattr(outputs, "BLOCK", 16)
    monkeypatch.setattr(block, "BLOCK", 16)
    monkeypatch.setattr(measured, "read_tensor", noted)
    run(asked(small_run(parent, tmp_path / "out")))
    assert seen


def test_files_of_two_blocks_are_open_at_a_time(parent: Path, tmp_path: Path, monkeypatch) -> None:
    """A map is an open file, of which a process may have few: one of every sequence and block are too many."""
    through, before, most = measured._through, len(os.listdir("/proc/self/fd")), 0

    def counted(*args) -> Tensor:
        nonlocal most
        most = max(most, len(os.listdir("/proc/self/fd")) - before)
        return through(*args)

    monkeypatch.setattr(measured, "_through", counted)
    config = asked(small_run(parent, tmp_path / "out"), 10**6)
    plan = make_plan(config)
    batches = calibration_batches(config.calibration, load_tokenizer(plan.directory, False))
    output_moments(plan, batches, tmp_path / "outputs")
    assert 0 < most <= 2 * sum(map(len, batches))


def test_outputs_without_gradients_are_solved_alone_and_named(parent: Path, tmp_path: Path, monkeypatch) -> None:
    """Oracle: a run without gradients."""
    plain = run(asked(small_run(parent, tmp_path / "plain"), 0)).modules
    monkeypatch.setattr(measured, "add_moments", lambda *_: None)
    rows = run(asked(small_run(parent, tmp_path / "out"))).modules
    assert {name: row["relative_loss"] for name, row in rows.items()} == {
        name: row["relative_loss"] for name, row in plain.items()
    }
    assert all(row["rescues"] == ["no gradient came to its outputs"] for row in rows.values())


def test_gradients_must_be_finite(parent: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(measured, "_at_the_end", lambda stream, row, hidden, draws: torch.full_like(hidden, torch.inf))
    with pytest.raises(
        NumericsError, match=r"gradients of the outputs of model\.layers\.2\..* must be finite; 1024 of"
    ):
        run(asked(small_run(parent, tmp_path / "out")))


def test_a_block_that_passes_no_gradient_on_is_named(parent: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(measured, "hidden_of", lambda output: output.detach())
    with pytest.raises(UnsupportedModelError, match=r"the whole model; model\.layers\.2 passes none on: set it"):
        run(asked(small_run(parent, tmp_path / "out")))


@pytest.mark.parametrize("after", [False, True])
def test_a_model_may_change_its_inputs_in_place(after: bool, parent: Path, tmp_path: Path, monkeypatch) -> None:
    """Before they are used; what is overwritten afterwards is gone when its gradient needs it, and that is said."""
    forward = LlamaRMSNorm.forward

    def changing(self, hidden: Tensor) -> Tensor:
        if not after:
            hidden.mul_(1)
        found = forward(self, hidden)
        if after:
            hidden.mul_(1)
        return found

    monkeypatch.setattr(LlamaRMSNorm, "forward", changing)
    if not after:
        run(asked(small_run(parent, tmp_path / "out")))
        return
    with pytest.raises(UnsupportedModelError, match=r"the model's exit changes in place .* computed from: set it to 0"):
        run(asked(small_run(parent, tmp_path / "out")))


def test_where_there_is_no_end_to_look_at() -> None:
    with pytest.raises(ConfigError, match=r"gradient_tokens must be 0 for a module, which predicts no tokens"):
        quantize_linears(torch.nn.Linear(32, 32), [torch.randn(4, 32)], gptq=GPTQConfig(gradient_tokens=8))
    with pytest.raises(ConfigError, match=r"gradient_tokens must be 0 unless method is gptq; found 8 with awq: set"):
        load_config("demo.yaml", ["method=awq", "gptq.gradient_tokens=8"])
    with pytest.raises(ConfigError, match=r"gradient_tokens must be 0 unless method is gptq; found 8 with rtn: set"):
        make_plan(replace(load_config("demo.yaml", ["gptq.gradient_tokens=8"]), method="rtn"))
    assert main(["plan", "--config", "demo.yaml", "--set", "gptq.gradient_tokens=-1"]) == 2
