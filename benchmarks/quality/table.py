"""The results as markdown."""

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.quality.cells import CELLS, OURS, ROWS, SEEDS

HEAD = ("", "KL nonfiction", "KL novel", "KL both", "of best peer", "top-1", "perplexity", "bits", "seconds", "MB")
Entries = list[Mapping[str, Any]]
REFINED, STEPS = (OURS, "GPTQ, refined"), ("AutoRound", "200 steps")
# ptq's row, those it is measured by (the best of them counts), and what of them.
RATIOS = {
    "KL: GPTQ / best other GPTQ": ((OURS, "GPTQ"), "GPTQ", "kl"),
    "KL: GPTQ / AutoRound": ((OURS, "GPTQ"), STEPS, "kl"),
    "KL: refined / AutoRound": (REFINED, STEPS, "kl"),
    "KL: AWQ+GPTQ / GPTQ": ((OURS, "AWQ+GPTQ"), (OURS, "GPTQ"), "kl"),
    "s: GPTQ / fastest other GPTQ": ((OURS, "GPTQ"), "GPTQ", "seconds"),
    "s: GPTQ / AutoRound": ((OURS, "GPTQ"), STEPS, "seconds"),
    "s: refined / AutoRound": (REFINED, STEPS, "seconds"),
}


def markdown(document: Mapping[str, Any]) -> str:
    """One table for each parent and cell; means over the seeds, with half the range between them after ±."""
    parts = ["\n".join(_ratios(document))]
    for parent, facts in document["parents"].items():
        both, millions = facts["metrics"]["both"], facts["parameters"] / 1e6
        parts.append(
            f"## {parent}\n\n{facts['architecture']}, {millions:.1f} M parameters, perplexity "
            f"{both['perplexity']:.3f} over {both['tokens']} tokens."
        )
        for cell in CELLS:
            entries = [e for e in document["checkpoints"].values() if e["parent"] == parent and e["cell"] == cell.name]
            if entries:
                parts.append(f"### {cell.name}\n\n" + "\n".join(_lines(entries)) + _remarks(entries))
    return "\n\n".join(parts) + "\n"


def _ratios(document: Mapping[str, Any]) -> Iterable[str]:
    """ptq beside the others, by parent, cell and calibration seed."""
    yield "| | seed | " + " | ".join(RATIOS) + " |"
    yield "|---|---|" + "---:|" * len(RATIOS)
    done = [e for e in document["checkpoints"].values() if "metrics" in e]
    for parent in document["parents"]:
        for cell in CELLS:
            for seed in SEEDS:
                entries = [e for e in done if (e["parent"], e["cell"], e["seed"]) == (parent, cell.name, seed)]
                found = [_ratio(entries, *each) for each in RATIOS.values()]
                if any(each != "-" for each in found):
                    yield f"| {parent} {cell.name} | {seed} | " + " | ".join(found) + " |"


def _ratio(entries: Entries, ours: tuple[str, str], theirs: tuple[str, str] | str, key: str) -> str:
    def values(chosen: Entries) -> list[float]:
        return [e["seconds"] if key == "seconds" else e["metrics"]["both"][key] for e in chosen]

    own = values([e for e in entries if (e["tool"], e["label"]) == ours])
    others = values(
        [e for e in entries if (e["tool"], e["label"]) == theirs]
        if isinstance(theirs, tuple)
        else [e for e in entries if e["tool"] != OURS and e["label"].startswith(theirs)]
    )
    return f"{own[0] / min(others):.2f}" if own and others else "-"


def _lines(entries: Entries) -> Iterable[str]:
    peers = [kl for tool, _, group in _grouped(entries) if tool != OURS and (kl := _mean(group, "kl")) is not None]
    best = min(peers, default=None)
    yield "| " + " | ".join(HEAD) + " |"
    yield "|---|" + "---:|" * (len(HEAD) - 1)
    for tool, label, group in _grouped(entries):
        done = [e for e in group if "metrics" in e]
        if not done:
            yield f"| {tool} {label} |" + " - |" * (len(HEAD) - 1)
            continue
        kl = _mean(done, "kl")
        ratio = f"{kl / best:.2f}" if best and kl is not None else "-"
        cells = [
            *(_spread([e["metrics"][text]["kl"] for e in done]) for text in ("eval-nonfiction", "eval-novel", "both")),
            ratio,
            f"{_mean(done, 'top1'):.2%}",
            f"{_mean(done, 'perplexity'):.3f}",
            f"{done[0]['bits_per_weight']:.3f}",
            f"{sum(e['seconds'] for e in done) / len(done):.1f}",
            f"{max(e['memory_peak'] for e in done) / 1e6:.0f}",
        ]
        yield f"| {tool} {label} | " + " | ".join(cells) + " |"


def _grouped(entries: Entries) -> Iterable[tuple[str, str, Entries]]:
    """Entries of each row in the order of ROWS."""
    for row in ROWS:
        group = [e for e in entries if (e["tool"], e["label"]) == (row.tool, row.label)]
        if group:
            yield row.tool, row.label, group


def _mean(entries: Entries, key: str) -> float | None:
    values = [e["metrics"]["both"][key] for e in entries if "metrics" in e]
    return sum(values) / len(values) if values else None


def _spread(values: list[float]) -> str:
    middle = f"{sum(values) / len(values):.5f}"
    return middle if len(values) < 2 else f"{middle} ± {(max(values) - min(values)) / 2:.5f}"


def _remarks(entries: Entries) -> str:
    """Failures and notes below a table."""
    notes = {(row.tool, row.label): row.note for row in ROWS}
    lines = []
    for tool, label, group in _grouped(entries):
        errors = sorted({e["error"] for e in group if "error" in e})
        texts = [notes[tool, label], *(f"failed: {error}" for error in errors)]
        lines += [f"* {tool} {label}: {text}" for text in texts if text]
    return "\n\n" + "\n".join(lines) if lines else ""
