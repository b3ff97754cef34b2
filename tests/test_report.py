"""The report's table, the progress display and the counting of memory."""

import io
import re
from pathlib import Path

import pytest
import torch
from ptq_kernels.cpu import library

from ptq.progress import Progress
from ptq.report import Report, anonymous_bytes, hardware, resident_bytes, start_counting_peak, summary, table, versions
from ptq.version import VERSION


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_table_is_aligned_and_marks_what_is_missing() -> None:
    text = table({"parent": {"a": 1.5, "b": None}, "x": {"a": 12.25, "b": 0.5}}, {"a": ".2f", "b": ".0%"})
    assert text == "\n".join(["            a    b", "------  -----  ---", "parent   1.50    -", "x       12.25  50%"])


def test_summary_says_where_things_are_and_what_was_rescued(tmp_path: Path) -> None:
    experts = {"m.e.0": {"tokens": 64, "routed": 64}, "m.e.1": {"tokens": 64, "routed": 3}}
    rows = {"m.a": {"rescues": ["float64"]}, "m.b": {"rescues": [], "tokens": 64}, **experts}
    document = {"size": {"bits_per_weight": 4.25, "before": 2_000_000, "after": 500_000}, "modules": rows}
    text = summary(Report(tmp_path / "out", document))
    assert "4 modules quantized, 4.250 bits a weight, 2.0 MB -> 0.5 MB" in text
    assert "1 modules needed a numerical rescue, see the report: m.a" in text
    assert "2 modules of experts, 1 of which few tokens were routed to and saw all tokens" in text
    assert str(tmp_path / "out" / "report.json") in text


def test_progress_without_a_terminal_is_plain_lines() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    with progress.stage("solve", 2):
        progress.module("model.layers.0")
        progress.step(0, 2, [0.25, 0.75], 1.25)
        progress.step(1, 2)
    progress.say("done")
    lines = stream.getvalue().splitlines()
    assert re.fullmatch(r"block 1/2: loss 0\.500 of rounding, 1\.2 s, \d+\.\d\d GB now", lines[0])
    assert re.fullmatch(r"solve: \d+\.\d s, \d+\.\d\d GB now", lines[1])
    assert abs(float(lines[1].split()[-3]) - anonymous_bytes() / 1e9) < 0.05
    assert lines[2:] == ["done"]
    assert "\x1b" not in stream.getvalue()
    assert list(progress.seconds) == ["solve"]


def test_progress_on_a_terminal_is_redrawn() -> None:
    stream = Terminal()
    progress = Progress(stream)
    with progress.stage("solve", 2):
        progress.module("model.layers.0")
        progress.step(0, 2, [0.5], 1.0)
    assert "\x1b[" in stream.getvalue()
    assert re.search(r"solve: \d+\.\d s", stream.getvalue())


def test_peak_counts_from_where_it_is_told_to() -> None:
    big = torch.ones(64 << 20, dtype=torch.uint8)  # 64 MiB, touched
    with_big = resident_bytes(peak=True)
    del big
    start_counting_peak()
    after = resident_bytes(peak=True)
    assert after <= with_big
    assert after >= resident_bytes() * 0.9  # a peak is not below the present; pages come and go meanwhile


def test_versions_and_hardware_name_what_a_result_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert versions()["ptq"] == VERSION
    assert versions()["torch"] == torch.__version__
    assert hardware(torch.device("cpu"))["threads"] == torch.get_num_threads()
    monkeypatch.setattr(library, "best", lambda: None)
    assert hardware(torch.device("cpu"))["columns"] == "torch"
