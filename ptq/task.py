"""What the methods share when they work on one block: the task, a Linear's result, its row in the report."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptq.calibration.capture import FAINTEST, InputStats
from ptq.calibration.held import Run
from ptq.config import RunConfig
from ptq.distributed import ALONE, Ranks
from ptq.errors import NumericsError
from ptq.formats.codec import QuantizedWeight, Scheme
from ptq.grid import Grid, pack_result
from ptq.models.structure import weight_of

# Keeps a quotient of losses defined where nothing can be lost.
TINY = 1e-30
# Weights of one Linear worked on at a time: bounds the temporaries.
CHUNK_WEIGHTS = 1 << 24


class ModuleResult(NamedTuple):
    """One quantized Linear and the row it gets in the report."""

    quantized: QuantizedWeight
    row: dict[str, Any]


class FloatTwin(NamedTuple):
    """The same block as the float model has it, on the hidden states the float model has there."""

    block: nn.Module
    runs: Sequence[Run]


class BlockTask(NamedTuple):
    """What to do to one block."""

    name: str  # dotted path of the block, "" for a whole module
    schemes: Mapping[str, Scheme]  # Linear's path below the block -> how to quantize it
    config: RunConfig
    scale_dtype: torch.dtype
    # Runs a float32 stand-in for the block on the first batch and returns its output; AWQ proves its folds with it.
    probe: Callable[[nn.Module], Tensor] | None = None
    # Without it there is no correction for what the quantized blocks before this one changed.
    twin: FloatTwin | None = None
    ranks: Ranks = ALONE
    home: torch.device | None = None  # where second moments lie; None: where the block runs
    branching: bool = False  # each batch may take another way through the block
    # Linear's path -> diagonal blocks of how errors of its outputs meet at the model's end (`ptq.gptq.outputs`), read
    # when they are asked for: those of all experts of a block may be as large as the block
    moments: Callable[[str], Sequence[Tensor]] | None = None

    def full(self, member: str) -> str:
        """Dotted path of a Linear in the model; of "", what stands before the Linears' names."""
        return f"{self.name}.{member}" if self.name else member


class Solved(NamedTuple):
    """Codes of one weight, with losses ``trace(D H D^T) / trace(T H T^T)``, D = T less the values of codes.

    T is what the codes are to stand for: the weight, or with `correct_inputs` GPTQ's corrected target.
    """

    codes: Tensor
    grid: Grid
    loss: float
    rounding: float  # of the weight rounded on its plain grid, against the same T


def finish(module: nn.Module, solved: Solved, row: dict[str, Any], started: float) -> ModuleResult:
    """Put the codes' values into the module and complete its row of the report."""
    quantized = pack_result(solved.codes, solved.grid)
    rows = max(1, CHUNK_WEIGHTS // quantized.codes.shape[1])
    for start in range(0, len(quantized.codes), rows):
        part = slice(start, start + rows)
        weight_of(module)[part].copy_(quantized.rows(part).dequantize())
    losses = {
        "relative_loss": solved.loss,
        "relative_rounding_loss": solved.rounding,
        "loss_to_rounding": solved.loss / solved.rounding if solved.rounding > 0 else 1.0,
    }
    return ModuleResult(quantized, {**row, **losses, **described(quantized, started)})


def counted(stats: InputStats) -> dict[str, Any]:
    """Tokens behind a result; of an expert also how many were routed to it, the rest being everybody's."""
    row: dict[str, Any] = {"tokens": stats.tokens}
    return row if stats.routed is None else {**row, "routed": stats.routed}


def faint(stats: InputStats, name: str, strict: bool) -> list[str]:
    """What to put on record of inputs that are too small to be squared; NumericsError under ``strict``."""
    if stats.faint and strict:
        raise NumericsError(
            f"strict: the inputs of {name} must be large enough for float32 to hold their squares, found "
            f"mean squares below {FAINTEST:g} in every channel: exclude the layer, or set strict: false to round it "
            "without them"
        )
    return ["inputs too small to be squared"] * stats.faint


def share(loss: float, energy: float) -> float:
    """``loss / energy``; of no energy, as an all-zero weight has, nothing can be lost, and whatever is lost is all.

    NaN, of outputs too large for float32, stays NaN.
    """
    return float(loss > 0) if energy <= 0 else loss / energy


def described(quantized: QuantizedWeight, started: float) -> dict[str, Any]:
    """What every row says, whichever method made it."""
    return {
        "bits": quantized.bits,
        "group_size": quantized.group_size,
        "symmetric": quantized.symmetric,
        "seconds": round(time.perf_counter() - started, 4),
    }
