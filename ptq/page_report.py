"""``report.html``: what a run says in ``report.json``, as one page for people."""

import json
import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ptq.page import Series, chart, facts, folded, listing, number, page, paragraph, section, table

Document = Mapping[str, Any]
# "<path of the blocks>.<number>.<Linear>"
_IN_BLOCK = re.compile(r"(.+?\.)(\d+)\.(.+)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
# "<implementation> on <device>, <bits and layout>", as ptq_kernels.chosen names what runs
_KERNEL = re.compile(r"(\S+) on (\S+), (.+)")
# Keys of the report whose meaning a person would not guess.
_HARDWARE = {"columns": "library that solved GPTQ's columns:"}
# Linears of a group that are named before the rest is counted.
_NAMED = 6


def report_page(title: str, document: Document) -> str:
    """The page of a report; what the report does not hold is left out, so that a checkpoint without one has a page."""
    versions = document.get("versions", {})
    lead = f"Report of a quantized checkpoint, ptq {versions['ptq']}." if "ptq" in versions else "A checkpoint."
    parts = [
        facts(_facts(document)),
        _quality(document),
        _losses(document),
        _budget(document),
        _resources(document),
        _modules(document),
        _settings(document),
    ]
    return page(title, lead, [part for part in parts if part])


def _facts(document: Document) -> dict[str, str]:
    found: dict[str, str] = {}
    size = document.get("size", {})
    if "after" in size:
        before = f", parent {_megabytes(size['before'])}" if "before" in size else ""
        found["size"] = f"{_megabytes(size['after'])}{before}"
    if "bits_per_weight" in size:
        found["bits a weight, scales and zeros included"] = f"{size['bits_per_weight']:.3f}"
    result = document.get("evaluation", {}).get("models", {}).get("result", {})
    for key, name, spec in (("perplexity", "perplexity", ".3f"), ("kl", "KL divergence to the parent", ".5f"),
                            ("top1", "same top token", ".1%")):  # fmt: skip
        if result.get(key) is not None:
            found[name] = format(result[key], spec)
    return found


def _quality(document: Document) -> str:
    evaluation = document.get("evaluation")
    if not evaluation:
        return ""
    rows = [
        [name, number(row.get("perplexity"), ".3f"), number(row.get("kl"), ".5f"), number(row.get("top1"), ".2%"),
         number(row.get("megabytes"), ".1f")]
        for name, row in evaluation["models"].items()
    ]  # fmt: skip
    text = evaluation["text"]
    said = (
        f"{evaluation['tokens']} tokens of {text if isinstance(text, str) else ', '.join(text)}, window "
        f"{evaluation['window']}, stride {evaluation['stride']}. KL is the divergence to the parent in nats a token."
    )
    head = ["", "perplexity", "KL", "same top token", "megabytes"]
    return section("Quality", table(head, rows), paragraph(said, note=True))


def _losses(document: Document) -> str:
    """Loss of every Linear by layer, one line for each kind of Linear; the mean of a layer's experts."""
    lines: dict[str, dict[int, list[float]]] = {}
    for name, row in document.get("modules", {}).items():
        match = _IN_BLOCK.fullmatch(name)
        if match and isinstance(row.get("relative_loss"), float):
            kind = _NUMBER.sub("*", match[3])
            lines.setdefault(kind, {}).setdefault(int(match[2]), []).append(row["relative_loss"])
    if not lines:
        return ""
    drawing = chart(
        [Series(name, [(layer, fmean(losses[layer])) for layer in sorted(losses)]) for name, losses in lines.items()],
        x="layer", y="relative output error", log=True, whole=True,
    )  # fmt: skip
    said = (
        "The share of each Linear's output energy on the calibration text that its quantization changes; with GPTQ's "
        "correct_inputs against the corrected weight, which makes up for what the layers before lost."
    )
    return section("Loss by layer", drawing, paragraph(said, note=True))


def _budget(document: Document) -> str:
    budget = document.get("budget")
    if not budget:
        return ""
    modules = document.get("modules", {})
    rows = []
    for group in budget["groups"]:
        measured = [modules.get(name, {}).get("relative_loss") for name in group["modules"]]
        losses = group["predicted_relative_loss"].values()  # of a report that was read: None is not finite
        predicted = None if None in losses else sum(losses)
        total = sum(measured) if all(isinstance(loss, float) for loss in measured) else None
        rows.append([
            _names(group["modules"]), str(group["bits"]), number(group["predicted_kl"].get(str(group["bits"])), ".2e"),
            number(predicted, ".2e"), number(total, ".2e"),
        ])  # fmt: skip
    said = (
        f"{budget['average_bits']:.4f} bits a weight were spent of {budget['budget']:g}, among widths of "
        f"{', '.join(map(str, budget['widths']))}. Predicted KL divergence of all groups: "
        f"{number(budget['predicted_kl'], '.2e') or 'not finite'}."
    )
    head = ["Linears with one input", "bits", "predicted KL", "predicted loss", "measured loss"]
    return section("Bit budget", paragraph(said), folded(f"{len(rows)} groups", table(head, rows)))


def _resources(document: Document) -> str:
    seconds, peaks = document.get("seconds", {}), document.get("peak_bytes", {})
    rows = [[name, f"{value:.1f}", _gigabytes(peaks.get(name))] for name, value in seconds.items()]
    if not rows:
        return ""
    if peaks and rows[-1][0] == "total":
        rows[-1][2] = _gigabytes(max(peaks.values()))
    on_gpu = document.get("memory", {}).get("peak_on_gpu")
    if on_gpu is not None:
        rows.append(["solve, on the GPU", "", _gigabytes(on_gpu)])
    hardware = ", ".join(f"{_HARDWARE.get(key, key)} {value}" for key, value in document.get("hardware", {}).items())
    head = ["stage", "seconds", "peak memory, GB, libraries and mapped files included"]
    notes = [paragraph(text, note=True) for text in (_predicted(document), hardware) if text]
    return section("Time and memory", table(head, rows), *notes)


def _predicted(document: Document) -> str:
    if "prediction" not in document:
        return ""
    memory, seconds = document["prediction"]["memory"], document["prediction"]["seconds"]
    on_gpu = "peak_on_gpu" in document.get("memory", {})
    kind = "on the GPU" if on_gpu else "without libraries and mapped files"
    return (
        f"Solving and writing: {seconds['predicted']:.1f} s predicted, {seconds['actual']:.1f} s taken; peak memory "
        f"{kind} {_gigabytes(memory['predicted'])} GB predicted, {_gigabytes(memory['actual'])} GB used."
    )


def _modules(document: Document) -> str:
    modules = document.get("modules", {})
    if not modules:
        return ""
    rows = [
        [name, str(row.get("bits", "")), str(row.get("group_size", "")), str(row.get("solver", "")),
         number(row.get("relative_loss"), ".2e"), number(row.get("relative_rounding_loss"), ".2e"),
         ", ".join(row.get("rescues") or [])]
        for name, row in modules.items()
    ]  # fmt: skip
    head = ["Linear", "bits", "group", "solver", "loss", "loss of rounding", "rescues"]
    left = document.get("kept_in_float", [])
    said = f"In float: {', '.join(left)}." if left else "No Linear was left in float."
    return section("Linears", folded(f"{len(rows)} quantized Linears", table(head, rows)), paragraph(said, note=True))


def _settings(document: Document) -> str:
    parts = []
    if "configuration" in document:
        parts.append(folded("configuration", listing(json.dumps(document["configuration"], indent=1))))
    if document.get("calibration"):
        parts.append(folded("calibration", listing(json.dumps(document["calibration"], indent=1))))
    parts += _kernels(document)
    if document.get("versions"):
        parts.append(table(["package", "version"], [[k, str(v)] for k, v in document["versions"].items()]))
    return section("Configuration and versions", *parts) if parts else ""


def _kernels(document: Document) -> list[str]:
    """What multiplied with the packed weights, and what would in a model that is loaded to be used."""
    found = document.get("kernels", {})
    rows = []
    # a report of an earlier version has what evaluated alone, without a name above it
    for user, kernels in (found if "evaluation" in found else {"evaluation": found}).items():
        for name, how in kernels.items():
            match = _KERNEL.fullmatch(name)
            rows.append([user, *(match.group(2, 1, 3) if match else ("", "", name)), how])
    if not rows:
        return []
    said = "The evaluation multiplies with each block as the file holds it, once for all its text"
    if "ptq.load" in found:
        said += (
            "; ptq.load first lays a weight out for the fastest kernel of this machine, so its rows are what a loaded "
            "model runs with"
        )
    return [table(["kernels of", "device", "implementation", "weights", "how"], rows), paragraph(f"{said}.", note=True)]


def _names(modules: Sequence[str]) -> str:
    more = len(modules) - _NAMED
    return ", ".join(modules) if more <= 0 else f"{', '.join(modules[:_NAMED])} and {more} more"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB"


def _gigabytes(size: float | None) -> str:
    return "" if size is None else f"{size / 1e9:.2f}"
