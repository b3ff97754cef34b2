"""Several checkpoints of one parent side by side: size, perplexity, KL divergence, and what each layer loses.

A layer's loss is measured the same way for every checkpoint that can be read, whoever wrote it: the layer runs on the
hidden states that the parent has there, and the share of its change of them that comes out differently is the loss,
``|B_q(h) - B(h)|^2 / |B(h) - h|^2``. So it also holds where scales were folded into norms, which leaves no weights to
compare.
"""

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptq.calibration.data import evaluation_windows
from ptq.config import EvaluationConfig
from ptq.errors import ConfigError
from ptq.evaluate import Metrics, compare, streamed
from ptq.evaluation import check_vocabulary
from ptq.inspection import packed_bits
from ptq.models.loading import load_tokenizer
from ptq.nn.linear import QuantLinear
from ptq.plan import check_context, resolve_device
from ptq.report import read_report, table
from ptq.runtime import Checkpoint, open_checkpoint, open_stream

COLUMNS = {"megabytes": ".1f", "bits": ".3f", "perplexity": ".3f", "kl": ".5f", "top1": ".2%", "worst_layer": ".2e"}
# Tokens on which the layers' losses are measured.
LAYER_TOKENS = 2048
PARENT = "parent"


class Opened(NamedTuple):
    """The parent and the checkpoints to compare with it, by the names they are shown under."""

    parent: Checkpoint
    others: dict[str, Checkpoint]
    device: torch.device


def open_all(paths: Sequence[str], parent: str, *, device: str, dtype: str, trust_remote_code: bool) -> Opened:
    """Open checkpoints without reading weights.

    Raises:
        ConfigError: a model is not there, is named twice, or has another vocabulary or depth than the parent.
        FormatError: damaged files, or a quantization this project cannot read.
    """
    target = resolve_device(device)
    opened = open_checkpoint(parent, dtype=dtype, trust_remote_code=trust_remote_code)
    others = {}
    for name, path in short_names(paths).items():
        others[name] = open_checkpoint(path, dtype=dtype, trust_remote_code=trust_remote_code)
        check_vocabulary(opened, others[name])
        depths = [len(list(each.model.get_submodule(each.blocks).children())) for each in (opened, others[name])]
        if depths[0] != depths[1]:
            raise ConfigError(
                f"a checkpoint must have its parent's layers; {path} has {depths[1]} and {parent} {depths[0]}: name "
                "the model the checkpoints were made from"
            )
    return Opened(opened, others, target)


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Each path under its last component, or under as much of it as tells it from the others.

    Raises:
        ConfigError: a path given twice.
    """
    parts = {path: Path(path).resolve().parts if Path(path).is_dir() else tuple(path.split("/")) for path in paths}
    if len(set(parts.values())) < len(paths):
        raise ConfigError(f"each checkpoint must be named once, found {', '.join(paths)}; remove the one named twice")
    names: dict[str, str] = {}
    for path, own in parts.items():
        others = [other for key, other in parts.items() if key != path]
        length = next(n for n in range(1, len(own) + 1) if all(o[-n:] != own[-n:] for o in others))
        name = "/".join(own[-length:])
        names[name if name != PARENT else f"{name} (checkpoint)"] = path
    return names


def compare_checkpoints(
    paths: Sequence[str],
    parent: str,
    settings: EvaluationConfig,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Compare checkpoints with the parent they were made from; the parent runs once, whatever their number.

    Returns:
        Plain values: ``models`` (name to size, bits, perplexity, KL, top-1 agreement), ``layers`` (name to the loss of
        every layer), ``reported`` (name to the losses of every Linear in its ``report.json``), and the protocol:
        ``layer_tokens`` are those the layers ran on, one that overlapping windows share counted in each.

    Raises:
        ConfigError: as `open_all`, or a model's context is below the window.
        FormatError: as `open_all`, or a checkpoint's report is none (`read_report`).
        DataError: the text is unreadable or too short.
    """
    opened = open_all(paths, parent, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    for each in (opened.parent, *opened.others.values()):
        check_context(each.hf_config, "--window", settings.window)
    reported = {name: _reported(each.directory) for name, each in opened.others.items()}
    tokenizer = load_tokenizer(opened.parent.directory, trust_remote_code)
    others = {name: streamed(open_stream(each, opened.device)) for name, each in opened.others.items()}
    metrics = compare(
        streamed(open_stream(opened.parent, opened.device)), others, evaluation_windows(settings, tokenizer)
    )
    count = max(1, LAYER_TOKENS // settings.window)
    windows = [window.tokens for window in islice(evaluation_windows(settings, tokenizer), count)]
    layers = layer_losses(opened, [tokens[None] for tokens in windows])
    rows = {PARENT: _row(opened.parent, metrics[PARENT], [])}
    rows |= {name: _row(each, metrics[name], layers[name]) for name, each in opened.others.items()}
    text = list(settings.source.files) or settings.source.name
    return {
        "parent": parent,
        "text": text,
        "window": settings.window,
        "stride": settings.stride,
        "tokens": metrics[PARENT].tokens,
        "layer_tokens": sum(len(tokens) for tokens in windows),
        "models": rows,
        "layers": layers,
        "reported": reported,
    }


def _row(opened: Checkpoint, metrics: Metrics, layers: Sequence[float]) -> dict[str, Any]:
    packed = [m for m in opened.model.modules() if isinstance(m, QuantLinear)]
    weights = sum(m.in_features * m.out_features for m in packed)
    return {
        "directory": str(opened.directory),
        "megabytes": sum(opened.reader.files().values()) / 1e6,
        "bits": packed_bits(opened) / weights if weights else None,
        "perplexity": metrics.perplexity,
        "kl": metrics.kl,
        "top1": metrics.top1,
        "worst_layer": max(layers) if layers else None,
    }


def _reported(directory: Path) -> dict[str, float]:
    """Relative loss of each Linear on the calibration text, as its own run has it, where there is a report.

    Runs with another method or `gptq.correct_inputs` have another target in it (`ptq.task.Solved`).
    """
    file = directory / "report.json"
    rows: Mapping[str, Mapping[str, Any]] = read_report(file).get("modules", {}) if file.is_file() else {}
    return {name: row["relative_loss"] for name, row in rows.items() if row.get("relative_loss") is not None}


@torch.no_grad()
def layer_losses(opened: Opened, batches: Sequence[Tensor]) -> dict[str, list[float]]:
    """Loss of every layer of every checkpoint on the parent's hidden states; the parent's layers run once.

    Args:
        opened: parent and checkpoints.
        batches: tokens ``int64 [B, T]``.
    """
    parent = open_stream(opened.parent, opened.device)
    streams = {name: open_stream(each, opened.device) for name, each in opened.others.items()}
    hidden = parent.enter(batches)
    for stream in streams.values():
        stream.enter(batches)  # so that each has its masks and rotary tables, in its own dtype
    losses: dict[str, list[float]] = {name: [] for name in streams}
    for index in range(len(parent.blocks)):
        with parent.block(index):
            outputs = [parent.run_block(index, i, h).cpu() for i, h in enumerate(hidden)]
        energy = sum(_squares(out, h) for out, h in zip(outputs, hidden, strict=True))
        for name, stream in streams.items():
            own = [h.to(opened.others[name].dtype) for h in hidden]
            with stream.block(index):
                found = [stream.run_block(index, i, h).cpu() for i, h in enumerate(own)]
            error = sum(_squares(out, expected) for out, expected in zip(found, outputs, strict=True))
            losses[name].append(error / energy if energy > 0 else 0.0)
        hidden = outputs
    return losses


def _squares(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).square().sum(dtype=torch.float64))


def show(document: Mapping[str, Any]) -> str:
    """A comparison as a table with its protocol."""
    said = (
        f"{document['tokens']} tokens, window {document['window']}, stride {document['stride']}; KL divergence to the "
        f"parent in nats a token, top-1 agreement with it; worst layer: its relative error on the parent's hidden "
        f"states, {document['layer_tokens']} tokens"
    )
    return f"{table(document['models'], COLUMNS)}\n{said}"
