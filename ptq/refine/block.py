"""Refining one block: gradient steps that bring its output nearer to the float block's, within the packed format.

The idea of AutoRound (https://arxiv.org/abs/2309.05516), which tunes roundings, and of OmniQuant
(https://arxiv.org/abs/2308.13137), which tunes ranges, on codes that a solver has chosen. What is compared is the
output of the whole block, so that its Linears make up for each other's errors, and for what the blocks before it did:
the block reads what the quantized model has there, the target is what the float model puts out.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ptq.calibration.held import Run
from ptq.errors import ConfigError, NumericsError
from ptq.models.structure import is_transposed, linears, set_weight, weight_of
from ptq.refine.call import call_of, floating
from ptq.refine.steps import descend
from ptq.refine.weight import TunedWeight
from ptq.task import TINY, BlockTask, ModuleResult

# First step of codes and zeros at most, in codes.
CODE_RATE = 8e-3
# How far a code or zero comes, in codes, when every step goes the same way, however many there are (codes that change
# all at once make up for the same error many times over).
CODE_TRAVEL = 0.25


class FloatBlock(NamedTuple):
    """What refinement needs to know of a block before it is quantized."""

    outputs: list[list[Tensor]]  # for each batch the tensors it puts out, float32 on the CPU
    weights: Mapping[str, Tensor]  # [N, K] of each Linear whose codes stand for it as it is


@torch.no_grad()
def float_block(block: nn.Module, runs: Sequence[Run], task: BlockTask) -> FloatBlock:
    """What the block should put out, batch by batch, computed in float32 before it is quantized.

    With a float twin these are the float model's outputs there, otherwise the block's own on the inputs it reads now.
    AWQ scales weights before it chooses codes, so there the weights are left out.

    Raises:
        ConfigError: the output holds no floating-point tensor.
        NumericsError: it holds NaN or infinity.
    """
    source, calls = (block, runs) if task.twin is None else (task.twin.block, task.twin.runs)
    exact = copy.deepcopy(source).float()
    found = []
    for run in calls:
        call = call_of(source, run)
        outputs = [y.cpu() for y in floating(exact(*call.args, **call.kwargs))]
        if not outputs:
            raise ConfigError(
                f"refine compares outputs; that of {task.name or type(block).__name__} holds no floating-point tensor: "
                "return one, or set refine.steps to 0"
            )
        if not all(bool(torch.isfinite(y).all()) for y in outputs):
            raise NumericsError(
                f"the float block's output must be finite; that of {task.name or type(block).__name__} holds NaN or "
                "infinity: check the checkpoint and the calibration text"
            )
        found.append(outputs)
    weights = (
        {}
        if task.config.method == "awq"
        else {path: weight_of(module) for path, module in linears(exact) if path in task.schemes}
    )
    return FloatBlock(found, weights)


def refine_block(
    block: nn.Module, runs: Sequence[Run], reference: FloatBlock, results: Mapping[str, ModuleResult], task: BlockTask
) -> dict[str, ModuleResult]:
    """Tune the results of a solver and put the values of the new codes into the block.

    Args:
        block: holds the dequantized weights of ``results``.
        runs: one call a calibration batch, each running the block.
        reference: `float_block` of the same batches.
        results: what the solver found, by path below the block.
        task: schemes and settings.

    Returns:
        The results in the same order. Each row says the block's loss before and after, the mean over all batches in
        float32 of the squared error relative to each token's mean square. Where the loss did not fall, codes, scales,
        zeros and block are as they were.

    Raises:
        UnsupportedModelError: no gradient reaches the output.
    """
    started = time.perf_counter()
    with torch.enable_grad():
        tuning = _Tuning(block, runs, reference, results, task)
        before = tuning.loss_of_all()
        tuning.descend(task.config.refine.steps, task.config.calibration.seed)
        after = tuning.loss_of_all()
    better = after < before
    found = {path: weight.result() for path, weight in tuning.weights.items()} if better else {}
    row = {"block_loss": before, "block_loss_refined": after if better else before,
           "block_seconds_refined": round(time.perf_counter() - started, 4)}  # fmt: skip
    refined = {}
    for path, result in results.items():
        quantized = found.get(path, result.quantized)
        changed = float((quantized.codes != result.quantized.codes).float().mean())
        if better:
            set_weight(block.get_submodule(path), quantized.dequantize())
        refined[path] = ModuleResult(quantized, {**result.row, **row, "codes_refined": changed})
    return refined


class _Tuning:
    """A float32 copy of the block whose quantized weights have gradients."""

    def __init__(
        self,
        block: nn.Module,
        runs: Sequence[Run],
        reference: FloatBlock,
        results: Mapping[str, ModuleResult],
        task: BlockTask,
    ) -> None:
        self._block, self._runs, self._targets, self._task = block, runs, reference.outputs, task
        self._copy = copy.deepcopy(block).float().requires_grad_(False)
        self.weights = {
            path: TunedWeight(result.quantized, task.scale_dtype, reference.weights.get(path))
            for path, result in results.items()
        }

    def loss_of_all(self) -> float:
        """Mean over the batches, in float32."""
        with torch.no_grad():
            return sum(float(self._loss(i)) for i in range(len(self._runs))) / len(self._runs)

    def descend(self, steps: int, seed: int) -> None:
        """Gradient steps, each on one batch."""
        descend(
            self.weights.values(), self._loss, len(self._runs), steps=steps, seed=seed,
            code_rate=min(CODE_RATE, 2 * CODE_TRAVEL / steps), dtype=self._task.scale_dtype,
            what=f"the output of {self._task.name or type(self._block).__name__}",
        )  # fmt: skip

    def _loss(self, batch: int) -> Tensor:
        call = call_of(self._block, self._runs[batch])
        outputs = floating(functional_call(self._copy, self._parameters(), call.args, call.kwargs))
        pairs = zip(outputs, self._targets[batch], strict=True)
        return torch.stack([_distance(y, target.to(y.device)) for y, target in pairs]).mean()

    def _parameters(self) -> dict[str, Tensor]:
        """What stands in for the copy's own: the values that the checkpoint would hold now."""
        found = {}
        for path, weight in self.weights.items():
            dense = weight.dense()
            found[f"{path}.weight"] = dense.t() if is_transposed(self._copy.get_submodule(path)) else dense
        return found


def _distance(y: Tensor, target: Tensor) -> Tensor:
    """Mean squared error relative to the mean square of each token (each vector along the last dimension)."""
    energy = target.square().mean(-1, keepdim=True) if target.dim() else target.square()
    # a token of nearly zeros must not outweigh all others
    floor = energy.median().mul(0.1).clamp(min=TINY)
    return ((y - target).square() / energy.maximum(floor)).mean()
