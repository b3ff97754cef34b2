"""Medians and their spread."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

Cell = dict[str, Any]  # row, threads, rounds: what each process printed
DENSE, PEER = "bf16", "llama.cpp Q4_0"  # the rows that others are compared with


def summarise(cells: Mapping[str, Cell]) -> list[dict[str, Any]]:
    """One entry for each cell, with the speed of all its timings: ``[lowest, median, highest]`` tokens a second."""
    found = []
    for cell in cells.values():
        rounds = [each for each in cell["rounds"] if "error" not in each]
        entry: dict[str, Any] = {"row": cell["row"], "threads": cell["threads"]}
        if not rounds:
            found.append({**entry, "error": cell["rounds"][-1]["error"]})
            continue
        runs = [each for one in rounds for each in one["runs"]]
        entry["first_token_seconds"] = _spread([each["first_token"] for each in runs])
        entry["token_seconds"] = _spread([each["token"] for each in runs])
        entry["warm_up_seconds"] = max(each["warm_up"] for each in rounds)
        found.append(entry)
    return found


def _spread(values: Sequence[float]) -> list[float]:
    return [min(values), median(values), max(values)]


def markdown(rows: Sequence[Mapping[str, Any]], prompt: int) -> str:
    """A table for each number of threads; ratios are of medians."""
    return "\n\n".join(
        _one(threads, [row for row in rows if row["threads"] == threads], prompt)
        for threads in sorted({row["threads"] for row in rows})
    )


def _one(threads: int, rows: Sequence[Mapping[str, Any]], prompt: int) -> str:
    peer = next((row for row in rows if row["row"] == PEER and "error" not in row), None)
    dense = next((row for row in rows if row["row"] == DENSE and "error" not in row), None)
    lines = [
        f"{threads} thread(s): medians (lowest to highest), times bf16, times llama.cpp",
        "",
        f"| | first token of {prompt}, s | prefill, tokens/s | decoding, tokens/s | warm-up, s |",
        "|---" * 5 + "|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['row']} | failed: {row['error']} | | | |")
            continue
        prefill = _speed(row, "first_token_seconds", prompt, (dense, peer))
        decoding = _speed(row, "token_seconds", 1, (dense, peer))
        first = row["first_token_seconds"][1]
        lines.append(f"| {row['row']} | {first:.3f} | {prefill} | {decoding} | {row['warm_up_seconds']:.1f} |")
    return "\n".join(lines)


def _speed(row: Mapping[str, Any], key: str, tokens: int, others: Sequence[Mapping[str, Any] | None]) -> str:
    low, middle, high = (tokens / seconds for seconds in reversed(row[key]))
    ratios = [f"{other[key][1] / row[key][1]:.2f}x" if other else "-" for other in others]
    return f"{middle:.1f} ({low:.1f} to {high:.1f}) {' '.join(ratios)}"
