"""``ptq eval --tasks``. Oracle: the answers that a plain forward pass finds most likely, without the harness."""

import io
import json
import sys
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
from ptq_kernels.cpu import units
from tiny_models import run, settings

import ptq
from ptq import cli, half_products, tasks
from ptq.errors import ConfigError, DataError
from ptq.models.loading import load_tokenizer
from ptq.progress import Progress
from ptq.tasks import TaskSettings, evaluate_tasks

ROOT = Path(__file__).resolve().parent.parent
PARENT = ROOT / "examples/tiny-llama"
OWN = str(ROOT / "examples/tasks")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    place = tmp_path_factory.mktemp("tasks") / "packed"
    run(settings(PARENT, place, "rtn", bits=2))
    return place


@pytest.fixture(autouse=True)
def own_files_only(monkeypatch, tmp_path):
    """The task names its data as seen from the root; the harness's own index would take ten seconds to read."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    manager = lm_eval.tasks.TaskManager

    def without_defaults(include_path, include_defaults):
        return manager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", without_defaults)


def capitals():
    return [json.loads(line) for line in (ROOT / "examples/tasks/capitals.jsonl").read_text().splitlines()]


@torch.no_grad()
def share_correct(directory, questions):
    """The model's choice is the city whose tokens have the largest log likelihood after the question."""
    model, tokenizer = ptq.load(directory, device="cpu"), load_tokenizer(Path(directory), False)
    correct = 0
    for row in questions:
        start = f"The capital of {row['country']} is"
        scores = []
        for city in row["cities"]:
            before, whole = tokenizer(start)["input_ids"], tokenizer(f"{start} {city}")["input_ids"]
            log = torch.log_softmax(model(input_ids=torch.tensor([whole])).logits[0].float(), -1)
            scores.append(sum(float(log[i - 1, whole[i]]) for i in range(len(before), len(whole))))
        correct += scores.index(max(scores)) == row["answer"]
    return correct / len(questions)


def test_figures_are_those_of_a_plain_forward_pass(checkpoint, tmp_path, capfd, caplog):
    written = tmp_path / "figures.json"
    arguments = ["--parent", str(PARENT), "--tasks", "capitals", "--include", OWN, "--json", str(written)]
    assert cli.main(["eval", str(checkpoint), *arguments]) == 0
    document = json.loads(written.read_text())["tasks"]
    want = {"parent": share_correct(PARENT, capitals()), "result": share_correct(checkpoint, capitals())}
    assert {name: found["capitals"]["acc"]["value"] for name, found in document["models"].items()} == want
    assert document["questions"] == {"capitals": 8}
    assert document["fewshot"] == {"capitals": 0}
    share = want["result"]
    # Of a share of n draws: sqrt(p (1 - p) / (n - 1)).
    assert document["models"]["result"]["capitals"]["acc"]["stderr"] == pytest.approx((share * (1 - share) / 7) ** 0.5)
    printed = capfd.readouterr()
    assert f"capitals acc  {want['parent']:.4f}" in printed.out
    assert "8 questions, 0 examples before each" in printed.out
    assert "Running loglikelihood requests: 100%" in printed.err
    assert "tasks of result:" in printed.err
    said = [record.getMessage() for record in caplog.records if record.name == "lm_eval.models.huggingface"]
    assert any("already-initialized model" in each for each in said)  # its other words are heard
    assert not any("launch via accelerate" in each for each in said)


def test_products_are_those_of_the_fast_way(monkeypatch):
    """On a processor without units for 16-bit floats."""
    taken, product = [], half_products._PRODUCTS[torch.ops.aten.mm.default]
    monkeypatch.setattr(units, "has_units", lambda _: False)
    counted = {torch.ops.aten.mm.default: lambda *args: (taken.append(1), product(*args))[1]}
    monkeypatch.setattr(half_products, "_PRODUCTS", {**half_products._PRODUCTS, **counted})
    few = TaskSettings(("capitals",), include=OWN, limit=2)
    evaluate_tasks({"parent": str(PARENT)}, few, device="cpu", dtype="bfloat16", progress=Progress(io.StringIO()))
    assert taken


def test_a_text_and_tasks_at_once(checkpoint, tmp_path, capsys):
    written = tmp_path / "figures.json"
    text = str(ROOT / "examples/text/eval-novel.txt")
    arguments = ["--tasks", "capitals", "--include", OWN, "--limit", "2", "--text", text, "--tokens", "256"]
    measure = ["--window", "128", "--json", str(written), "--fail-if", "perplexity<1"]
    assert cli.main(["eval", str(checkpoint), *arguments, *measure]) == 0
    document = json.loads(written.read_text())
    assert document["models"]["result"]["perplexity"] > 1
    assert document["tasks"]["questions"] == {"capitals": 2}
    assert document["tasks"]["models"]["result"]["capitals"]["acc"]["value"] == share_correct(
        checkpoint, capitals()[:2]
    )


def test_a_metric_without_an_error_and_one_behind_a_filter():
    """By the harness's naming: ``metric,filter``, and ``metric_stderr,filter`` beside it."""
    row = {
        "alias": "x",
        "sample_len": 3,
        "em,strict": 0.5,
        "em_stderr,strict": 0.1,
        "f1,none": 1,
        "f1_stderr,none": "N/A",
    }
    assert tasks._figures({"results": {"x": row}}) == {
        "x": {"em (strict)": {"value": 0.5, "stderr": 0.1}, "f1": {"value": 1.0, "stderr": None}}
    }


@pytest.mark.parametrize(("changes", "message"), [
    ({"names": ("capital",)}, "'capital' is not: did you mean capitals"),
    ({"names": ("capitals", "zzz")}, r"'zzz' is not \(1 are known\)"),
    ({"names": ()}, "found none"),
    ({"include": "nowhere"}, "none at nowhere"),
    ({"fewshot": -1}, "fewshot must be at least 0; found -1"),
    ({"limit": 0}, "limit must be at least 1; found 0"),
    ({"batch_size": 0}, "batch_size must be at least 1; found 0"),
    ({"chat_template": True}, "has none: leave it out"),
    ({"fewshot": 1000}, "must be able to run capitals as asked, it says: Sample larger than population"),
])  # fmt: skip
def test_what_cannot_be_run_is_a_sentence(changes, message):
    wanted = TaskSettings(("capitals",), OWN)._replace(**changes)
    with pytest.raises(ConfigError, match=message):
        evaluate_tasks({"result": str(PARENT)}, wanted, progress=Progress())


@pytest.mark.parametrize(("old", "new", "message"), [
    ("{{answer}}", "{{answer", "with the files in .*; it stops with TemplateSyntaxError: unexpected"),
    # only once it comes to the last question
    # which fails at the last question only
    ("{{country}}", "{{country.no.name if country == 'Egypt' else country}}",
     "templates of capitals .* must be Jinja that fits the questions; the harness stops with UndefinedError: 'str ob"),
    ('"{{answer}}"', "!function nowhere.answer", "with the files in .*; it stops with"),
    ("task: capitals", "task: [capitals", "a task file must be YAML, .*capitals.yaml is not: while parsing a flow"),
    ("task: capitals", "task: " + "[" * 3000, "a task file must be YAML, .*capitals.yaml is not: maximum recursion"),
    ("task: capitals", "task: !function x.y\nx: !!python/name:os.system ", "is not: could not determine a constr"),
    ("task: capitals", "task: \x07", "is not: unacceptable character #x0007"),
    ("capitals.jsonl", "no-such.jsonl", "with the files in .*; it stops with FileNotFoundError"),
])  # fmt: skip
def test_a_faulty_task_file_is_a_sentence(old, new, message, tmp_path):
    source = (ROOT / "examples/tasks/capitals.yaml").read_text()
    (tmp_path / "capitals.yaml").write_text(source.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        evaluate_tasks({"result": str(PARENT)}, TaskSettings(("capitals",), str(tmp_path)), progress=Progress())


def test_a_tokenizer_of_another_model_is_named(monkeypatch):
    """One whose tokens the model cannot embed, which would otherwise end in an index error, on a GPU in an assert."""

    def another(directory, trust_remote_code):
        tokenizer = load_tokenizer(directory, trust_remote_code)
        tokenizer.embedding_rows = 5
        return tokenizer

    monkeypatch.setattr(tasks, "load_tokenizer", another)
    with pytest.raises(DataError, match=r"must be below the model's vocabulary size of 5, found \d+: the tokenizer is"):
        evaluate_tasks({"result": str(PARENT)}, TaskSettings(("capitals",), OWN, limit=1), progress=Progress())


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "eval needs --text FILE or --tasks NAMES; found neither"),
    (["--text", "a.txt", "--limit", "3", "--chat-template"], "--limit, --chat-template need --tasks NAMES; found none"),
    (["--text", "a.txt", "--limit", "3"], "--limit needs --tasks NAMES; found none"),
    (["--tasks", "capitals", "--include", "no-such"], "--include must be a directory with task files; no-such is none"),
    (["--tasks", "capitals", "--fail-if", "perplexity>9"], "--fail-if needs --text FILE; found --tasks alone"),
])  # fmt: skip
def test_usage(arguments, message, capsys):
    assert cli.main(["eval", str(PARENT), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_the_harness_there_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert cli.main(["eval", str(PARENT), "--tasks", "capitals"]) == 2
    assert "pip install lm-eval" in capsys.readouterr().err
