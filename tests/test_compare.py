"""Comparing checkpoints: figures, layers' losses, files. Oracles: evaluation one by one; blocks run by hand."""

import io
import json
import math
from dataclasses import replace
from importlib import util
from pathlib import Path

import pytest
import torch
from test_page import check_self_contained
from tiny_models import TEXT, build, run, save, settings

import ptq
from ptq import cli, compare_page
from ptq.calibration.data import evaluation_windows
from ptq.compare import compare_checkpoints, short_names, show
from ptq.compare_page import comparison_page, write_comparison
from ptq.config import EvaluationConfig, SchemeOverride
from ptq.errors import ConfigError
from ptq.evaluation import evaluate_checkpoint
from ptq.inspection import packed_bits
from ptq.models.loading import load_tokenizer
from ptq.prepared import Prepared
from ptq.progress import Progress
from ptq.runtime import open_checkpoint
from ptq.sweep import _finished as finished
from ptq.sweep import load_variants, sweep

EVALUATION = EvaluationConfig(files=(str(TEXT),), tokens=256, window=64, stride=64)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A parent and three checkpoints of it: AWQ has folded scales, one comes without a report."""
    root = tmp_path_factory.mktemp("compare")
    parent = save(build("llama", torch.bfloat16), root / "parent")
    run(settings(parent, root / "four", "rtn", format="compressed-tensors"))
    run(settings(parent, root / "three", "rtn", bits=3))
    run(settings(parent, root / "awq", "awq"))
    (root / "four" / "report.json").unlink()
    return root


@pytest.fixture(scope="module")
def document(made):
    paths = [str(made / name) for name in ("four", "three", "awq")]
    return compare_checkpoints(paths, str(made / "parent"), EVALUATION, device="cpu")


def test_figures_are_those_of_one_by_one(made, document) -> None:
    assert list(document["models"]) == ["parent", "four", "three", "awq"]
    for name in ("four", "three", "awq"):
        alone = evaluate_checkpoint(str(made / name), str(made / "parent"), EVALUATION, device="cpu")["models"]
        row = document["models"][name]
        assert {key: row[key] for key in alone["result"]} == alone["result"]
        assert document["models"]["parent"]["perplexity"] == alone["parent"]["perplexity"]
    # groups of 32 with a scale of 16 bits; the shape of each of 14 Linears takes 128 bits
    assert document["models"]["four"]["bits"] == 4.5 + 14 * 128 / 73728
    assert document["models"]["parent"]["bits"] is None


def test_layers_lose_what_running_them_by_hand_loses(made, document) -> None:
    """Oracle: both models in memory, each block of the one on the hidden states of the other."""
    parent, other = (ptq.load(made / name, device="cpu") for name in ("parent", "three"))
    tokens = [w.tokens[None] for w in evaluation_windows(EVALUATION, load_tokenizer(made / "parent", False))]
    assert document["layer_tokens"] == sum(t.numel() for t in tokens)
    squares = torch.zeros(2, 2, dtype=torch.float64)

    def compare(index: int):
        def hook(_module, args, kwargs, output):
            quantized = other.model.layers[index](*args, **kwargs)
            squares[index, 0] += (quantized.double() - output.double()).square().sum()
            squares[index, 1] += (output.double() - args[0].double()).square().sum()

        return hook

    for index, layer in enumerate(parent.model.layers):
        layer.register_forward_hook(compare(index), with_kwargs=True)
    with torch.no_grad():
        for batch in tokens:
            parent(input_ids=batch, use_cache=False)
    expected = (squares[:, 0] / squares[:, 1]).tolist()
    # Another kernel may round each bfloat16 output the other way, 2^-8 of it; the errors are 0.4 of it and more.
    assert document["layers"]["three"] == pytest.approx(expected, rel=2 * 2.0**-8 / 0.4)


def test_the_better_checkpoint_has_the_smaller_losses(document) -> None:
    """Folded scales (awq) make weights incomparable, not layers: four bits lose less than three."""
    for name in ("four", "awq"):
        assert all(a < b for a, b in zip(document["layers"][name], document["layers"]["three"], strict=True))
        assert document["models"][name]["kl"] < document["models"]["three"]["kl"]


def test_reported_losses_are_taken_where_there_is_a_report(document) -> None:
    assert document["reported"]["four"] == {}
    assert len(document["reported"]["awq"]) == 14


def test_the_page(document) -> None:
    read = check_self_contained(comparison_page(document))
    said = " ".join(read.text)
    for text in ("Size and KL divergence", "Size and perplexity", "Loss by layer", "four", "4.524", "down_proj",
                 f"{document['models']['awq']['kl']:.5f}", "256 tokens"):  # fmt: skip
        assert text in said
    # three checkpoints by KL, four models by perplexity, three lines of two layers
    assert sum(tag == "circle" for tag, _ in read.elements) == 3 + 4 + 6
    unreported = {**document, "reported": {name: {} for name in document["reported"]}}
    assert "as the solvers report them" not in comparison_page(unreported)


def test_names_are_as_long_as_they_must_be(tmp_path: Path) -> None:
    for name in ("a/x", "b/x", "b/y"):
        (tmp_path / name).mkdir(parents=True)
    paths = [str(tmp_path / name) for name in ("a/x", "b/x", "b/y")]
    assert list(short_names(paths)) == ["a/x", "b/x", "y"]
    assert short_names(["owner/model", "parent"]) == {"model": "owner/model", "parent (checkpoint)": "parent"}
    with pytest.raises(ConfigError, match="must be named once"):
        short_names([paths[0], paths[0] + "/"])


def test_other_models_are_refused(made, tmp_path) -> None:
    deep = save(build("llama", num_hidden_layers=3), tmp_path / "deep")
    wide = save(build("llama", vocab_size=320), tmp_path / "wide")
    for directory, expected in ((deep, "has 3 and"), (wide, "must share a vocabulary")):
        with pytest.raises(ConfigError, match=expected):
            compare_checkpoints([str(directory)], str(made / "parent"), EVALUATION, device="cpu")


def test_every_layout_is_counted(made) -> None:
    """compressed-tensors may hold tensors that this checkpoint lacks; they take no bits."""
    opened = open_checkpoint(made / "four")
    assert packed_bits(opened) == sum(
        8 * t.element_size() * t.numel()
        for name in opened.reader.names()
        if "_proj." in name
        for t in [opened.reader.tensor(name)]
    )


def compare_arguments(made: Path) -> list[str]:
    text = ["--text", str(TEXT), "--tokens", "64", "--window", "32", "--device", "cpu"]
    return ["compare", str(made / "four"), str(made / "three"), "--parent", str(made / "parent"), *text]


def test_the_command_line(made, tmp_path, capsys, monkeypatch) -> None:
    assert cli.main([*compare_arguments(made), "--out", str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out
    for word in ("worst_layer", "parent", "four", "three", "window 32"):
        assert word in printed
    names = {"compare.json", "compare.html"}
    plot = {"compare.png"} if util.find_spec("matplotlib") else set()
    assert {path.name for path in (tmp_path / "a").iterdir()} == names | plot
    found = json.loads((tmp_path / "a" / "compare.json").read_text())
    assert comparison_page(found) == (tmp_path / "a" / "compare.html").read_text()
    assert show(found) in printed
    monkeypatch.setattr(compare_page, "find_spec", lambda _: None)
    assert "pip install matplotlib" in compare_page.write_comparison(found, tmp_path / "b")[-1]
    assert {path.name for path in (tmp_path / "b").iterdir()} == names


def test_a_place_for_the_files_is_looked_for_first(made, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("ptq.compare.compare_checkpoints", None)
    (tmp_path / "file").write_text("")
    assert cli.main([*compare_arguments(made), "--out", str(tmp_path / "file")]) == 2
    assert "choose another --out" in capsys.readouterr().err


def test_the_plot_is_a_picture(document, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    compare_page.draw(document, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.fixture
def files(made, tmp_path):
    """A configuration and variants in files, as a person writes them."""
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {made / 'parent'}\noutput: unused\nmethod: rtn\ngroup_size: 32\nformat: compressed-tensors\n"
        f"device: cpu\ncalibration:\n  dataset: {{files: [{TEXT}]}}\n  samples: 8\n  sequence_length: 48\n"
        f"gptq: {{damping: 0.02}}\nevaluation: {{files: [{TEXT}], tokens: 64, window: 32, stride: 32}}\n"
    )
    variants = tmp_path / "variants.yaml"
    variants.write_text(
        "three: {bits: 3, gptq: {sweeps: 0}}\n"
        "budget: {bits: {budget: 3.5}}\n"
        "more: {bits: {budget: 4.5}, overrides: {mlp.down_proj: {group_size: 64}}}\n"
        "less: {bits: {budget: 2.5}}\n"
    )
    return str(config), str(variants)


def test_a_sweep_shares_what_it_can(files, made, tmp_path, monkeypatch) -> None:
    """Text once; one measurement for two budgets that differ in nothing else; codes as those of runs alone."""
    counted = {"measure": 0, "calibration_batches": 0}
    for name in counted:
        original = getattr(ptq.prepared, name)

        def count(*args, name=name, original=original):
            counted[name] += 1
            return original(*args)

        monkeypatch.setattr(f"ptq.prepared.{name}", count)
    configs = load_variants(*files, tmp_path / "out")
    assert configs["three"].gptq.sweeps == 0
    assert configs["three"].gptq.damping == 0.02  # a nested mapping adds to what is there
    progress = io.StringIO()
    document = sweep(configs, progress=Progress(progress))
    assert counted == {"measure": 2, "calibration_batches": 1}
    assert list(document["models"]) == ["parent", "three", "budget", "more", "less"]
    for name in configs:
        report = json.loads((tmp_path / "out" / name / "report.json").read_text())
        row = document["models"][name]
        result = report["evaluation"]["models"]["result"]
        assert result == {key: row[key] for key in ("perplexity", "kl", "top1", "megabytes")}
        assert f"{row['kl']:.5f}" in (tmp_path / "out" / name / "report.html").read_text()
    run(replace(configs["budget"], output=str(tmp_path / "alone"), evaluation=None))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("alone", "out/budget")]
    assert weights[0] == weights[1]
    progress.truncate(0)
    again = sweep(configs, progress=Progress(progress))
    assert again["models"] == document["models"]
    assert progress.getvalue().count("kept, ") == 4
    made = tmp_path / "out" / "three" / "ptq_config.yaml"
    text = made.read_text()
    assert "  model_steps: 0\n" in text
    made.write_text(text.replace("  model_steps: 0\n", ""))  # as a version without that option wrote it
    assert finished(replace(configs["three"], evaluation=None), Prepared())
    budget = replace(configs["budget"], evaluation=None)
    assert finished(budget, Prepared())
    report = Path(budget.output) / "report.json"
    hashed = json.loads(report.read_text())["calibration"]["token_hash"]
    report.write_text(report.read_text().replace(hashed, "0" * len(hashed)))  # as on what the file held before
    assert not finished(budget, Prepared())
    made.write_text(text.replace("model_steps", "other_steps"))
    assert not finished(replace(configs["three"], evaluation=None), Prepared())


def test_a_variant_is_kept_where_it_is_whole(files, tmp_path) -> None:
    """And what a kill left beside it is removed then; without its report or with a shard cut short it is not kept."""
    (tmp_path / "one.yaml").write_text("a: {method: rtn}\n")
    configs = load_variants(files[0], str(tmp_path / "one.yaml"), tmp_path / "out")
    sweep(configs)
    config, place = replace(configs["a"], evaluation=None), tmp_path / "out" / ".a.run"
    (place / "blocks").mkdir(parents=True)
    for name in ("published", "run.json", "blocks/0000.json"):
        (place / name).write_text("")
    sweep(configs)
    assert not place.exists()
    report, weights = (tmp_path / "out" / "a" / name for name in ("report.json", "model.safetensors"))
    assert finished(config, Prepared())
    kept = report.read_text()
    for spoilt in (None, "[]", "{}"):
        report.write_text(spoilt) if spoilt else report.unlink()
        assert not finished(config, Prepared())
    report.write_text(kept)
    weights.write_bytes(weights.read_bytes()[:-1])
    assert not finished(config, Prepared())
    with pytest.raises(ConfigError, match="exists; choose another --out or pass --overwrite"):
        sweep(configs)


def test_figures_that_are_not_finite_are_written(document, tmp_path) -> None:
    """Of a checkpoint far off. Oracle: what the page says, and a JSON reader that takes no Infinity."""
    broken = json.loads(json.dumps(document))
    first = next(name for name in broken["models"] if name != "parent")
    broken["models"][first] |= {"perplexity": math.inf, "worst_layer": math.inf}
    broken["layers"][first][0] = math.inf
    write_comparison(broken, tmp_path)
    page = (tmp_path / "compare.html").read_text()
    assert '<td class="n">inf</td>' in page
    assert page.count("Not drawn: 1 that are not finite.") == 2
    written = json.loads((tmp_path / "compare.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert written["models"][first]["perplexity"] is None


def test_the_sweep_on_the_command_line(files, tmp_path, capsys) -> None:
    (tmp_path / "two.yaml").write_text("a: {method: rtn, bits: 8}\nb: {method: rtn, bits: 2}\n")
    arguments = ["sweep", "--config", files[0], "--variants", str(tmp_path / "two.yaml"), "--out", str(tmp_path / "o")]
    assert cli.main([*arguments, "--set", "evaluation.window=16", "--set", "evaluation.stride=16"]) == 0
    assert "window 16" in capsys.readouterr().out
    assert {"a", "b", "compare.json", "compare.html"} <= {path.name for path in (tmp_path / "o").iterdir()}


@pytest.mark.parametrize("given", [[], ["--stride", "16"]])
def test_the_stride_of_a_comparison(made, capsys, given) -> None:
    """Oracle: the evaluation of one checkpoint at the same protocol."""
    checkpoint = str(made / "three")
    protocol = ["--parent", str(made / "parent"), "--text", str(TEXT), "--tokens", "128", "--window", "32", *given]
    assert cli.main(["eval", checkpoint, *protocol]) == 0
    evaluated = capsys.readouterr().out
    assert cli.main(["compare", checkpoint, *protocol]) == 0
    compared = capsys.readouterr().out
    said = f"window 32, stride {given[1] if given else 32}"
    figure = next(line for line in evaluated.splitlines() if line.startswith("result")).split()[2]
    assert all(text in compared for text in (said, figure))
    assert said in evaluated
    assert cli.main(["compare", checkpoint, *protocol, "--stride", "33"]) == 2
    assert "--stride must be at most --window (32), found 33" in capsys.readouterr().err


WRONG = {
    "[]": "must map names to changed keys",
    "": "must map names to changed keys",
    "a/b: {}": "that of its directory",
    "parent: {}": "that of its directory",
    "1: {}": "that of its directory",
    "compare.html: {}": "that of its directory",
    "a: 3": "must map keys to values",
    "a: {model: other}": "changes model, which is the same for all",
    "a: {evaluation.tokens: 3}": "changes evaluation.tokens",
    "a: {bitz: 3}": "unknown key bitz",
    "a: {bits: 5}": "bits must be",
    "a: {bits: 2020-01-01}": r"bits must be a whole number, found datetime.date\(2020, 1, 1\)",
    "a: {exclude: !!set {lm_head}}": "exclude must be a list, found {'lm_head'}",
    "a: {2020-01-01: 3}": "unknown key 2020-01-01",
    "a: &a {gptq: *a}": "recursive",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_variants_are_named(text, files, tmp_path) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ConfigError, match=WRONG[text]):
        load_variants(files[0], str(tmp_path / "wrong.yaml"), tmp_path / "out")


def test_variants_are_what_a_configuration_would_be(files, tmp_path) -> None:
    """Values of every kind come through the assignments; so does an output that ASCII cannot hold."""
    (tmp_path / "kinds.yaml").write_text(
        "a: {bits: {budget: 3.5}, overrides: {down_proj: {bits: 8, group_size: 64}}, gptq: {damping: 1e-2}, "
        "exclude: [lm_head, 'a: b'], max_shard_size: '800KB'}"
    )
    out = tmp_path / f"\N{PILE OF POO} é {'x y' * 40}"
    (config,) = load_variants(files[0], str(tmp_path / "kinds.yaml"), out).values()
    assert config.output == str(out / "a")
    assert config.bits.budget == 3.5
    assert config.overrides == {"down_proj": SchemeOverride(8, 64)}
    assert (config.gptq.damping, config.exclude, config.max_shard_size) == (0.01, ("lm_head", "a: b"), "800KB")


def test_a_window_beyond_the_context_is_refused_before_anything_is_made(files, made, tmp_path, monkeypatch) -> None:
    configs = load_variants(*files, tmp_path / "out", [f"evaluation={{files: [{TEXT}], window: 256, stride: 256}}"])
    monkeypatch.setattr("ptq.sweep.quantize", None)
    with pytest.raises(ConfigError, match="evaluation.window must be at most the model's context of 128 tokens"):
        sweep(configs, progress=Progress(io.StringIO()))
    settings = EvaluationConfig(files=(str(TEXT),))
    with pytest.raises(ConfigError, match="--window must be at most the model's context of 128 tokens; found 512"):
        compare_checkpoints([str(made / "four")], str(made / "parent"), settings, device="cpu")


def test_a_sweep_needs_text_and_files(files, tmp_path) -> None:
    with pytest.raises(ConfigError, match="compares on held-out text"):
        load_variants(*files, tmp_path / "out", ["evaluation=null"])
    (tmp_path / "binary.yaml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="readable UTF-8"):
        load_variants(files[0], str(tmp_path / "binary.yaml"), tmp_path / "out")


def test_nothing_is_computed_when_a_later_variant_cannot_be_made(files, tmp_path, monkeypatch) -> None:
    (tmp_path / "wrong.yaml").write_text("a: {bits: 3}\nb: {format: awq, bits: {budget: 3}}\n")
    configs = load_variants(files[0], str(tmp_path / "wrong.yaml"), tmp_path / "out")
    monkeypatch.setattr("ptq.sweep.quantize", None)
    with pytest.raises(ConfigError, match="awq holds one"):
        sweep(configs, progress=Progress(io.StringIO()))


def test_nothing_is_computed_when_a_later_output_is_in_the_way(files, tmp_path, monkeypatch) -> None:
    (tmp_path / "two.yaml").write_text("a: {method: rtn, bits: 3}\nb: {method: rtn, bits: 2}\n")
    configs = load_variants(files[0], str(tmp_path / "two.yaml"), tmp_path / "out")
    (tmp_path / "out" / "b").mkdir(parents=True)
    (tmp_path / "out" / "b" / "notes.txt").write_text("mine")
    monkeypatch.setattr("ptq.sweep.quantize", None)
    for overwrite, message in ((False, "out/b exists"), (True, "no config.json")):
        with pytest.raises(ConfigError, match=message):
            sweep(configs, overwrite=overwrite, progress=Progress(io.StringIO()))
