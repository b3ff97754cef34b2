"""Pages for people: what they say, that nothing breaks out of its place, and that a browser shows them.

Oracles: an HTML parser that knows which elements close; arithmetic on the places of points; a real browser.
"""

import copy
import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from ptq_kernels import chosen
from tiny_models import TEXT, build, run, save, settings

import ptq
from ptq import cli
from ptq.card import model_card
from ptq.config import BitBudget, EvaluationConfig
from ptq.errors import FormatError
from ptq.lint import lint
from ptq.nn import QuantLinear
from ptq.page import Series, chart, facts, folded, listing, page, paragraph, section, table
from ptq.page_report import report_page
from ptq.page_scale import TICKS, linear_scale, log_scale
from ptq.report import read_report

VOID = {"meta", "line", "polyline"}  # closed by themselves
NASTY = "<script>alert(1)</script>&\"'"


class Reader(HTMLParser):
    """Collects text and elements; fails on what is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check_self_contained(text: str) -> Reader:
    """One file: no script, no reference to anything else."""
    read = Reader(text)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in read.elements}
    assert not re.search(r"url\(|@import|https?://", text)
    for _, attributes in read.elements:
        assert not {"src", "href", "onload", "onclick"} & set(attributes)
    return read


def test_every_text_is_escaped() -> None:
    parts = [
        section(NASTY, paragraph(NASTY), facts({NASTY: NASTY}), table([NASTY, NASTY], [[NASTY, NASTY]])),
        folded(NASTY, listing(NASTY)),
        chart([Series(NASTY, [(0, 1), (1, 2)]), Series("b", [(0, 1)], False, NASTY)], x=NASTY, y=NASTY),
    ]
    read = check_self_contained(page(NASTY, NASTY, parts))
    said = [text for text in read.text if NASTY in text]
    # title, h1, lead, h2, paragraph, two facts, four cells, summary, listing, axes, label, two points' titles, legend
    assert len(said) >= 16
    assert {"style": "fill: var(--c0)"}.items() <= next(a for tag, a in read.elements if tag == "circle").items()


def test_a_page_has_both_colour_schemes() -> None:
    text = page("t", "l", [])
    assert "prefers-color-scheme: dark" in text
    assert ("meta", {"name": "color-scheme", "content": "light dark"}) in Reader(text).elements
    light, _, dark = text.partition("prefers-color-scheme: dark")
    for palette in (light, dark):
        assert all(f"--c{i}: #" in palette for i in range(8))


@pytest.mark.parametrize("values", [[3.0], [0.0], [-5.0, 5.0], [1e-9, 2e-9], [1.0, 1e6], [0.5, 0.50001]])
def test_linear_axes(values: list[float]) -> None:
    scale = linear_scale(values, 10, 110)
    places = [scale(value) for value in values]
    assert all(10 <= place <= 110 for place in places)
    assert places == sorted(places)
    assert 1 <= len(scale.ticks) <= TICKS + 1
    for value, text in scale.ticks:
        assert 10 - 1e-6 <= scale(value) <= 110 + 1e-6
        assert float(text) == pytest.approx(value, abs=1e-6 * (scale.high - scale.low))


@pytest.mark.parametrize("values", [[3.0], [1e-7, 2e-7], [1e-6, 3.0], [1e-30, 1e30], [0.9, 1.1]])
def test_logarithmic_axes(values: list[float]) -> None:
    scale = log_scale(values, 100, 0)
    places = [scale(value) for value in values]
    assert all(0 <= place <= 100 for place in places)
    assert places == sorted(places, reverse=True)
    assert len(scale.ticks) <= TICKS
    middle = math.sqrt(scale.low * scale.high)
    assert scale(middle) == pytest.approx(50)
    assert all(float(text) == pytest.approx(value) for value, text in scale.ticks)


def test_axes_that_count_have_whole_labels() -> None:
    assert [text for _, text in linear_scale([0, 1], 0, 1, whole=True).ticks] == ["0", "1"]
    assert all(float(text).is_integer() for _, text in linear_scale([0, 79], 0, 1, whole=True).ticks)


def test_points_stand_where_the_axes_say() -> None:
    read = Reader(chart([Series("a", [(0, 1.0), (1, 0.1), (2, 0.0)])], x="x", y="y", log=True, whole=True))
    circles = [attributes for tag, attributes in read.elements if tag == "circle"]
    assert len(circles) == 2  # 0 has no logarithm
    grid = [a for tag, a in read.elements if tag == "line" and a["x1"] != a["x2"]]
    labels = [text for text in read.text if re.fullmatch(r"[\d.]+", text.strip())]
    heights = dict(zip(labels, [float(a["y1"]) for a in grid], strict=False))
    assert float(circles[0]["cy"]) == pytest.approx(heights["1"], abs=0.1)
    assert float(circles[1]["cy"]) == pytest.approx(heights["0.1"], abs=0.1)


def test_nothing_to_draw_is_said() -> None:
    assert "Nothing to draw" in chart([Series("a", [(0, 0.0)])], x="x", y="y", log=True)
    assert "Nothing to draw" in chart([], x="x", y="y")
    assert "no finite values" in chart([Series("a", [(0, math.inf)])], x="x", y="y")


@pytest.mark.parametrize("log", [False, True])
def test_what_is_not_finite_is_counted_and_not_drawn(log: bool) -> None:
    points = [(0, 1.0), (1, math.inf), (2, 3.0), (3, math.nan)]
    drawn = chart([Series("a", points)], x="x", y="y", log=log)
    assert "Not drawn: 2 that are not finite." in drawn
    assert drawn.count("<circle") == 2


def test_experts_are_one_line_and_named_in_short() -> None:
    names = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in (0, 1) for expert in range(8)]
    losses = {name: 0.5 ** (index % 8) for index, name in enumerate(names)}
    document = {
        "modules": {name: {"relative_loss": loss} for name, loss in losses.items()},
        "budget": {
            "budget": 3, "average_bits": 3.0, "widths": [3], "predicted_kl": 0.1,
            "groups": [
                {"modules": names[:8], "bits": 3, "predicted_kl": {"3": 0.1}, "predicted_relative_loss": losses}
            ],
        },
    }  # fmt: skip
    read = Reader(report_page("t", document))
    assert sum(tag == "circle" for tag, _ in read.elements) == 2
    mean = sum(0.5**i for i in range(8)) / 8
    assert f"mlp.experts.*.up_proj: 1, {mean:.4g}" in read.text
    assert any("experts.5.up_proj and 2 more" in text for text in read.text)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with a budget and an evaluation, so that its report has every section."""
    root = tmp_path_factory.mktemp("page")
    parent = save(build("llama", torch.bfloat16), root / "parent")
    evaluation = EvaluationConfig(files=(str(TEXT),), tokens=96, window=32, stride=32)
    config = settings(parent, root / "out", bits=BitBudget(3.5), format="compressed-tensors", evaluation=evaluation)
    run(config)
    return root / "out"


def test_every_run_writes_its_page(made: Path) -> None:
    report = json.loads((made / "report.json").read_text())
    text = (made / "report.html").read_text()
    assert text == report_page("out", report)
    said = " ".join(check_self_contained(text).text)
    for heading in ("Quality", "Loss by layer", "Bit budget", "Time and memory", "Linears", "Configuration"):
        assert heading in said
    result = report["evaluation"]["models"]["result"]
    for figure in (f"{result['perplexity']:.3f}", f"{result['kl']:.5f}", f"{report['size']['bits_per_weight']:.3f}",
                   report["versions"]["torch"], '"budget": 3.5', "model.layers.1.mlp.down_proj", "solve",
                   "peak memory, GB, libraries and mapped files included"):  # fmt: skip
        assert figure in said


def test_the_page_says_what_the_columns_are() -> None:
    document = {"seconds": {"solve": 1.0}, "hardware": {"device": "cpu", "columns": "amx", "processes": 1}}
    said = " ".join(check_self_contained(report_page("out", document)).text)
    assert "device cpu, library that solved GPTQ's columns: amx, processes 1" in said


@pytest.mark.parametrize(("on_gpu", "kind"), [({}, "without libraries and mapped files"),
                                              ({"peak_on_gpu": 410_000_000}, "on the GPU")])  # fmt: skip
def test_the_page_says_what_was_predicted_and_used(on_gpu: dict[str, int], kind: str) -> None:
    prediction = {"memory": {"predicted": 450_000_000, "actual": 410_000_000},
                  "seconds": {"predicted": 3.54, "actual": 2.31}}  # fmt: skip
    document = {"seconds": {"solve": 2.2}, "peak_bytes": {"solve": 1_250_000_000}, "prediction": prediction,
                "memory": on_gpu}  # fmt: skip
    said = " ".join(check_self_contained(report_page("out", document)).text)
    assert f"3.5 s predicted, 2.3 s taken; peak memory {kind} 0.45 GB predicted, 0.41 GB used." in said
    assert "solve 2.2 1.25" in said
    assert ("solve, on the GPU 0.41" in said) == bool(on_gpu)


def test_the_page_tells_the_kernels_of_the_evaluation_from_those_of_a_loaded_model(made: Path) -> None:
    """Oracle: what `ptq.load` chooses for this checkpoint."""
    kernels = json.loads((made / "report.json").read_text())["kernels"]
    model = ptq.load(made)
    layers = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
    assert set(kernels["evaluation"]) == {f"cpu on cpu, {layer.bits} bits, layout canonical" for layer in layers}
    assert {key.partition(", ")[2] for key in kernels["ptq.load"]} == {
        f"{layer.bits} bits, layout {layer.layout}" for layer in layers
    }
    model(torch.ones(1, 2, dtype=torch.long))
    assert kernels["ptq.load"].items() <= chosen().items()
    said = " ".join(check_self_contained((made / "report.html").read_text()).text)
    for (user, key), how in {(user, key): how for user, rows in kernels.items() for key, how in rows.items()}.items():
        assert f"{user} cpu cpu {key.partition(', ')[2]} {how}" in said
    assert "so its rows are what a loaded model runs with" in said
    earlier = " ".join(check_self_contained(report_page("out", {"kernels": kernels["evaluation"]})).text)
    assert "evaluation cpu cpu 3 bits, layout canonical" in earlier
    assert "ptq.load" not in earlier


def test_inspect_writes_a_page(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(made), "--html", str(tmp_path / "a.html")]) == 0
    printed = capsys.readouterr().out
    assert "14 Linears" in printed
    assert printed.endswith(f"page        {tmp_path / 'a.html'}\n")
    assert (tmp_path / "a.html").read_text() == (made / "report.html").read_text()
    bare = tmp_path / "bare"
    shutil.copytree(made, bare, ignore=shutil.ignore_patterns("report.*"))
    assert cli.main(["inspect", str(bare), "--html", str(tmp_path / "b.html")]) == 0
    said = " ".join(check_self_contained((tmp_path / "b.html").read_text()).text)
    assert "14 quantized Linears" in said
    assert "In float: lm_head." in said
    assert "Quality" not in said
    assert cli.main(["inspect", str(made.parent / "parent"), "--html", str(tmp_path / "c.html")]) == 0
    assert "quantized Linears" not in check_self_contained((tmp_path / "c.html").read_text()).text


def places(value: object, at: tuple = ()) -> Iterator[tuple]:
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*at, key))


def test_a_report_with_values_of_other_types_is_refused_or_read(made: Path, tmp_path: Path) -> None:
    """Oracle: whatever stands in place of each value of a real report, nothing but a FormatError comes of it."""
    report = json.loads((made / "report.json").read_text())
    report["modules"] = dict([*report["modules"].items()][:1])  # one of each kind is enough
    report["budget"]["groups"] = report["budget"]["groups"][:1]
    linted = lint(made)
    refused = []
    for *path, last in filter(None, places(report)):
        for wrong in ("x", 1, None, [], [None], {"x": None}, 10**400):
            document = copy.deepcopy(report)
            holder = document
            for key in path:
                holder = holder[key]
            holder[last] = wrong
            (tmp_path / "report.json").write_text(json.dumps(document))
            try:
                read = read_report(tmp_path / "report.json")
            except FormatError as error:
                refused.append((str(error), f"report.json: {path[0] if path else last}"))
                continue
            report_page("x", read)
            model_card("a/b", read, linted)
    assert len(refused) > 500
    assert all(key in said for said, key in refused)


def test_whoever_reads_a_report_checks_it(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(made, changed)
    report = json.loads((changed / "report.json").read_text())
    (changed / "report.json").write_text(json.dumps({**report, "modules": {"a": "x"}}))
    for command in (["inspect", str(changed), "--html", str(tmp_path / "a.html")],
                    ["push", str(changed), "--repo", "a/b", "--dry-run", "--out", str(tmp_path / "dry")],
                    ["compare", str(changed), "--parent", str(made.parent / "parent"), "--text", str(TEXT),
                     "--tokens", "64", "--window", "32"]):  # fmt: skip
        assert cli.main(command) == 1
        assert "report.json: modules.a must be an object, found 'x'" in capsys.readouterr().err


@pytest.mark.parametrize(("key", "value", "said"), [
    ("size", {"before": 1, "after": "x", "bits_per_weight": 4}, "size.after must be a whole number, found 'x'"),
    ("size", {"before": 1, "after": 1}, "size.bits_per_weight is required, found none"),
    ("modules", [], "modules must be an object, found []"),
    ("modules", {"a.b": {"bits": 4, "group_size": 8, "symmetric": 1}},
     "modules.a.b.symmetric must be true or false, found 1"),
    ("kept_in_float", ["a", None], "kept_in_float[1] must be text, found None"),
    ("seconds", {"solve": None}, "seconds.solve must be a number, found None"),
    ("parent", "a/b", "parent must be an object or null, found 'a/b'"),
])  # fmt: skip
def test_a_report_is_refused_by_file_and_key(tmp_path: Path, key: str, value: object, said: str) -> None:
    (tmp_path / "report.json").write_text(json.dumps({key: value}))
    with pytest.raises(FormatError) as caught:
        read_report(tmp_path / "report.json")
    assert str(caught.value) == (
        f"{tmp_path / 'report.json'}: {said}: the report was changed; correct it, or quantize again"
    )


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine: install Debian's package chromium")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_the_page(made: Path, tmp_path: Path, dark: bool) -> None:
    """The picture has the page's background in a corner, and ink; a log entry of the page would be an error."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
             "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=900,1400",
             "--enable-logging=stderr", *(["--blink-settings=preferredColorScheme=0"] if dark else [])]  # fmt: skip
    assert BROWSER is not None
    dump = [BROWSER, *flags, "--dump-dom", f"file://{made / 'report.html'}"]
    done = subprocess.run(dump, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    assert done.stdout.count("<circle") == 14
    shot = tmp_path / "page.png"
    picture = [BROWSER, *flags, f"--screenshot={shot}", f"file://{made / 'report.html'}"]
    subprocess.run(picture, capture_output=True, timeout=120, check=True)
    image = pytest.importorskip("PIL.Image").open(shot).convert("RGB")
    colours = {colour: count for count, colour in image.getcolors(900 * 1400)}
    background = image.getpixel((2, 2))
    assert background == ((22, 24, 27) if dark else (255, 255, 255))
    assert 0.5 < colours[background] / (900 * 1400) < 0.99
