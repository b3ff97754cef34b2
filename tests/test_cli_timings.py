"""``ptq bench`` and ``ptq tune`` as a person types them: what is timed, printed and refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import run, settings

import ptq
from ptq import cli
from ptq.nn.linear import QuantLinear

MODEL = Path(__file__).resolve().parent.parent / "examples" / "tiny-llama"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("timings") / "made"
    run(settings(MODEL, output, "rtn"))
    return output


def test_bench_prints_and_writes_its_figures(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "bench.json"
    arguments = ["--shapes", "256x128", "--rows", "1", "--json", str(figures)]
    assert cli.main(["bench", "--device", "cpu", *arguments]) == 0
    assert "256" in capfd.readouterr().out
    assert json.loads(figures.read_text())["cells"]


def test_bench_writes_its_figures_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As the other commands: through a link, beside the file and then in its place, and nothing after a failure."""
    figures, link = tmp_path / "bench.json", tmp_path / "link.json"
    figures.write_text("before")
    before = figures.stat().st_ino
    link.symlink_to(figures)
    arguments = ["bench", "--shapes", "128x64", "--rows", "1", "--json"]
    assert cli.main([*arguments, str(link)]) == 0
    assert link.is_symlink()
    assert json.loads(figures.read_text())["cells"]
    assert figures.stat().st_ino != before
    assert cli.main([*arguments, "/dev/stdout"]) == 0
    assert '"cells"' in capfd.readouterr().out
    written = figures.read_bytes()
    monkeypatch.setattr("ptq_kernels.bench_cpu.main", lambda *options: Path(options[3]).write_text("half") and 3)
    assert cli.main([*arguments, str(figures)]) == 3
    assert figures.read_bytes() == written


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shapes", "4096"], "a shape is KxN, K a multiple of 128 and N at least 1, found '4096'"),
        (["--shapes", "100x64"], "a shape is KxN, K a multiple of 128 and N at least 1, found '100x64'"),
        (["--rows", "0"], "a whole number of at least 1 is required, found '0'"),
        (["--threads", "100000"], "threads have a processor each here, found 100000"),
        (["--threads", "two"], "a whole number of at least 1 is required, found 'two'"),
    ],
)
def test_bench_refuses_what_it_cannot_time(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", *arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing on a machine without a GPU")
def test_tune_needs_a_gpu(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", str(checkpoint)]) == 2
    said = capsys.readouterr().err
    assert "tune times the kernels on a CUDA GPU, this machine has none; on a CPU there is nothing to tune" in said


def test_tune_prints_what_it_timed_for_every_shape_that_is_loaded(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a clock of its own. Oracle: the shapes of the file, alone and as ptq.load(fuse=True) joins them."""
    tuner = pytest.importorskip("ptq_kernels.triton.tune")
    asked: dict[tuple[int, int], set[tuple[int, int]]] = {}

    def clock(shapes: Any, *, bits: int, group_size: int, **_options: Any) -> Any:
        asked[bits, group_size] = set(shapes)
        if bits == 8:
            raise tuner.NothingToTuneError("nothing to tune there")
        problem = tuner.Problem(bits, 32, 16, *next(iter(shapes)))
        return {problem: (tuner.plans(tuner.Gpu(90, 132), problem)[0]._replace(early=1), 12.34)}

    monkeypatch.setattr(tuner, "tune_device", clock)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cli.main(["tune", str(checkpoint), "--head-bits", "8"]) == 0
    fused = ptq.load(checkpoint, device="cpu", fuse=True, head_bits=8)
    plain = ptq.load(checkpoint, device="cpu")
    want: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for model in (fused, plain):
        for module in model.modules():
            if isinstance(module, QuantLinear):
                shape = (module.out_features, module.in_features)
                want.setdefault((module.bits, module.group_size), set()).add(shape)
    assert asked == want
    said = capsys.readouterr().out
    assert "16 rows: tile 16x128x64, 1 splits, begins early, 12.3 us" in said
    assert "8 bits, groups of" in said
    assert "nothing to tune there" in said
