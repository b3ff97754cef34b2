"""The tables of docs/report.md. Oracle: a report and a comparison as they come out."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import TEXT, build, run, save, settings

from ptq.compare import compare_checkpoints
from ptq.config import BitBudget, EvaluationConfig

DOCS = (Path(__file__).resolve().parent.parent / "docs" / "report.md").read_text(encoding="utf-8")
REPORT, COMPARISON = (re.findall(r"^\| `(\S+)` \|", part, re.MULTILINE) for part in DOCS.split("## compare.json"))
EVALUATION = EvaluationConfig(files=(str(TEXT),), tokens=128, window=64, stride=40)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("report")
    parent = save(build("llama"), root / "parent")
    options = {"format": "compressed-tensors", "bits": BitBudget(3.5), "evaluation": EVALUATION}
    report = run(settings(parent, root / "out", **options))
    return {
        "report": report.document,
        "comparison": compare_checkpoints([str(root / "out")], str(parent), EVALUATION, device="cpu"),
    }


def reached(value: Any, steps: list[str]) -> Iterator[Any]:
    """What stands at a path, whose stars are any key."""
    if not steps:
        yield value
    elif isinstance(value, dict):
        for key in value if steps[0] == "*" else [steps[0]] if steps[0] in value else []:
            yield from reached(value[key], steps[1:])


@pytest.mark.parametrize(("name", "keys"), [("report", REPORT), ("comparison", COMPARISON)])
def test_tables_and_files_have_the_same_keys(documents: dict[str, Any], name: str, keys: list[str]) -> None:
    document = documents[name]
    assert [key for key in keys if not list(reached(document, key.split(".")))] == []
    beside = {"window", "stride"} if name == "comparison" else set()  # named in another row
    assert set(document) - beside == {key.partition(".")[0] for key in keys}


def test_rows_of_modules_hold_nothing_else(documents: dict[str, Any]) -> None:
    named = {key.rpartition(".")[2] for key in REPORT if key.startswith("modules.")}
    assert {key for row in documents["report"]["modules"].values() for key in row} == named


def test_definitions_that_can_be_counted(documents: dict[str, Any]) -> None:
    report, comparison = documents["report"], documents["comparison"]
    for row in report["modules"].values():
        assert row["loss_to_rounding"] == row["relative_loss"] / row["relative_rounding_loss"]
    assert comparison["layer_tokens"] == 64 * len(range(0, 128 - 64 + 1, 40))  # two windows, 24 tokens in both
    assert comparison["reported"]["out"] == {n: row["relative_loss"] for n, row in report["modules"].items()}
    assert comparison["models"]["out"]["bits"] == pytest.approx(report["size"]["bits_per_weight"])
    assert report["memory"]["peak_of_solve"] == report["peak_bytes"]["solve"]
    assert report["calibration"]["tokens"] == 8 * 48
