"""Evaluation of checkpoints on disk, block by block: at the end of a run, and for ``ptq eval``."""

from pathlib import Path
from typing import Any

from torch import nn

from ptq.calibration.data import evaluation_windows
from ptq.config import EvaluationConfig
from ptq.errors import ConfigError
from ptq.evaluate import Metrics, Scorer, compare, streamed
from ptq.models.loading import load_tokenizer
from ptq.models.structure import linears, set_weight, weight_of
from ptq.nn.kernels import kernels_to_come
from ptq.plan import Plan, check_context, resolve_device
from ptq.report import table
from ptq.rtn import rtn_solve
from ptq.runtime import Checkpoint, open_checkpoint, open_stream

COLUMNS = {"perplexity": ".3f", "kl": ".5f", "top1": ".2%", "megabytes": ".1f"}


def require_text(plan: Plan) -> None:
    """Raise DataError where there is too little text to evaluate on, which no run should learn after hours."""
    if plan.config.evaluation is not None:
        tokenizer = load_tokenizer(plan.directory, plan.config.trust_remote_code)
        for _ in evaluation_windows(plan.config.evaluation, tokenizer):
            pass


def evaluate_run(plan: Plan, output: Path) -> dict[str, Any]:
    """Metrics of the parent, of its weights rounded to nearest, and of the checkpoint just written."""
    settings = plan.config.evaluation
    assert settings is not None

    def opened(path: Path) -> Checkpoint:
        return open_checkpoint(path, dtype=plan.config.dtype, trust_remote_code=plan.config.trust_remote_code)

    def rounded(block: nn.Module, path: str) -> None:
        for name, module in linears(block):
            scheme = plan.targets.get(f"{path}.{name}")
            if scheme is not None:
                quantized = rtn_solve(weight_of(module), scheme, scale_dtype=plan.dtype)
                set_weight(module, quantized.dequantize())

    parent, result = open_stream(opened(plan.directory), plan.device), opened(output)
    others: dict[str, Scorer] = {}
    if plan.config.solves_with_text:
        others["round-to-nearest"] = streamed(parent, rounded)  # with the parent's embeddings and head
    others["result"] = streamed(open_stream(result, plan.device))
    tokenizer = load_tokenizer(plan.directory, plan.config.trust_remote_code)
    metrics = compare(streamed(parent), others, evaluation_windows(settings, tokenizer))
    sizes = {"parent": plan.reader.files(), "result": result.reader.files()}
    return _document(settings, metrics, {name: sum(files.values()) for name, files in sizes.items()})


def kernels_of(plan: Plan, evaluated: dict[str, str]) -> dict[str, dict[str, str]]:
    """For a report: the kernels that ``evaluated``, from the words of the file, and those that `ptq.load` takes.

    The latter are of the device of the run, which is known to be there and to be free.
    """
    # The fastest kernel's layout is worth its making where a model stays in memory, not for blocks that come and go.
    weights = ((scheme, plan.shapes[path]) for path, scheme in plan.targets.items())
    return {"evaluation": evaluated, "ptq.load": kernels_to_come(weights, plan.device)}


def evaluate_checkpoint(
    checkpoint: str,
    parent: str | None,
    settings: EvaluationConfig,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Metrics of a checkpoint, against its parent where one is named.

    ``dtype`` is that of the activations and of what is not packed: float32 takes the rounding of half precision out of
    the comparison.

    Raises:
        ConfigError: a model is not there, the two do not share a vocabulary, or a context is below the window.
        DataError: the text is unreadable or too short.
    """
    target = resolve_device(device)
    opened = {"result": open_checkpoint(checkpoint, dtype=dtype, trust_remote_code=trust_remote_code)}
    if parent is not None:
        opened = {"parent": open_checkpoint(parent, dtype=dtype, trust_remote_code=trust_remote_code), **opened}
        check_vocabulary(opened["parent"], opened["result"])
    for each in opened.values():
        check_context(each.hf_config, "--window", settings.window)
    first = next(iter(opened.values()))
    scorers = {name: streamed(open_stream(each, target)) for name, each in opened.items()}
    windows = evaluation_windows(settings, load_tokenizer(first.directory, trust_remote_code))
    reference, *rest = scorers
    metrics = compare(scorers[reference], {name: scorers[name] for name in rest}, windows, name=reference)
    return _document(settings, metrics, {name: sum(each.reader.files().values()) for name, each in opened.items()})


def check_vocabulary(parent: Checkpoint, result: Checkpoint) -> None:
    """Raise ConfigError where a checkpoint cannot come from a parent because their vocabularies differ in size."""
    sizes = [getattr(each.hf_config.get_text_config(), "vocab_size", None) for each in (parent, result)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"a checkpoint and its parent must share a vocabulary; {parent.directory} has {sizes[0]} tokens and "
            f"{result.directory} {sizes[1]}: name the model the checkpoint was made from"
        )


def _document(settings: EvaluationConfig, metrics: dict[str, Metrics], sizes: dict[str, int]) -> dict[str, Any]:
    rows: dict[str, dict[str, Any]] = {}
    for name, m in metrics.items():
        rows[name] = {"perplexity": m.perplexity, "kl": m.kl, "top1": m.top1}
        if name in sizes:
            rows[name]["megabytes"] = sizes[name] / 1e6
    text = list(settings.source.files) or settings.source.name
    tokens = next(iter(metrics.values())).tokens
    return {"text": text, "window": settings.window, "stride": settings.stride, "tokens": tokens, "models": rows}


def show(document: dict[str, Any]) -> str:
    """An evaluation as a table with its protocol."""
    lines = [
        table(document["models"], COLUMNS),
        f"{document['tokens']} tokens, window {document['window']}, stride {document['stride']}",
    ]
    if any(row["kl"] is not None for row in document["models"].values()):
        lines[-1] += "; KL divergence to the parent in nats a token, top-1 agreement with it"
    return "\n".join(lines)
