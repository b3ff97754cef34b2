"""How long the stages of a run will take, from the shapes of a model and from rates that are measured for a moment.

Every stage is counted in operations of two kinds, each with a rate of its own: those of large matrix products, in
float32 or in the model's dtype, and those on single elements, which wait for memory or for their own latency. What is
counted per element was fitted to runs of small and of wide models on a CPU (docs/performance.md says how well).
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ptq.awq.solver import CONFIRMED, CONFIRMED_ROWS, SCREENED_ROWS
from ptq.gptq.columns import columns_library
from ptq.gptq.outputs import BLOCK, PART
from ptq.grid_search import COARSE, REFITS, SHRINKS
from ptq.half_products import fast_half_products
from ptq.loss import multiplied
from ptq.plan import Plan, block_count
from ptq.predict_memory import (
    FLOAT,
    Block,
    Stage,
    gradient_tokens,
    held_share,
    moment_bytes,
    tokens_of,
    tokens_of_batch,
    vocabulary,
    width,
)

# What the products of a stage reach, as a share of the rate of a product of 1024 x 1024 (the larger ones are faster).
FORWARD, HESSIAN, FACTOR, COLUMNS = 0.8, 0.4, 1.0, 1.1
# Operations on an element: of what a Linear puts out, of a token's row of attention, of an input of a Linear; of a
# weight for every candidate scale, by torch and in the C++ library, for every column of a block, and for all else; of
# a weight and of a logit in a step of refinement.
OUTPUT, ATTENTION, INPUT = 12, 9, 8
CANDIDATE, COMPILED_CANDIDATE, COLUMN, WEIGHT, REFINED, LOGIT = 22, 4, 0.86, 800, 200, 60
GROUPED = 0.2  # as COLUMNS, of the many small products with the Hessian's diagonal blocks
JUDGE = 0.002  # seconds that every look at a candidate for AWQ's scales takes, however small
LINEAR = (
    0.012  # seconds for every Linear, or part of one that is solved by itself, however small: calls, bookkeeping, files
)
SAMPLE = 0.05  # seconds that a rate is measured for,
TIMES = 5  # and how often at least
REPEATS = 16  # of a short operation that is timed


class Rates(NamedTuple):
    """What a machine does in a second."""

    products: float  # operations of a float32 matrix product
    native: float  # of one in the model's dtype
    elements: float  # operations on single float32 elements
    disk: float  # bytes written


def measure_rates(device: torch.device, directory: Path, dtype: torch.dtype = torch.float32) -> Rates:
    """Time products and an operation on elements, once in a process, and a write of 8 MiB, or of half of what is free.

    Args:
        device: where the run will be.
        directory: existing, on the disk of the run.
        dtype: of the model.
    """
    size = max(1, min(8 * 1024**2, shutil.disk_usage(directory).free // 2))
    try:
        written = _written_a_second(directory, size)
    except OSError:  # of a quota or a limit, about which that size tells nothing: the run may need less
        written = _written_a_second(directory, min(size, 4096))
    return Rates(*computing_rates(device, dtype, torch.get_num_threads()), written)


def _written_a_second(directory: Path, size: int) -> float:
    started = time.perf_counter()
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(bytes(size))
        file.flush()
        os.fsync(file.fileno())
    return size / (time.perf_counter() - started)


@lru_cache
def computing_rates(device: torch.device, dtype: torch.dtype, threads: int) -> tuple[float, float, float]:
    """Of ``Rates`` all but the disk's; ``threads`` is how many torch has now. A sweep makes many runs in a process."""
    a = torch.randn(1024, 1024, device=device)
    b, row = a.to(dtype), torch.randn(1 << (14 if device.type == "cpu" else 22), device=device)
    products = 2 * 1024**3 * _a_second(lambda: a @ a)
    with fast_half_products(device):
        native = products if dtype == torch.float32 else 2 * 1024**3 * _a_second(lambda: linear(b, b))
    # Elements, on a CPU, are so few that one thread does it alone and they stay in its cache.
    workers = threads if device.type == "cpu" else 1
    elements = workers * REPEATS * len(row) * _a_second(lambda: [row.mul_(1.0) for _ in range(REPEATS)][-1])
    return products, native, elements


def _a_second(work: Callable[[], Tensor]) -> float:
    """How often it can be done in a second, by the fastest time: what else runs on the machine only ever slows it.

    The first times are no measure where threads, tables and memory are made for them: they can take ten times as long.
    """
    times: list[float] = []
    while sum(times) < SAMPLE or len(times) < TIMES:
        started = time.perf_counter()
        float(work().flatten()[0])  # waits for a GPU
        times.append(time.perf_counter() - started)
    return 1 / min(times)


def seconds_of(
    plan: Plan, block: Block, rates: Rates, disk: Mapping[str, int], journal_share: float
) -> dict[str, float]:
    """By stage, of all blocks; ``block`` is the largest, and the others are taken to be like it.

    ``disk``: bytes by kind; of the journal's, ``journal_share`` is written after each block.
    """
    blocks = block_count(plan)
    written: float = disk["output"] * 2 + disk.get("refined weights", 0)
    written += blocks * disk["journal of hidden states"] * journal_share
    found = {
        "forward passes": blocks * _forward(plan, block, rates, _passes(plan, block)),
        "Hessians": blocks * _hessians(plan, block, rates),
        "factorizations": blocks * _factors(plan, block, rates),
        "codes": blocks * _codes(plan, block, rates),
        "disk": written / rates.disk,
    }
    if plan.config.gptq.gradient_tokens:
        found["gradients"] = _gradients(plan, block, rates, blocks)
    if plan.config.refine.steps:
        found["refinement"] = blocks * _refinement(plan, block, rates)
    if plan.config.refine.model_steps:
        found["refinement of the model"] = _model_refinement(plan, block, rates, blocks)
    return found


def _streams(plan: Plan) -> int:
    return 2 if plan.config.follows_float else 1


def _passes(plan: Plan, block: Block) -> float:
    """Of all tokens through a block: one, and what has to start over because no more passes can wait."""
    if plan.config.method == "rtn":
        return 0
    if plan.config.method == "awq" and plan.config.awq.codes == "round":
        return 2  # statistics, then the inputs of the next block
    again = sum(1 - held_share(plan, stage.features) for stage in block.stages) / 2
    return (1 + again) * _streams(plan) + (1 if plan.config.method == "awq" else 0)


def _forward(plan: Plan, block: Block, rates: Rates, passes: float, share: float = 1.0) -> float:
    """Passes of a share of the tokens."""
    tokens, length = tokens_of(plan) * share, plan.config.calibration.sequence_length
    heads = getattr(plan.hf_config.get_text_config(), "num_attention_heads", 1) or 1
    operations = 2 * tokens * (block.linear + 2 * length * width(plan))
    elements = tokens * (OUTPUT * sum(n for n, _ in block.weights) + ATTENTION * heads * length / 2)
    return passes * (operations / (FORWARD * rates.native) + elements / rates.elements)


def _hessians(plan: Plan, block: Block, rates: Rates) -> float:
    if plan.config.method == "rtn":
        return 0
    tokens = tokens_of(plan)
    moments = [(s.features, _streams(plan) if s.inputs == 1 else 1) for s in block.stages]
    operations = sum(2 * tokens * k**2 * count for k, count in moments)
    elements = INPUT * sum(tokens * k * count for k, count in moments)
    # float32 products, for which the units of the model's dtype are used where they are there (capture.exact_products)
    return operations / (HESSIAN * max(rates.native, rates.products)) + elements / rates.elements


def _factors(plan: Plan, block: Block, rates: Rates) -> float:
    if not plan.config.solves_for_codes:
        return 0
    return sum(_factor(stage, _streams(plan) > 1) for stage in block.stages) / (FACTOR * rates.products)


def _factor(stage: Stage, drifts: bool) -> float:
    """Operations for the factors of a stage's inputs and the correction of its weights."""
    k, n = stage.features, sum(stage.rows)
    corrected = 2 * k * k * (min(n, k) + n) if drifts and stage.inputs == 1 else 0
    return stage.inputs * 2 / 3 * k**3 + corrected


def _codes(plan: Plan, block: Block, rates: Rates) -> float:
    """Grids, codes and what they lose."""
    weights = sum(n * k for n, k in block.weights)
    squares = sum(n * k * k for n, k in block.weights)
    loss = sum(2 * n * k * multiplied(k) for n, k in block.weights)
    products, candidates, columns = 0.0, 0.0, 0.0
    if plan.config.solves_for_codes:
        settings = plan.config.gptq
        # Half of all columns are still to come when a block is done; descent multiplies by all of H.
        products += squares * (settings.candidates + 2 * settings.sweeps) + 3 * loss
        columns += weights * (settings.candidates + settings.sweeps) * settings.block_size / 2
        candidates += weights * (2 * len(SHRINKS) + REFITS)
    if plan.config.method == "awq":
        products += 4 * loss  # of codes and rounding, each beside the energy of the weight
    elements = _candidate(plan) * candidates + COLUMN * columns + WEIGHT * weights
    solving = products / (COLUMNS * rates.products) + elements / rates.elements + LINEAR * _solves_of(plan, block)
    return solving + (_awq_search(plan, block, rates) if plan.config.method == "awq" else 0)


def _solves_of(plan: Plan, block: Block) -> int:
    """How often codes are chosen: for every Linear once, or for every part of its rows."""
    if not plan.config.gptq.gradient_tokens:
        return len(block.weights)
    return sum(-(-min(n, BLOCK) // PART) for n, _ in block.weights)


def _candidate(plan: Plan) -> float:
    """Operations on a weight for every candidate scale that is judged by the diagonal of a Hessian."""
    return COMPILED_CANDIDATE if plan.device.type == "cpu" and columns_library() else CANDIDATE


def _awq_search(plan: Plan, block: Block, rates: Rates) -> float:
    """Channel scales, judged on some rows of each weight; then ranges of all, whose errors are weighed by group."""
    tried, products, judged, clipped = 2 * plan.config.awq.grid, 0.0, 0.0, 0.0
    for n, k in block.weights:
        rows = tried * min(n, SCREENED_ROWS) + (CONFIRMED + 1) * min(n, CONFIRMED_ROWS)
        products += 2 * rows * k * multiplied(k)
        judged += rows * k * (2 * len(COARSE) + REFITS)
        clipped += n * k * (2 * len(SHRINKS) + REFITS)
    group = plan.config.group_size if plan.config.group_size > 0 else max(k for _, k in block.weights)
    grouped = 2 * group * clipped / (GROUPED * rates.products)
    elements = _candidate(plan) * judged + CANDIDATE * clipped
    calls = JUDGE * len(block.weights) * (tried + CONFIRMED + 1)
    return products / (COLUMNS * rates.products) + grouped + elements / rates.elements + calls


def _gradients(plan: Plan, block: Block, rates: Rates, blocks: int) -> float:
    """Of some tokens, in float32: there, there again, and back at twice the price; what they say of the outputs."""
    tokens = gradient_tokens(plan)
    exact = rates._replace(native=rates.products)
    products = 3 * 2 * tokens * vocabulary(plan) * width(plan) / (FORWARD * rates.products)
    products += blocks * 2 * tokens * moment_bytes(block) / FLOAT / (HESSIAN * rates.products)
    logits = LOGIT * tokens * vocabulary(plan) / rates.elements
    return blocks * _forward(plan, block, exact, 4, tokens / tokens_of(plan)) + products + logits


def _refinement(plan: Plan, block: Block, rates: Rates) -> float:
    """Steps on one batch each, forward and back, and three passes of everything in float32."""
    steps, calibration = plan.config.refine.steps, plan.config.calibration
    share = min(1.0, calibration.batch_size / calibration.samples)
    exact = rates._replace(native=rates.products)
    on_weights = steps * REFINED * sum(n * k for n, k in block.weights) / rates.elements
    return _forward(plan, block, rates, 3 * steps, share) + _forward(plan, block, exact, 3) + on_weights


def _model_refinement(plan: Plan, block: Block, rates: Rates, blocks: int) -> float:
    """Steps on one batch each: the parent, the student, and the way back at twice its price."""
    steps, tokens = plan.config.refine.model_steps, tokens_of_batch(plan)
    share, logits = tokens / tokens_of(plan), tokens * vocabulary(plan)
    head = 4 * 2 * logits * width(plan) / (FORWARD * rates.native) + LOGIT * logits / rates.elements
    on_weights = REFINED * blocks * sum(n * k for n, k in block.weights) / rates.elements
    return steps * (blocks * _forward(plan, block, rates, 4, share) + head + on_weights)
