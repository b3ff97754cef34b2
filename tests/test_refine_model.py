"""Refinement of a whole model. Oracles: the KL divergence written out in float64, what the format can hold, and a run
that was cut short against one that was not."""

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from crashes import small_parent, small_run
from tiny_models import build, run, save
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import ptq
from ptq.calibration.data import calibration_batches
from ptq.config import RefineConfig, RunConfig
from ptq.errors import ConfigError, FormatError, NumericsError, UnsupportedModelError
from ptq.formats.assembly import read_tensor
from ptq.formats.checkpoint import CheckpointReader
from ptq.formats.codec import QuantizedWeight, Scheme
from ptq.grid import round_scales
from ptq.models.loading import load_tokenizer
from ptq.models.structure import linears
from ptq.plain import quantize_linears
from ptq.refine import refine_model
from ptq.refine.model import JUDGED, SPOKEN, respoken
from ptq.rtn import rtn_solve


def parent_model(seed: int = 0, tied: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(shape).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4 if parameter.dim() > 1 else 1)  # so that predictions are no coin tosses
    return model


def text(count: int = 9, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 96, (4, 24), generator=generator) for _ in range(count)]


def rounded(model: nn.Module, scheme: Scheme, *names: str) -> dict[str, QuantizedWeight]:
    found = {name: module for name, module in linears(model) if name in names or (not names and "head" not in name)}
    return {name: rtn_solve(m.weight.detach(), scheme, scale_dtype=torch.float32) for name, m in found.items()}


def divergence(parent: nn.Module, weights: dict[str, QuantizedWeight], batches: list[Tensor]) -> float:
    """Mean over tokens of sum p (log p - log q), in float64, with the weights put in by hand."""
    parent = copy.deepcopy(parent).double()
    student = copy.deepcopy(parent)
    for name, weight in weights.items():
        student.get_submodule(name).weight = nn.Parameter(weight.dequantize().double())
    losses = []
    with torch.no_grad():
        for batch in batches:
            p, q = (m(input_ids=batch).logits.log_softmax(-1) for m in (parent, student))
            losses.append((p.exp() * (p - q)).sum(-1).mean())
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("scheme", [Scheme(3, 16, True), Scheme(2, 16, False)], ids=str)
def test_the_divergence_falls_on_text_that_was_not_tuned_on(scheme: Scheme) -> None:
    parent, batches = parent_model(), text(2 * JUDGED)
    start = rounded(parent, scheme)
    before = copy.deepcopy(parent.state_dict())
    found, same, other = (
        refine_model(parent, copy.deepcopy(parent), start, batches, steps=40, seed=seed, scale_dtype=torch.float16)
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(same.weights[name].codes, weight.codes) for name, weight in found.weights.items())
    assert other.after != found.after == same.after
    judged = [batches[JUDGED - 1], batches[2 * JUDGED - 1]]
    assert found.before == pytest.approx(divergence(parent, start, judged), rel=1e-4)
    assert found.after == pytest.approx(divergence(parent, found.weights, judged), rel=1e-4)
    assert found.after < 0.9 * found.before
    for name, weight in found.weights.items():
        assert int(weight.codes.max()) <= 2**scheme.bits - 1
        assert torch.equal(weight.scales, round_scales(weight.scales, torch.float16))
        assert not scheme.symmetric or torch.equal(weight.zeros, start[name].zeros)
    assert any(not torch.equal(found.weights[name].codes, start[name].codes) for name in start)
    assert all(torch.equal(before[name], value) for name, value in parent.state_dict().items())


def test_a_head_that_shares_its_weight_leaves_the_embeddings_alone() -> None:
    parent, batches = parent_model(tied=True), text(2)
    start = rounded(parent, Scheme(4, 16, True), "lm_head")
    found = refine_model(parent, copy.deepcopy(parent), start, batches, steps=1, seed=0, scale_dtype=torch.float32)
    assert found.before == pytest.approx(divergence(parent, start, batches), rel=1e-4)


def test_where_nothing_is_gained_the_weights_stay() -> None:
    parent, batches = parent_model(), text(2)
    exact = {name: rtn_solve(m.weight.detach(), Scheme(8, 16, True), scale_dtype=torch.float32)
             for name, m in linears(parent) if "head" not in name}  # fmt: skip
    student = copy.deepcopy(parent)
    for name, weight in exact.items():
        parent.get_submodule(name).weight.data.copy_(weight.dequantize())
    found = refine_model(parent, student, exact, batches, steps=3, seed=0, scale_dtype=torch.float32, from_parent=False)
    assert found.before == found.after == pytest.approx(0, abs=1e-6)
    assert all(torch.equal(found.weights[name].codes, weight.codes) for name, weight in exact.items())


def test_what_the_parent_says_is_drawn_from_its_predictions() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.full((40, 501), 7)
    logits = torch.tensor([0.5, 0.2, 0.0, 0.3]).log().repeat(40, 501, 1)
    found = respoken(tokens, logits, generator)
    assert (found[:, 0] == 7).all()
    said = found[found != 7]
    assert len(said) / 20_000 == pytest.approx(SPOKEN, abs=0.02)  # 0.6 of them, give or take 0.0035
    shares = torch.bincount(said, minlength=4) / len(said)
    assert torch.allclose(shares, torch.tensor([0.5, 0.2, 0.0, 0.3]), atol=0.02)
    assert shares[2] == 0
    assert (tokens == 7).all()
    certain = torch.nn.functional.one_hot(torch.arange(501) % 4).float().mul(100).expand(40, -1, -1)
    found = respoken(tokens, certain, generator)
    places = torch.arange(500).expand(40, -1) % 4  # each is said after the place that predicts it
    assert torch.equal(found[:, 1:], torch.where(found[:, 1:] == 7, 7, places))


def test_a_batch_is_read_as_it_is_once_and_then_as_the_parent_speaks() -> None:
    parent, batches = parent_model(), text(2)
    student, read = copy.deepcopy(parent), list[Tensor]()
    parent.register_forward_pre_hook(lambda _, __, given: read.append(given["input_ids"]), with_kwargs=True)
    start = rounded(parent, Scheme(4, 16, True))
    refine_model(parent, student, start, batches, steps=6, seed=0, scale_dtype=torch.float32)
    judged, tuned = read[:2] + read[-2:], read[2:-2]
    assert all(torch.equal(*pair) for pair in zip(judged, batches * 2, strict=True))
    assert len(tuned) == 6
    assert all(any(torch.equal(one, batch) for one in tuned[:2]) for batch in batches)
    for again in tuned[2:]:
        kept = max(float((again == batch).float().mean()) for batch in batches)
        assert 0.25 < kept < 0.7  # 0.4 of them, the first of each row, and what was drawn as it was
    assert not torch.equal(tuned[2], tuned[4])
    assert not torch.equal(tuned[2], tuned[5])


@pytest.mark.parametrize(("dtype", "lacks", "expected"), [
    (torch.bfloat16, None, torch.bfloat16), (torch.bfloat16, "this processor lacks it", torch.float32),
    (torch.float32, None, torch.float32),
])  # fmt: skip
def test_products_are_in_the_models_dtype_where_that_is_fast(
    dtype: torch.dtype, lacks: str | None, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptq_kernels.cpu.library.refuse", lambda name: lacks)
    parent = parent_model().to(dtype)
    student = copy.deepcopy(parent).float()
    found = list[torch.dtype]()
    student.get_submodule("lm_head").register_forward_hook(
        lambda *given: found.append(given[2].dtype) if torch.is_grad_enabled() else None
    )
    refine_model(parent, student, rounded(student, Scheme(4, 16, True)), text(2), steps=2, seed=0,
                 scale_dtype=torch.float16)  # fmt: skip
    assert found == [expected] * 2


def test_a_model_without_gradients_is_refused() -> None:
    parent = parent_model()
    student = copy.deepcopy(parent)
    student.forward = torch.no_grad()(student.forward)  # type: ignore[method-assign]
    with pytest.raises(UnsupportedModelError, match="refine needs gradients; the output of Llama.* has none"):
        refine_model(parent, student, rounded(parent, Scheme(4, 16, True)), text(2), steps=1, seed=0,
                     scale_dtype=torch.float32)  # fmt: skip


def test_a_plain_module_is_refused() -> None:
    with pytest.raises(ConfigError, match="refine.model_steps must be 0 for a module, which predicts no tokens"):
        quantize_linears(nn.Sequential(nn.Linear(32, 32)), [torch.zeros(1, 32)], method="gptq",
                         refine=RefineConfig(model_steps=1))  # fmt: skip


def cut_short(config: RunConfig, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """A run that ends when it calls a function of ptq.walk or of the journal."""

    def killed(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(at, killed)
        with pytest.raises(KeyboardInterrupt):
            run(config)


def loss_of(parent: Path, output: Path, config: RunConfig) -> float:
    """KL divergence of a checkpoint to its parent on the calibration text, in nats a token."""
    one = AutoModelForCausalLM.from_pretrained(parent, dtype="auto")
    other = ptq.load(str(output), device="cpu", dtype="float32")
    batches, total = calibration_batches(config.calibration, load_tokenizer(parent, False)), 0.0
    with torch.no_grad():
        for batch in batches:
            p, q = (m(input_ids=batch).logits.float().log_softmax(-1) for m in (one, other))
            total += float((p.exp() * (p - q)).sum())
    return total / sum(batch.numel() for batch in batches)


@pytest.mark.parametrize(
    ("family", "method", "shards"),
    [("llama", "gptq", "5GB"), ("llama", "awq", "12KB"), ("llama", "rtn", "12KB"), ("gpt2", "gptq", "5GB")],
)
def test_a_run_goes_on_from_the_blocks_and_replaces_their_tensors(
    family: str, method: str, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = small_parent(tmp_path / "parent") if family == "llama" else save(build(family), tmp_path / "parent")
    config = replace(small_run(parent, tmp_path / "plain", method), max_shard_size=shards)
    monkeypatch.setattr("ptq.refine.model.SPOKEN", 0.0)  # random models say nothing like the text they are judged by
    if family == "gpt2":
        config = replace(config, exclude=("lm_head",))
    plain = run(config)
    refined = replace(config, output=str(tmp_path / "whole"), refine=RefineConfig(model_steps=12))
    rows = run(refined).document["modules"]
    assert rows.keys() == plain.document["modules"].keys()
    row = next(iter(rows.values()))
    assert row["model_loss"] > row["model_loss_refined"]
    assert row["model_loss_refined"] == pytest.approx(loss_of(parent, tmp_path / "whole", refined), rel=0.02)
    cut = replace(refined, output=str(tmp_path / "cut"))
    cut_short(cut, monkeypatch, "ptq.walk.refine_end_to_end")
    cut_short(cut, monkeypatch, "ptq.journal.assemble")  # after refinement, which is not done again
    with monkeypatch.context() as patch:
        patch.setattr("ptq.walk.refine_end_to_end", None)
        again = run(cut)
    blocks = {re.sub(r"\D*(\d+).*", r"\1", name) for name in rows}
    assert again.document["resumed"]["blocks"] == len(blocks)
    bytes_of = [
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors*")}
        for name in ("plain", "whole", "cut")
    ]
    assert bytes_of[1] == bytes_of[2] != bytes_of[0]
    names = [set(CheckpointReader(tmp_path / name).names()) for name in ("plain", "whole")]
    assert names[0] == names[1]


def test_steps_may_change_when_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = small_parent(tmp_path / "parent")
    config = replace(small_run(parent, tmp_path / "out"), refine=RefineConfig(model_steps=9))
    cut_short(config, monkeypatch, "ptq.walk.refine_end_to_end")  # out of memory, say
    cut_short(config, monkeypatch, "ptq.journal.assemble")
    monkeypatch.setattr("ptq.walk.quantize_block", None)
    found = run(replace(config, refine=RefineConfig(model_steps=0)))
    assert found.document["resumed"]["blocks"] == 3
    assert not any("model_loss" in row for row in found.document["modules"].values())
    monkeypatch.undo()
    run(replace(config, output=str(tmp_path / "plain"), refine=RefineConfig()))
    names = [path.name for path in (tmp_path / "plain").glob("*.safetensors")]
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_predictions_that_are_not_finite_are_an_error() -> None:
    parent = parent_model()
    student = copy.deepcopy(parent)
    parent.get_submodule("model.norm").weight.data.fill_(float("nan"))
    with pytest.raises(NumericsError, match="predictions must be finite before refinement; the KL .* is nan"):
        refine_model(parent, student, rounded(student, Scheme(4, 16, True)), text(2), steps=1, seed=0,
                     scale_dtype=torch.float32)  # fmt: skip


def test_a_part_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"0000.safetensors is missing; .* start over with --fresh"):
        read_tensor(tmp_path / "0000.safetensors", "a")
