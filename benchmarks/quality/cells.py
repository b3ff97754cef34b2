"""What is compared, as data: how weights are stored (cells) and who quantizes them how (rows)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

OURS = "ptq"


class Cell(NamedTuple):
    """One way to store weights."""

    bits: int
    group_size: int
    symmetric: bool

    @property
    def name(self) -> str:
        """For example ``4-bit g128 sym``."""
        return f"{self.bits}-bit g{self.group_size} {'sym' if self.symmetric else 'asym'}"


class Row(NamedTuple):
    """One way to choose the codes.

    ``options`` are keys of the configuration for ptq (as ``--set`` takes them) and arguments of the driver in
    ``drivers/`` for the others. ``seeded``: whether the result depends on the calibration text. ``note``: what a reader
    of the table must know.
    """

    tool: str
    label: str
    method: str
    options: Mapping[str, Any] = {}
    seeded: bool = True
    note: str = ""


CELLS = (
    Cell(4, 128, True),
    Cell(4, 128, False),
    Cell(4, 32, True),
    Cell(3, 128, True),
    Cell(2, 64, False),
    Cell(2, 64, True),
)
QUICK_CELLS = (Cell(4, 128, True), Cell(3, 128, True))
SEEDS = (0, 1)

# Settings that are not named here are each tool's defaults.
ROWS = (
    Row(OURS, "RTN", "rtn", seeded=False),
    Row(OURS, "GPTQ", "gptq"),
    Row(OURS, "AWQ", "awq"),
    Row(OURS, "AWQ+GPTQ", "awq", {"awq.codes": "gptq"}),
    Row(OURS, "GPTQ, gradients", "gptq", {"gptq.gradient_tokens": 32768}, note="rows make up for each other's errors"),
    Row(OURS, "GPTQ, blocks refined", "gptq", {"refine.steps": 60}, note="60 gradient steps a block"),
    Row(OURS, "GPTQ, refined", "gptq", {"refine.model_steps": 100}, note="100 gradient steps on the whole model"),
    Row("llm-compressor", "RTN", "rtn", seeded=False),
    Row("llm-compressor", "GPTQ", "gptq"),
    Row("llm-compressor", "GPTQ, MSE observer", "gptq", {"weights": {"observer": "memoryless_mse"}}),
    Row("llm-compressor", "AWQ", "awq", note="patched: it pins memory, which torch refuses without an accelerator"),
    Row("llm-compressor", "AWQ+GPTQ", "awq+gptq", note="patched as AWQ"),
    Row("GPTQModel", "RTN", "rtn", seeded=False),
    Row("GPTQModel", "GPTQ", "gptq"),
    Row("GPTQModel", "GPTQ, desc_act", "gptq", {"desc_act": True}, note="needs a permutation at run time"),
    Row("GPTQModel", "GPTQ, mse 2.4", "gptq", {"mse": 2.4}),
    Row("GPTQModel", "GPTAQ", "gptq", {"gptaq": True}),
    Row("GPTQModel", "AWQ", "awq", note="with its AWQ_TORCH backend; its default backend refuses to run without CUDA"),
    Row("AutoRound", "RTN, searched", "rtn"),
    Row("AutoRound", "AWQ", "awq"),
    Row("AutoRound", "200 steps", "autoround", {"iters": 200}),
)


def format_of(cell: Cell) -> str:
    """The checkpoint format ptq writes a cell in: with GPTQ v1 only symmetric weights can be stored."""
    return "gptq" if cell.symmetric else "gptq_v2"
