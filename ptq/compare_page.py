"""A comparison of checkpoints on disk: ``compare.json``, one self-contained ``compare.html``, and ``compare.png``."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from ptq.formats.staging import atomic_write_text, json_text
from ptq.page import Series, chart, folded, number, page, paragraph, section, table

Document = Mapping[str, Any]
FILES = ("compare.json", "compare.html", "compare.png")


def write_comparison(document: Document, directory: Path) -> list[str]:
    """Write a comparison's files; the plot needs matplotlib.

    Returns:
        What to tell the person: the files written, and how to get the one that was not.
    """
    directory.mkdir(parents=True, exist_ok=True)
    atomic_write_text(directory / "compare.json", json_text(document))
    atomic_write_text(directory / "compare.html", comparison_page(document))
    said = [f"comparison  {directory / 'compare.html'}", f"figures     {directory / 'compare.json'}"]
    if find_spec("matplotlib") is None:
        return [*said, "compare.png was not written, which needs matplotlib: pip install matplotlib"]
    draw(document, directory / "compare.png")
    return [*said, f"plot        {directory / 'compare.png'}"]


def comparison_page(document: Document) -> str:
    """The page: figures, size against quality, loss by layer."""
    models = document["models"]
    rows = [
        [name, f"{row['megabytes']:.1f}", number(row["bits"], ".3f"), f"{row['perplexity']:.3f}",
         number(row["kl"], ".5f"), number(row["top1"], ".2%"), number(row["worst_layer"], ".2e")]
        for name, row in models.items()
    ]  # fmt: skip
    head = ["", "megabytes", "bits a weight", "perplexity", "KL", "same top token", "worst layer"]
    text = document["text"] if isinstance(document["text"], str) else ", ".join(document["text"])
    said = (
        f"{document['tokens']} tokens of {text}, window {document['window']}, stride {document['stride']}. KL is the "
        "divergence to the parent in nats a token. Bits a weight are those of the quantized Linears, scales and zeros "
        "included; megabytes are those of the whole checkpoint."
    )
    others = {name: row for name, row in models.items() if row["kl"] is not None}
    parent = {name: row for name, row in models.items() if row["kl"] is None}  # last: it must not shift the colours
    lines = [Series(name, list(enumerate(losses))) for name, losses in document["layers"].items()]
    layers = (
        f"Each layer runs on the parent's hidden states ({document['layer_tokens']} tokens); the loss is the share of "
        "its change of them that comes out differently. It is measured alike for every checkpoint, whoever made it."
    )
    parts = [
        section("Figures", table(head, rows), paragraph(said, note=True)),
        section("Size and KL divergence", _against_size(others, "kl", "KL divergence", log=True)),
        section("Size and perplexity", _against_size(others | parent, "perplexity", "perplexity", log=False)),
        section("Loss by layer", chart(lines, x="layer", y="relative error", log=True, whole=True),
                paragraph(layers, note=True)),
        _reported(document["reported"]),
    ]  # fmt: skip
    return page(f"Checkpoints of {document['parent']}", "A comparison by ptq.", [part for part in parts if part])


def _against_size(models: Mapping[str, Mapping[str, Any]], key: str, name: str, *, log: bool) -> str:
    points = [Series(label, [(row["megabytes"], row[key])], False, label) for label, row in models.items()]
    return chart(points, x="megabytes", y=name, log=log)


def _reported(reported: Mapping[str, Mapping[str, float]]) -> str:
    """The solvers' own losses, by kind of Linear, of the checkpoints that came with a report."""
    kinds: dict[str, dict[str, list[float]]] = {}
    for name, losses in reported.items():
        for module, loss in losses.items():
            kinds.setdefault(module.rpartition(".")[2], {}).setdefault(name, []).append(loss)
    if not kinds:
        return ""
    names = [name for name, losses in reported.items() if losses]
    rows = [[kind, *(f"{fmean(found[n]):.2e}" if n in found else "" for n in names)] for kind, found in kinds.items()]
    said = (
        "Mean relative output error on each checkpoint's own calibration text, from its report.json; to be compared "
        "between runs of one method and gptq.correct_inputs, for these say what the error is measured against."
    )
    shown = folded("as the solvers report them", table(["", *names], rows))
    return section("Linears", shown, paragraph(said, note=True))


def draw(document: Document, file: Path) -> None:
    """The plot: size against KL divergence and perplexity, and loss by layer. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, key, name in zip(figure.subplots(1, 3), ("kl", "perplexity", None), ("KL divergence", "perplexity", None),
                               strict=True):  # fmt: skip
        if key is None:
            for label, losses in document["layers"].items():
                axes.plot(range(len(losses)), losses, marker=".", label=label)
            lossy = any(loss > 0 for losses in document["layers"].values() for loss in losses)
            axes.set(xlabel="layer", ylabel="relative error", yscale="log" if lossy else "linear")
            axes.legend(fontsize="small")
            continue
        # The parent last, so that a checkpoint has the same colour everywhere.
        for label, row in sorted(document["models"].items(), key=lambda item: item[1]["kl"] is None):
            if row[key] is not None:
                point = row["megabytes"], row[key]
                axes.plot(*point, "o")
                axes.annotate(label, point, xytext=(6, 4), textcoords="offset points", fontsize=8)
        axes.set(xlabel="megabytes", ylabel=name)
        axes.margins(x=0.25, y=0.12)
    figure.savefig(file, dpi=130)
