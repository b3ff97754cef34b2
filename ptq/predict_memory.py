"""What the work on one block needs in memory, from its shapes; `ptq.predict` adds what lies around it.

Linears with one input take its second moment and drift while they are calibrated, then second moment, factor and what
is left of the drift while they are solved; a block needs what the largest of these stages needs.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from ptq.calibration.capture import CHUNK_ROWS, STARVED
from ptq.config import RefineConfig
from ptq.evaluate import SEGMENT_TOKENS, chunk_on
from ptq.gptq.candidates import CHUNK_WEIGHTS as CANDIDATE_WEIGHTS
from ptq.gptq.inverse import ROWS
from ptq.gptq.outputs import BLOCK, row_blocks
from ptq.models.structure import linears
from ptq.plan import Plan, block_count, head_targets
from ptq.task import CHUNK_WEIGHTS
from ptq.walk import HELD_BYTES

FLOAT = 4  # bytes of float32
WEIGHTS = 7  # float32 matrices alive while some rows are solved for: weight, target, errors, what the search compares
ROUNDED = 4  # those alive while a weight is rounded to nearest: it, its quotients, these rounded, with zeros added
COPIES = 4  # of the weights that several candidates are solved for together: stacked, and what is made of them
# Bytes of a weight that is refined with the whole model: its code, two moments, what stands in for it on the way
# forward and back.
REFINED = 7 * FLOAT
SAVED = 9  # bytes that the way back needs, for every output of a Linear
SCORED = 6  # float32 copies of some logits: two distributions, the parent's again, how far they are apart
BACK = 4  # float32 copies of what Linears put out, while gradients go back through a block
EXIT = 6  # of the logits: themselves, probabilities and their sums, gradients
LOGITS = 4  # held at once, in the dtype of the model: of the two models, and the gradient twice


class Stage(NamedTuple):
    """Linears that are calibrated together: those with one input, or the same ones of all experts."""

    features: int  # K
    rows: list[int]  # N of each
    inputs: int  # 1, or as many as there are experts


class Block(NamedTuple):
    """The block that needs most."""

    parameters: int  # bytes
    weights: list[tuple[int, int]]  # (N, K) of the Linears to be quantized, in order
    stages: list[Stage]
    linear: int  # parameters of all Linears


def largest_block(plan: Plan) -> Block:
    """The one with most parameters."""
    found = []
    for index, module in plan.skeleton.get_submodule(plan.blocks).named_children():
        path = f"{plan.blocks}.{index}."
        names = [name for name, _ in linears(module)]
        weights = {name: plan.shapes[path + name] for name in names if path + name in plan.targets}
        total = sum(n * k for n, k in (plan.shapes[path + name] for name in names))
        found.append(Block(_bytes(module, plan), list(weights.values()), _stages(weights), total))
    return max(found, key=lambda block: (block.parameters, len(block.weights)))


def head_work(plan: Plan, *, apart: bool = False) -> dict[str, int]:
    """Bytes beside embeddings and head while a head is quantized: nothing corrects or weighs it, AWQ folds nothing in.

    Second moments do not count where they lie ``apart``; they are smaller than a block's.
    """
    weights = {name: plan.shapes[name] for name in head_targets(plan)}
    gptq = replace(plan.config.gptq, correct_inputs=0.0, gradient_tokens=0)
    alone = plan._replace(config=replace(plan.config, gptq=gptq, refine=RefineConfig()))
    moments, work = block_work(alone, Block(0, list(weights.values()), _stages(weights), 0), apart=apart)
    return work if apart else {**moments, **work}


def outer_bytes(plan: Plan) -> int:
    """Of everything but the blocks."""
    return _bytes(plan.skeleton, plan) - _bytes(plan.skeleton.get_submodule(plan.blocks), plan)


def width(plan: Plan) -> int:
    """Of the hidden states; a configuration may have another name for it, and most Linears of a block read them."""
    said = getattr(plan.hf_config.get_text_config(), "hidden_size", None)
    if said is not None:
        return int(said)
    inside = Counter(k for name, (_, k) in plan.shapes.items() if name.startswith(f"{plan.blocks}."))
    return inside.most_common(1)[0][0]


def tokens_of(plan: Plan) -> int:
    """Of the calibration text."""
    calibration = plan.config.calibration
    return calibration.samples * calibration.sequence_length if plan.config.calibrates else 0


def tokens_of_batch(plan: Plan) -> int:
    """Of the calibration sequences that run together."""
    calibration = plan.config.calibration
    return min(calibration.batch_size, calibration.samples) * calibration.sequence_length


def held_share(plan: Plan, features: int) -> float:
    """Of the passes that can wait at an input that wide."""
    needed = tokens_of(plan) * (width(plan) + features) * plan.dtype.itemsize
    return min(1.0, HELD_BYTES / max(needed, 1))


def block_work(plan: Plan, block: Block, *, apart: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes beside the weights of a block: of matrices [K, K], and of all else.

    They are those of the stage that needs most; where the two lie ``apart``, the most of each.
    """
    if not block.weights:
        return {}, {}
    largest = FLOAT * max(n * k for n, k in block.weights)
    if plan.config.method == "rtn":
        return {}, {"solver": ROUNDED * largest}
    solver = WEIGHTS * largest
    needs = []
    for stage in block.stages:
        waiting = {"waiting passes": _waiting(plan, stage)}
        calibrating = _calibrating(plan, stage), {"activations": _activations(plan, stage), **waiting}
        needs += [calibrating, (_solving(plan, stage), {"solver": _solver(plan, stage), **waiting})]
    if plan.config.method == "awq":
        moments = FLOAT * sum(stage.features**2 * stage.inputs for stage in block.stages)
        rescaled = 2 * FLOAT * max(stage.features for stage in block.stages) ** 2
        copies = {"float32 block": 2 * block.parameters * FLOAT // plan.dtype.itemsize}
        activations = max(_activations(plan, stage) for stage in block.stages)
        alone = [(moments, {"activations": activations}), (moments + rescaled, {**copies, "solver": solver})]
        needs = alone if plan.config.awq.codes == "round" else [*alone, *((m, copies | work) for m, work in needs)]
    if apart:
        moments, work = max(m for m, _ in needs), max((w for _, w in needs), key=lambda w: sum(w.values()))
    else:
        moments, work = max(needs, key=lambda need: need[0] + sum(need[1].values()))
    return {"second moments": moments}, work


def gradient_tokens(plan: Plan) -> int:
    """Tokens whose gradients are taken, in whole sequences."""
    length = plan.config.calibration.sequence_length
    return min(-(-plan.config.gptq.gradient_tokens // length) * length, tokens_of(plan))


def moment_bytes(block: Block) -> int:
    """Of what is known of the outputs of a block's Linears."""
    return FLOAT * sum((int(rows.stop) - int(rows.start)) ** 2 for n, _ in block.weights for rows in row_blocks(n))


def gradient_work(plan: Plan, block: Block) -> dict[str, int]:
    """Bytes of the pass for gradients, beside the process, on the device that computes: one sequence, in float32."""
    length = min(plan.config.calibration.sequence_length, tokens_of(plan))
    wider = FLOAT // plan.dtype.itemsize
    exit_ = {
        "embeddings and head": outer_bytes(plan) * wider,
        "logits": EXIT * FLOAT * length * vocabulary(plan),
    }
    through = {
        "float32 block": block.parameters * wider,
        "activations": BACK * FLOAT * length * (_outputs(plan, block) + width(plan)),
        "moments of outputs": moment_bytes(block),
    }
    return max(exit_, through, key=lambda parts: sum(parts.values()))


def _outputs(plan: Plan, block: Block) -> int:
    """Of a block's Linears for one token; of experts those that it is routed to."""
    routed = getattr(plan.hf_config.get_text_config(), "num_experts_per_tok", None)
    return sum(sum(stage.rows) * min(stage.inputs, routed or stage.inputs) for stage in block.stages)


def model_work(plan: Plan, block: Block) -> dict[str, int]:
    """Bytes of the refinement of a whole model, beside the process; the blocks are taken to be like ``block``."""
    parameters, tokens = _bytes(plan.skeleton, plan), tokens_of_batch(plan)
    outputs = block_count(plan) * sum(n for n, _ in block.weights)
    return {
        "parent": parameters,
        "float32 copy": parameters * FLOAT // plan.dtype.itemsize,
        "refined weights": REFINED * sum(n * k for n, k in (plan.shapes[name] for name in plan.targets)),
        "activations": SAVED * tokens * outputs,
        "logits": LOGITS * plan.dtype.itemsize * tokens * vocabulary(plan),
    }


def evaluation_work(plan: Plan) -> dict[str, int]:
    """Bytes of the evaluation after the solve, beside the process, while the models' first logits are compared."""
    settings = plan.config.evaluation
    if settings is None:
        return {}
    models = 3 if plan.config.solves_with_text else 2  # the parent, that rounded to nearest, the result
    logits = min(settings.window, settings.tokens) * vocabulary(plan)
    return {
        "embeddings and heads": 2 * outer_bytes(plan),  # what is rounded shares the parent's
        "hidden states": models * min(settings.tokens, SEGMENT_TOKENS) * width(plan) * plan.dtype.itemsize,
        "logits": models * plan.dtype.itemsize * logits + SCORED * FLOAT * min(logits, chunk_on(plan.device)),
    }


def vocabulary(plan: Plan) -> int:
    """Tokens that a logit is computed for; no matrix beside the blocks has more rows than embeddings and head."""
    said = getattr(plan.hf_config.get_text_config(), "vocab_size", None)
    if said is not None:
        return int(said)
    beside = (p for name, p in plan.skeleton.named_parameters() if not name.startswith(f"{plan.blocks}."))
    return max((p.shape[0] for p in beside if p.dim() == 2), default=0)


def _bytes(module: nn.Module, plan: Plan) -> int:
    return sum(p.numel() for p in module.parameters()) * plan.dtype.itemsize


def _stages(weights: Mapping[str, tuple[int, int]]) -> list[Stage]:
    """Linears beside each other that are as wide are taken to read the same input."""
    found: dict[tuple[str, int], dict[str, list[int]]] = {}
    for name, (n, k) in weights.items():
        parent = name.rpartition(".")[0]
        found.setdefault((re.sub(r"\d+", "*", parent), k), {}).setdefault(parent, []).append(n)
    return [Stage(k, next(iter(parents.values())), len(parents)) for (_, k), parents in found.items()]


def _drifts(plan: Plan, stage: Stage) -> bool:
    return plan.config.follows_float and stage.inputs == 1  # experts are not corrected


def _calibrating(plan: Plan, stage: Stage) -> int:
    starved = stage.inputs > 1 and tokens_of(plan) / stage.inputs < stage.features / STARVED
    return FLOAT * stage.features**2 * stage.inputs * (2 if starved or _drifts(plan, stage) else 1)


def _solving(plan: Plan, stage: Stage) -> int:
    left = min(sum(stage.rows), stage.features) * stage.features if _drifts(plan, stage) else 0
    return FLOAT * (stage.features**2 * (stage.inputs + 1) + left)


def _solver(plan: Plan, stage: Stage) -> int:
    largest = max(stage.rows) * stage.features
    rows = min(largest, CHUNK_WEIGHTS)
    copies = COPIES * min(plan.config.gptq.candidates * rows, CANDIDATE_WEIGHTS)
    tiles = 2 * ROWS * stage.features
    # By parts: the target that moves and what its codes give; what is known of the outputs, and its factors.
    outputs = 2 * (rows + max(stage.rows) * BLOCK) if gradient_tokens(plan) else 0
    return FLOAT * (WEIGHTS * rows + copies + tiles + outputs) + 2 * largest  # codes, and those of plain rounding


def _waiting(plan: Plan, stage: Stage) -> int:
    """Of passes that go on once a Linear is quantized: the residual and what the Linear reads."""
    held = min(HELD_BYTES, tokens_of(plan) * (width(plan) + stage.features) * plan.dtype.itemsize)
    return held * (2 if plan.config.follows_float else 1)


def _activations(plan: Plan, stage: Stage) -> int:
    tokens = tokens_of_batch(plan)
    passing = tokens * (6 * width(plan) + 4 * stage.features) * plan.dtype.itemsize
    return passing + min(tokens, CHUNK_ROWS) * stage.features * FLOAT * (3 if _drifts(plan, stage) else 1)
