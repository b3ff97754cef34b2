"""Refinement of a finished block. Oracles: the float block's output in float32, and what the format can hold."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, build, run, save, settings
from torch import Tensor, nn

from ptq.calibration.capture import Run
from ptq.config import AWQConfig, CalibrationConfig, GPTQConfig, RefineConfig, RunConfig
from ptq.errors import ConfigError, NumericsError, UnsupportedModelError
from ptq.formats.codec import QuantizedWeight, Scheme
from ptq.grid import LARGEST_SCALE, SMALLEST_SCALE, round_scales
from ptq.models.structure import linears, weight_of
from ptq.plain import quantize_linears
from ptq.refine import float_block, refine_block
from ptq.refine.call import call_of, floating
from ptq.refine.weight import TunedWeight
from ptq.rtn import rtn_solve
from ptq.task import BlockTask, FloatTwin, ModuleResult

STEPS = 30


class Block(nn.Module):
    """A residual block whose Linears feed each other."""

    def __init__(self, width: int = 32, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        for linear in (self.up, self.down):
            with torch.no_grad():
                linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) / width**0.5)
                linear.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return y


def inputs(count: int = 4, width: int = 32, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 24, width, generator=generator) for _ in range(count)]


def runs_of(block: nn.Module, batches: Sequence[Any]) -> list[Run]:
    return [lambda x=x: block(x) for x in batches]


def task_of(bits: int = 3, symmetric: bool = True, steps: int = STEPS, seed: int = 0, **more: Any) -> BlockTask:
    config = RunConfig("model", "output", "rtn", refine=RefineConfig(steps), calibration=CalibrationConfig(seed=seed))
    schemes = {"up": Scheme(bits, 16, symmetric), "down": Scheme(bits, 16, symmetric)}
    return BlockTask("", schemes, config, torch.float32, **more)


def rounded(block: nn.Module, task: BlockTask) -> dict[str, ModuleResult]:
    """Round-to-nearest results, with their values in the block."""
    found = {}
    for path, module in linears(block):
        quantized = rtn_solve(weight_of(module), task.schemes[path], scale_dtype=task.scale_dtype)
        weight_of(module).copy_(quantized.dequantize())
        found[path] = ModuleResult(quantized, {"solver": "rtn"})
    return found


def relative_loss(block: nn.Module, targets: Sequence[Tensor], batches: Sequence[Tensor]) -> float:
    """Squared error of each token over its mean square, mean over all: written out plainly, in float64."""
    block = copy.deepcopy(block).double().requires_grad_(False)
    losses = []
    for x, target in zip(batches, targets, strict=True):
        y, t = block(x.double()), target.double()
        losses.append(((y - t).square().mean(-1) / t.square().mean(-1)).mean())
    return float(torch.stack(losses).mean())


@torch.no_grad()
def refined(block: nn.Module, batches: Sequence[Tensor], task: BlockTask) -> dict[str, ModuleResult]:
    runs = runs_of(block, batches)
    reference = float_block(block, runs, task)
    return refine_block(block, runs, reference, rounded(block, task), task)


def is_storable(quantized: QuantizedWeight, scale_dtype: torch.dtype) -> bool:
    """Whether the packed format holds these very numbers."""
    top = 2**quantized.bits - 1
    scales = quantized.scales
    return (
        quantized.codes.dtype == quantized.zeros.dtype == torch.uint8
        and int(quantized.codes.max()) <= top
        and int(quantized.zeros.max()) <= top
        and (not quantized.symmetric or bool((quantized.zeros == 2 ** (quantized.bits - 1)).all()))
        and torch.equal(scales, scales.to(scale_dtype).float())
        and bool((scales.abs() >= SMALLEST_SCALE).all() and (scales.abs() <= LARGEST_SCALE).all())
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_loss_falls_and_everything_stays_in_the_format(bits: int, symmetric: bool) -> None:
    block, batches, task = Block(), inputs(), task_of(bits, symmetric)
    targets = [block(x).detach() for x in batches]
    plain = copy.deepcopy(block)
    with torch.no_grad():
        rounded(plain, task)
    results = refined(block, batches, task)
    row = results["up"].row
    # float32 sums of about 6000 squares against float64: far below 1e-4 relative
    assert row["block_loss"] == pytest.approx(relative_loss(plain, targets, batches), rel=1e-4)
    assert row["block_loss_refined"] == pytest.approx(relative_loss(block, targets, batches), rel=1e-4)
    assert float(str(row["block_loss_refined"])) < float(str(row["block_loss"]))
    for path, module in linears(block):
        assert is_storable(results[path].quantized, torch.float16)
        assert torch.equal(weight_of(module), results[path].quantized.dequantize())
        assert results[path].row["solver"] == "rtn"


def test_codes_change_where_that_helps() -> None:
    results = refined(Block(), inputs(), task_of(2, steps=100))
    assert all(0 < float(str(result.row["codes_refined"])) < 0.5 for result in results.values())


def test_the_same_seed_gives_the_same_bytes_and_another_does_not() -> None:
    first, again, other = (refined(Block(), inputs(), task_of(seed=seed))["up"].quantized for seed in (0, 0, 1))
    assert torch.equal(first.codes, again.codes)
    assert torch.equal(first.scales, again.scales)
    assert not torch.equal(first.scales, other.scales)


def test_what_did_not_get_better_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    # steps so large that every scale is off by orders of magnitude
    monkeypatch.setattr("ptq.refine.steps.SCALE_RATE", 5.0)
    block, task = Block(), task_of()
    plain = copy.deepcopy(block)
    with torch.no_grad():
        before = rounded(plain, task)
    results = refined(block, inputs(), task)
    for path, module in linears(block):
        assert torch.equal(weight_of(module), before[path].quantized.dequantize())
        assert torch.equal(results[path].quantized.codes, before[path].quantized.codes)
        assert results[path].row["block_loss_refined"] == results[path].row["block_loss"]


def test_the_target_is_what_the_float_model_puts_out_there() -> None:
    block = Block()
    twin, batches, drifted = copy.deepcopy(block), inputs(), inputs(seed=2)
    task = task_of(twin=FloatTwin(twin, runs_of(twin, batches)))
    found = float_block(block, runs_of(block, drifted), task).outputs
    for (outputs,), x in zip(found, batches, strict=True):
        assert torch.equal(outputs, twin(x))
    own = float_block(block, runs_of(block, drifted), task_of()).outputs
    assert torch.equal(own[0][0], block(drifted[0]))


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("known", [True, False])
def test_a_tuned_weight_starts_where_the_solver_ended(scale_dtype: torch.dtype, known: bool) -> None:
    W = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    start = rtn_solve(W, Scheme(3, 16, False), scale_dtype=scale_dtype)
    near = W + 0.5 if known else None  # far from the codes: where it starts is bounded
    weight = TunedWeight(start, scale_dtype, near)
    for a, b in zip(weight.result()[:3], start[:3], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(weight.dense(), start.dequantize())


def test_the_gradient_passes_the_rounding_and_stops_at_the_range() -> None:
    """Oracle: the derivatives of ``s (c - z)``, s with a factor ``exp(f)``, by hand."""
    start = QuantizedWeight(torch.tensor([[0, 3]], dtype=torch.uint8), torch.tensor([[0.5]]),
                            torch.tensor([[1]], dtype=torch.uint8), 2, 2, False)  # fmt: skip
    weight = TunedWeight(start, torch.float16)
    with torch.no_grad():
        weight.codes.copy_(torch.tensor([[0.3, 3.6]]))  # the second one rounds beyond the top
        weight.zeros.fill_(1.2)
    dense = weight.dense()
    assert dense.tolist() == [[-0.5, 1.0]]
    dense.sum().backward()
    assert weight.codes.grad is not None
    assert weight.codes.grad.tolist() == [[0.5, 0.0]]
    assert weight.zeros.grad is not None
    assert weight.zeros.grad.tolist() == [[-1.0]]
    assert weight.log_factor.grad is not None
    assert weight.log_factor.grad.tolist() == [[0.5]]


def test_scales_are_rounded_as_the_file_rounds_them() -> None:
    start = rtn_solve(torch.randn(4, 32, generator=torch.Generator().manual_seed(0)), Scheme(4, 16, True))
    weight = TunedWeight(start, torch.bfloat16)
    with torch.no_grad():
        weight.log_factor.fill_(-40.0)
    expected = round_scales(start.scales * torch.tensor(-40.0).exp(), torch.bfloat16)
    assert torch.equal(weight.result().scales, expected)
    assert torch.equal(weight.dense(), weight.result().dequantize())


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
def test_any_module_and_method_is_refined(method: Any) -> None:
    block, batches = Block(), inputs()
    targets = [block(x).detach() for x in batches]
    plain = copy.deepcopy(block)
    options: dict[str, Any] = {"method": method, "bits": 3, "group_size": 16, "gptq": GPTQConfig(), "awq": AWQConfig()}
    rows = quantize_linears(block, batches, **options, refine=RefineConfig(STEPS))
    quantize_linears(plain, batches, **options)

    @torch.no_grad()
    def loss(module: nn.Module) -> float:
        return sum(float((module(x) - t).square().mean()) for x, t in zip(batches, targets, strict=True))

    assert loss(block) < loss(plain)
    assert float(str(rows["up"]["block_loss_refined"])) < float(str(rows["up"]["block_loss"]))


def test_round_to_nearest_needs_batches_to_refine() -> None:
    with pytest.raises(ConfigError, match="refine needs calibration batches"):
        quantize_linears(Block(), method="rtn", group_size=16, refine=RefineConfig(1))


def test_calls_are_taken_over_in_float32_with_everything_in_them() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor, *, masks: dict[str, Any]) -> Any:
            raise AssertionError("the module itself must not run")

    module = Named()
    with torch.inference_mode():
        half = torch.ones(2, 3, dtype=torch.bfloat16)
    whole = torch.arange(3)
    call = call_of(module, lambda: module(half, masks={"a": [half, (whole, None)]}))
    assert call.args[0].dtype == torch.float32
    assert not call.args[0].is_inference()
    assert call.kwargs["masks"]["a"][1][0] is whole
    assert call.kwargs["masks"]["a"][1][1] is None
    assert [y.dtype for y in floating((half, whole, {"b": half}, torch.empty(0)))] == [torch.float32] * 2


class _Odd(nn.Module):
    """A block that puts out what a test wants."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.up, self._change = nn.Linear(32, 32), change

    def forward(self, x: Tensor) -> Any:
        return self._change(self.up(x))


def test_an_output_without_floats_is_refused() -> None:
    block = _Odd(lambda y: y.argmax(-1))
    with pytest.raises(ConfigError, match="that of _Odd holds no floating-point tensor"):
        float_block(block, runs_of(block, inputs()), task_of())


def test_an_output_that_is_not_finite_is_refused() -> None:
    block = _Odd(lambda y: y / 0)
    with pytest.raises(NumericsError, match="output must be finite; that of _Odd"):
        float_block(block, runs_of(block, inputs()), task_of())


def test_a_forward_without_gradient_is_refused() -> None:
    block = _Odd(torch.Tensor.detach)
    task = task_of()._replace(schemes={"up": Scheme(3, 16, True)})
    with pytest.raises(UnsupportedModelError, match="refine needs gradients; the output of _Odd has none"):
        refined(block, inputs(), task)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_streamed_model_is_refined_block_by_block(name: str, tmp_path: Path) -> None:
    """Oracle: the report, which the tests above hold against the losses themselves."""
    parent = save(build(name), tmp_path / "parent")
    exclude = () if name == "llama" else ("lm_head",)
    rows = run(settings(parent, tmp_path / "out", bits=3, exclude=exclude, refine=RefineConfig(8))).modules
    blocks: dict[str, set[tuple[float, float]]] = {}
    for path, row in rows.items():
        if "lm_head" in path:  # a head is no block
            assert "block_loss" not in row
        else:
            block = path[: path.index(".", len(ARCHITECTURES[name].blocks) + 1)]
            blocks.setdefault(block, set()).add((row["block_loss"], row["block_loss_refined"]))
    assert len(blocks) == 2
    losses = [pair for pairs in blocks.values() for pair in pairs]
    assert len(losses) == 2  # the same in every row of a block
    assert all(0 < after <= before for before, after in losses)
    assert any(after < before for before, after in losses)
