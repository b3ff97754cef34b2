"""Calibration data and configurations that are handed over in Python.

Oracle: the run whose text stands in a file and whose configuration does, byte for byte.
"""

import json
from dataclasses import replace

import pytest
import tiny_models
import torch
from tiny_models import run, settings, tokens

import ptq
from ptq.calibration.data import calibration_batches, token_hash
from ptq.calibration.given import Given
from ptq.card import model_card
from ptq.config import BitBudget, CalibrationConfig, DatasetConfig, RefineConfig, load_config
from ptq.errors import ConfigError, DataError
from ptq.lint import lint
from ptq.plan import make_plan
from ptq.predict_memory import tokens_of

TEXTS = [text for text in tiny_models.EXCERPT.read_text(encoding="utf-8").split("\n\n") if text.strip()]


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return tiny_models.save(tiny_models.build("llama"), tmp_path_factory.mktemp("given") / "parent")


def weights(directory):
    return (directory / "model.safetensors").read_bytes()


def test_strings_are_read_as_rows_of_a_file(parent, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    usual = settings(parent, tmp_path / "file")
    source = replace(usual.calibration, dataset=DatasetConfig(files=(str(file),)))
    expected = run(replace(usual, calibration=source))
    found = run(replace(usual, output=str(tmp_path / "given")), calibration=iter(TEXTS))
    assert weights(tmp_path / "given") == weights(tmp_path / "file")
    assert found.document["calibration"] == expected.document["calibration"]
    assert found.document["configuration"]["calibration"]["dataset"]["name"] is None  # no text that was not read


def test_tokens_are_samples_as_they_are(parent, tmp_path):
    """The very tokens of a run that reads a file give its bytes, in whatever shapes they come."""
    usual = settings(parent, tmp_path / "file")
    run(usual)
    batches = calibration_batches(usual.calibration, tiny_models.tokenizer())
    rows = torch.cat(batches)
    shapes = {
        "batches": batches,
        "rows": list(rows),
        "one": rows,
        "lists": rows.tolist(),
        "mixed": [rows[:3], *rows[3:]],
    }
    for name, given in shapes.items():
        other = replace(usual.calibration, samples=3, sequence_length=20)  # of no account
        report = run(replace(usual, output=str(tmp_path / name), calibration=other), calibration=given)
        assert weights(tmp_path / name) == weights(tmp_path / "file")
        assert report.document["calibration"]["token_hash"] == token_hash(batches)
        assert report.document["configuration"]["calibration"]["samples"] == len(rows)


def test_sequences_of_several_lengths():
    rows = [tokens(1, length, length)[0] for length in (5, 9, 5, 9, 9, 2)]
    given = Given(rows)
    config = given.settings(CalibrationConfig(batch_size=2))
    assert (config.samples, config.sequence_length) == (6, 9)
    batches = given.batches(config, tiny_models.tokenizer())
    expected = [[rows[1], rows[3]], [rows[4]], [rows[0], rows[2]], [rows[5]]]
    assert all(torch.equal(one, torch.stack(other)) for one, other in zip(batches, expected, strict=True))


def test_a_prediction_counts_what_was_given(parent, tmp_path):
    usual = settings(parent, tmp_path / "never")
    config = replace(usual, calibration=Given([tokens(5, 24)]).settings(usual.calibration))
    assert tokens_of(make_plan(config)) == 5 * 24


def test_a_run_goes_on_with_the_same_tokens_alone(parent, tmp_path, monkeypatch):
    usual, given = settings(parent, tmp_path / "out"), list(tokens(8, 48))
    whole = run(replace(usual, output=str(tmp_path / "whole")), calibration=given)

    def cut(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("ptq.pipeline._write_description", cut)
        with pytest.raises(KeyboardInterrupt):
            run(usual, calibration=given)
    with pytest.raises(ConfigError, match="calibration text"):
        run(usual, calibration=list(tokens(8, 48, 1)))
    again = run(usual, calibration=given)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert again.document["calibration"] == whole.document["calibration"]


def test_budgets_and_refinement_take_it_too(parent, tmp_path):
    config = replace(settings(parent, tmp_path / "out", "rtn"), bits=BitBudget(3.0), refine=RefineConfig(steps=1))
    report = run(config, calibration=tokens(4, 32))
    assert report.document["calibration"]["tokens"] == 4 * 32
    assert report.document["budget"]


WRONG = {
    "a string": ("text", "found one str: put it into a list"),
    "a dict": ({"input_ids": tokens(1, 8)}, "found one dict: put it into a list"),
    "a number": (3, "found one int: put it into a list"),
    "nothing": ([], "found none: an iterator can be read once only"),
    "one list of ids": ([1, 2, 3], "item 0 is of type int: put it into a list"),
    "arrays": ([tokens(1, 8).numpy()], "item 0 is of type ndarray: make it a tensor or a list of ints"),
    "dicts": ([{"input_ids": [1, 2]}], "item 0 is of type dict: pass its input_ids"),
    "both": (["text", tokens(1, 8)], "all of one kind; found both, the other kind first at item 1"),
    "halves": ([tokens(1, 8).half()], r"item 0 is float16 of shape \[1, 8\]: convert it with .long\(\)"),
    "int32": ([tokens(1, 8), tokens(1, 8).int()], r"item 1 is int32 of shape \[1, 8\]"),
    "cubes": ([tokens(4, 8).view(2, 2, 8)], r"of shape \[2, 2, 8\]: .* one or two dimensions"),
    "ragged": ([[[1, 2], [3]]], r"item 0 holds something else \(.*\): tokenize it first"),
    "words": ([["a", "b"]], r"item 0 holds something else \(.*\): tokenize it first"),
    "one token": ([tokens(2, 1)], r"2 tokens or more; item 0 has shape \[2, 1\]: leave it out"),
    "no tokens": ([[]], r"2 tokens or more; item 0 has shape \[0\]: leave it out"),
    "no rows": ([tokens(0, 8)], r"2 tokens or more; item 0 has shape \[0, 8\]"),
    "negative": ([torch.tensor([5, -100])], "must be 0 or more; item 0 has -100: leave out what stands for padding"),
    "another vocabulary": ([torch.tensor([5, 288])], "below the model's vocabulary size of 288, found 288: tokenize"),
    "too few": (["a few words"], r"calibration needs 8 x 48 = 384 tokens, found \d+; use more text, fewer samples"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_given_wrongly(case, parent, tmp_path):
    given, message = WRONG[case]
    with pytest.raises(DataError, match=message):
        run(settings(parent, tmp_path / "out"), calibration=given)
    assert not (tmp_path / "out").exists()


def test_sequences_longer_than_the_context(parent, tmp_path):
    with pytest.raises(
        ConfigError, match="sequence_length must be at most the model's context of 128 tokens; found 130"
    ):
        run(settings(parent, tmp_path / "out"), calibration=tokens(2, 130))


def test_a_method_that_reads_no_text(parent, tmp_path):
    with pytest.raises(ConfigError, match="method rtn reads none here: leave calibration out, or choose gptq or awq"):
        run(settings(parent, tmp_path / "out", "rtn"), calibration=tokens(2, 16))


def test_a_card_names_no_text_that_was_not_read(parent, tmp_path):
    report = run(settings(parent, tmp_path / "out"), calibration=tokens(8, 48))
    with pytest.raises(ConfigError, match="calibration.dataset needs either name .* or files .*, found neither"):
        load_config(tmp_path / "out/ptq_config.yaml")
    assert "384 tokens of data given in Python" in model_card("me/model", report.document, lint(tmp_path / "out"))


KEYS = {"model": "examples/tiny-llama", "output": "out", "method": "gptq"}


def test_a_mapping_is_read_as_a_file(tmp_path):
    given = {
        **KEYS, "bits": {"budget": 3.5}, "exclude": ("lm_head", "*.o_proj"),
        "overrides": {"model.layers.0": {"bits": 8}},
        "calibration": {"samples": 4, "dataset": {"files": [str(tiny_models.EXCERPT)]}}, "evaluation": None,
    }  # fmt: skip
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(given))
    before = json.dumps(given)
    assert load_config(given) == load_config(file)
    assert load_config(given, ["calibration.samples=8", "bits=2"]) == load_config(
        file, ["calibration.samples=8", "bits=2"]
    )
    assert json.dumps(given) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits must be 2, 3, 4 or 8"),
        ({"bit": 4}, "unknown key bit; did you mean bits"),
        ({"bits": True}, "bits must be a whole number|bits must be"),
        ({"output": "a\0b"}, "the configuration, line .*: valid YAML is required, found: an escaped NUL"),
        (
            {"output": tiny_models.ROOT},
            r"must hold text, numbers, .* found PosixPath\(.*\): write a path as str\(path\)",
        ),
        ({"calibration": {"samples": torch.tensor(3)}}, r"alone, found tensor\(3\): write"),
        ({"calibration": {"dataset": {}}}, "found neither"),
    ],
)
def test_a_mapping_is_checked_as_a_file(change, message):
    with pytest.raises(ConfigError, match=message):
        ptq.quantize({**KEYS, **change})


def test_a_run_from_a_mapping(parent, tmp_path):
    given = {
        "model": str(parent), "output": str(tmp_path / "mapped"), "method": "rtn", "group_size": 32, "device": "cpu",
    }  # fmt: skip
    run(given)
    run(settings(parent, tmp_path / "usual", "rtn"))
    assert weights(tmp_path / "mapped") == weights(tmp_path / "usual")
