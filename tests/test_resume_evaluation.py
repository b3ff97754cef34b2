"""Runs that died once their checkpoint was whole. Oracle: the same text is asked for, and nothing is solved again."""

import html
import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
from crashes import checksums, small_parent, small_run
from test_resume import interrupted, stop, unfinished
from tiny_models import run

from ptq import walk
from ptq.config import EvaluationConfig, load_config
from ptq.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return small_parent(tmp_path_factory.mktemp("resume") / "parent")


def with_text(config, file):
    """The run on another text, which no key but the name of its file tells."""
    text = Path(config.calibration.dataset.files[0]).read_text()
    file.write_text(text[::-1])
    dataset = replace(config.calibration.dataset, files=(str(file),))
    return replace(config, calibration=replace(config.calibration, dataset=dataset))


def test_a_run_that_died_while_it_evaluated_evaluates(parent, tmp_path, monkeypatch):
    text = EvaluationConfig(files=(str(tiny_models.TEXT),), tokens=64, window=32, stride=32)
    config = replace(small_run(parent, tmp_path / "out"), evaluation=text)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ptq.pipeline.evaluate_run", killed)
        interrupted(config)
    assert unfinished(config).exists()
    before = checksums(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(walk, "quantize_block", None)
        report = run(config)
    assert report.document["evaluation"]["tokens"] > 0
    assert checksums(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with monkeypatch.context() as patch:
        patch.setattr("ptq.pipeline.evaluate_run", killed)
        interrupted(config, overwrite=True)
    text_file = Path(config.calibration.dataset.files[0])
    hidden = text_file.with_name("hidden.txt")
    for other, error, said in (
        (replace(config, bits=8), ConfigError, "exists; choose another `output` or pass --overwrite"),
        (with_text(config, tmp_path / "other.txt"), ConfigError, "was made on another calibration text: name that one"),
        (config, DataError, "a readable text file is required"),
    ):
        if error is DataError:
            text_file.rename(hidden)
        with pytest.raises(error, match=said):
            run(other)
        assert (unfinished(config) / "published").exists()  # so that the evaluation can still be made
    hidden.rename(text_file)
    with monkeypatch.context() as patch:
        patch.setattr(walk, "quantize_block", None)
        assert run(config).document["evaluation"]["tokens"] > 0
    with monkeypatch.context() as patch:
        patch.setattr("ptq.pipeline.evaluate_run", killed)
        interrupted(config, overwrite=True)
    run(replace(config, bits=8), overwrite=True)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["configuration"]["bits"] == 8


@pytest.mark.parametrize("asked", [True, False])
def test_what_makes_up_for_an_evaluation_is_recorded_with_the_settings_it_used(parent, tmp_path, monkeypatch, asked):
    """Oracle: the second call's configuration, in every file that holds one."""
    first = EvaluationConfig(files=(str(tiny_models.TEXT),), tokens=64, window=32, stride=32)
    config = replace(small_run(parent, tmp_path / "out"), evaluation=first)
    with monkeypatch.context() as patch:
        patch.setattr("ptq.pipeline.evaluate_run", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(config)
    before = json.loads((tmp_path / "out" / "report.json").read_text())
    second = replace(config, evaluation=replace(first, tokens=96, stride=16) if asked else None)
    with monkeypatch.context() as patch:
        patch.setattr(walk, "quantize_block", None)
        run(second)
    assert load_config(tmp_path / "out" / "ptq_config.yaml") == second
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    recorded = document["configuration"]["evaluation"]
    for key in ("seconds", "peak_bytes"):  # those of the solve stay, which was in the first call
        kept = {stage: value for stage, value in document[key].items() if stage not in ("evaluate", "total")}
        assert kept == {stage: value for stage, value in before[key].items() if stage != "total"}
        assert ("evaluate" in document[key]) == asked
    added = document["seconds"].get("evaluate", 0.0)
    assert document["seconds"]["total"] == pytest.approx(before["seconds"]["total"] + added, abs=0.011)
    assert set(document.get("kernels", {})) == ({"evaluation", "ptq.load"} if asked else set())
    assert ("evaluation" in document) == asked
    assert (recorded and (recorded["tokens"], recorded["stride"])) == ((96, 16) if asked else None)
    shown = html.unescape((tmp_path / "out" / "report.html").read_text())
    assert ('"tokens": 96' in shown, '"evaluation": null' in shown) == (asked, not asked)
    assert not unfinished(config).exists()


def test_a_refusal_to_go_on_names_settings_and_shortens_checksums(parent, tmp_path, monkeypatch):
    """Oracle: the one key that was changed; nothing that is computed from it, and no checksum to its end."""
    config = small_run(parent, tmp_path / "out")
    stop(config, 1)
    samples = replace(config.calibration, samples=config.calibration.samples - 1)
    beginning = r"can go on only as it began: (configuration\.)?"
    for changed, said in (
        (replace(config, bits=8), r"bits was 4 and is 8\. Undo the change"),
        (replace(config, calibration=samples),
         r"calibration.samples was \d+ and is \d+; the calibration text is another, too, which may follow.*\. Undo"),
        (with_text(config, tmp_path / "other.txt"),
         r"calibration text was [0-9a-f]{12}\.\.\. and is [0-9a-f]{12}\.\.\. \(calibration.dataset\)\. Undo"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=beginning + said):
            run(changed)
