"""Model cards and parents. Oracle: what the report given holds, line by line; no figure that it does not hold."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ptq.card import metadata, model_card
from ptq.lint import Lint
from ptq.parent import front_matter, parent_of
from ptq.readers import LOADS, REFUSES, SLOWER, Verdict
from ptq.yaml_tree import parse

ROW = {"bits": 4, "group_size": 128, "symmetric": True}
REPO = "someone/model-w4"


def report(**changes: Any) -> dict[str, Any]:
    """A report of a run on a hub model."""
    settings = {
        "model": "owner/model", "method": "gptq", "format": "gptq", "awq": {"codes": "round"}, "refine": {"steps": 0},
        "calibration": {"dataset": {"name": None, "files": ["calibration.txt", "more.txt"]}},
    }  # fmt: skip
    usual = {
        "versions": {"ptq": "1.2.3"},
        "configuration": {**settings, **changes.pop("configuration", {})},
        "parent": {"name": "owner/model", "commit": None, "card": {"license": "mit", "language": ["en", "de"]}},
        "calibration": {"sequences": 16, "tokens": 8192, "token_hash": "ab", "seed": 7},
        "size": {"before": 16_060_522_496, "after": 5_700_000_000, "bits_per_weight": 4.156},
        "modules": {"a": ROW, "b": ROW, "c": {**ROW, "bits": 8, "group_size": -1, "symmetric": False}},
        "kept_in_float": ["lm_head"],
        "evaluation": {
            "text": ["eval.txt"], "window": 512, "stride": 256, "tokens": 1000,
            "models": {"parent": {"perplexity": 6.1234, "kl": None, "top1": None},
                       "result": {"perplexity": 6.2, "kl": 0.0123, "top1": 0.95}},
        },
    }  # fmt: skip
    return {**usual, **changes}


def linted(*statuses: str) -> Lint:
    names = ("transformers", "vLLM", "SGLang")[: len(statuses)]
    readers = [Verdict(name, status, "why") for name, status in zip(names, statuses, strict=True)]
    return Lint(Path("x"), [], [], readers, {2: [], 4: [], 8: ["odd"]} if readers else {})


def card(document: dict[str, Any], lint: Lint | None = None) -> str:
    return model_card(REPO, document, lint or linted(LOADS, LOADS, LOADS))


def test_everything_in_the_report_is_on_the_card() -> None:
    text = card(report())
    for line in (
        "# model-w4",
        "[owner/model](https://huggingface.co/owner/model) quantized with GPTQ by ptq 1.2.3.",
        "| method | GPTQ |",
        "| 2 Linears | 4 bits, groups of 128, symmetric |",
        "| 1 Linear | 8 bits, one group a row, asymmetric |",
        "| left in float | lm_head |",
        "| size | 5700.0 MB, parent 16060.5 MB |",
        "| bits a weight, scales and zeros included | 4.156 |",
        "| calibration | 16 sequences, 8192 tokens of calibration.txt, more.txt, seed 7 |",
        "| parent | 6.123 | - | - |",
        "| result | 6.200 | 0.01230 | 95.00% |",
        "1000 tokens of eval.txt, window 512, stride 256. KL divergence is to the parent, in nats a token.",
        "Tensor parallel: the packed weights can be split over 2, 4 GPUs.",
        "vllm serve someone/model-w4",
        'model = ptq.load("someone/model-w4")',
        "That of the parent: mit.",
    ):
        assert line in text.splitlines(), line


def test_a_budget_is_said_as_it_was_asked_for() -> None:
    budget = {"budget": 3.5, "average_bits": 3.49921, "widths": [2, 3, 4, 8], "groups": []}
    asked = "3.5 bits a weight on average, without scales and zeros, among 2, 3, 4, 8"
    assert f"| bit budget | {asked}; 3.499 were spent |" in card(report(budget=budget)).splitlines()
    assert "bit budget" not in card(report())


def test_the_front_matter_is_yaml_with_the_parents_licence() -> None:
    found = parse(card(report()).split("---\n")[1], "card")
    assert found == {
        "license": "mit", "language": ["en", "de"], "base_model": "owner/model", "base_model_relation": "quantized",
        "library_name": "transformers", "tags": ["ptq", "gptq", "4-bit", "8-bit"],
    }  # fmt: skip
    other = {"license": "other", "license_name": "house-terms", "license_link": "LICENSE"}
    document = report(parent={"name": "owner/model", "commit": None, "card": other})
    assert metadata(document)["license_link"] == "https://huggingface.co/owner/model/blob/main/LICENSE"
    assert "That of the parent: house-terms." in card(document)
    assert metadata(report(parent={"name": None, "card": other}))["license_link"] == "LICENSE"


def test_what_is_missing_is_said_and_no_figure_is_made_up() -> None:
    text = card(report(evaluation=None, calibration=None, parent={"name": None, "commit": None, "card": {}}))
    assert "Not evaluated: the report holds no perplexity and no KL divergence." in text
    assert "| calibration | not in the report |" in text
    assert "A model in a local directory called `model` quantized" in text
    assert "The parent's licence is not known here" in text
    assert "base_model" not in text
    without = card({}, linted())
    assert "pushed without a report: how it was made is not known." in without
    assert "Not checked: the files are damaged" in without
    assert not re.findall(r"\d", without.partition("# model-w4")[2])


def test_the_method_says_what_ran() -> None:
    assert "| method | AWQ, codes by GPTQ |" in card(report(configuration={"method": "awq", "awq": {"codes": "gptq"}}))
    plain = card(report(configuration={"method": "rtn"}, calibration=None))
    assert "| method | round to nearest |" in plain
    assert "| calibration | none |" in plain
    assert "| method | GPTQ, 40 steps of refinement a block |" in card(report(configuration={"refine": {"steps": 40}}))
    both = card(report(configuration={"refine": {"steps": 4, "model_steps": 9}}))
    assert "4 steps of refinement a block, 9 steps of refinement of the whole model |" in both


def test_only_what_loads_has_a_command() -> None:
    text = card(report(), linted(REFUSES, REFUSES, REFUSES))
    assert text.count("does not load: why.") == 3
    assert not any(command in text for command in ("from_pretrained", "vllm serve", "launch_server"))
    readers = [Verdict("transformers", SLOWER, "pass CompressedTensorsConfig(dequantize=True)"),
               Verdict("SGLang", SLOWER, "in float16 only")]  # fmt: skip
    text = card(report(), Lint(Path("x"), [], [], readers, {2: ["odd"]}))
    assert "import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig\n" in text
    assert "quantization_config=CompressedTensorsConfig(dequantize=True))" in text
    assert f"--model-path {REPO} --dtype half" in text
    assert "the packed weights cannot be split over 2, 4 or 8 GPUs." in text


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (ROW, "--type Q4_0"),
        ({**ROW, "symmetric": False}, "--type Q4_1"),
        ({**ROW, "bits": 8}, "--type Q8_0"),
        ({**ROW, "bits": 8, "symmetric": False}, "none of its types has asymmetric 8-bit codes"),
        ({**ROW, "group_size": 48}, "no block format is known to hold these groups"),
        ({**ROW, "group_size": -1}, "no block format is known to hold these groups"),
    ],
)
def test_llama_cpp(row: dict[str, Any], said: str) -> None:
    """The types are those that docs/gguf.md says hold the codes."""
    assert said in card(report(modules={"a": row}))


def test_llama_cpp_with_a_packed_head() -> None:
    """Its kind is another than the other Linears' under most types; `tests/test_gguf_export.py` exports such."""
    for row in (ROW, {**ROW, "symmetric": False}):
        assert "--type Q8_0" in card(report(modules={"a": row, "lm_head": row}))


def test_many_linears_in_float_are_counted() -> None:
    text = card(report(kept_in_float=[f"layers.{i}.down_proj" for i in range(11)]))
    assert "layers.6.down_proj, layers.7.down_proj and 3 more |" in text
    assert "layers.8" not in text


def test_names_from_outside_are_text() -> None:
    """Oracle: a table's row has two cells; nothing opens a tag or code."""
    dataset = {"files": ["/x/te<i>|`xt.txt"]}
    text = card(report(configuration={"calibration": {"dataset": dataset}}))
    row = next(line for line in text.splitlines() if line.startswith("| calibration"))
    assert r"te\<i\>\|\`xt.txt" in row
    assert len(re.findall(r"(?<!\\)\|", row)) == 3


@pytest.mark.parametrize(
    ("model", "directory", "name", "commit"),
    [
        ("owner/model", "elsewhere", "owner/model", None),
        ("owner/model", f"models--owner--model/snapshots/{'a' * 40}", "owner/model", "a" * 40),
        ("cache", f"models--some-one--its--model/snapshots/{'b' * 40}", "some-one/its--model", "b" * 40),
        ("a/deep/path", "elsewhere", None, None),
        ("here/model", "here/model", None, None),
    ],
)
def test_a_parent_has_its_hub_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, directory: str, name: str | None, commit: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / directory).mkdir(parents=True)
    found = parent_of(model, tmp_path / directory)
    assert found == {"name": name, "commit": commit, "card": {}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\n---\n# A\n", {"license": "mit"}),
        ("---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("# A\n---\nlicense: mit\n---\n", {}),
        ("---\nlicense: [mit\n---\n", {}),
        ("---\n- mit\n---\n", {}),
        ("---\nlicense: mit\n", {}),
    ],
)
def test_front_matter(tmp_path: Path, text: str, expected: dict[str, str]) -> None:
    (tmp_path / "README.md").write_bytes(text.encode())
    assert front_matter(tmp_path / "README.md") == expected
    assert front_matter(tmp_path / "absent.md") == {}


@pytest.mark.parametrize(
    ("kind", "named", "processor", "said", "exported"),
    [
        ("llama", "LlamaForCausalLM", False, ("AutoModelForCausalLM", "tokenizer = AutoTokenizer"), True),
        ("mamba", "MambaForCausalLM", False, ("AutoModelForCausalLM", "tokenizer = AutoTokenizer"), False),
        ("gemma3", "Gemma3ForConditionalGeneration", True, ("AutoModelForImageTextToText", "processor = AutoP"), False),
        ("llama", "LlamaForSequenceClassification", False, ("AutoModelForSequenceClassification", ""), False),
        ("llama", "LlamaModel", False, ("AutoModel", ""), False),
    ],
)
def test_a_model_is_loaded_by_the_class_that_knows_it(
    tmp_path: Path, kind: str, named: str, processor: bool, said: tuple[str, str], exported: bool
) -> None:
    """Oracle: which class each Auto class has for the model type, and the architectures that docs/gguf.md lists."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "architectures": [named]}))
    if processor:
        (tmp_path / "processor_config.json").write_text("{}")
    text = card(report(), linted(LOADS, LOADS, LOADS)._replace(directory=tmp_path))
    assert f"from transformers import {said[0]}, Auto" in text
    assert f"model = {said[0]}.from_pretrained(" in text
    assert said[1] in text
    assert ("**llama.cpp**" in text) == exported


def test_text_of_a_report_is_no_markup() -> None:
    """A report comes with a checkpoint, whoever wrote that."""
    mark = "<b>[x](y)|z</b>"
    figures = {"perplexity": 1.0, "kl": None, "top1": None}
    text = card(report(
        versions={"ptq": mark}, parent={"name": mark, "card": {}}, configuration={"method": mark},
        evaluation={"text": "t", "window": 1, "stride": 1, "tokens": 1, "models": {mark: figures}},
    ))  # fmt: skip
    body = text.split("\n---\n", 1)[1]  # what comes before is YAML
    assert r"\<b\>\[x\](y)\|z\</b\> quantized with" in body
    assert re.search(r"(?<!\\)(<b>|\[x|\|z)", body) is None
