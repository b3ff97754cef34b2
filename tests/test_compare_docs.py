"""Every command in docs/compare.md runs as it stands there. Oracle: exit code 0 and the files that the text names."""

import re
import shlex
from pathlib import Path

from ptq import cli
from ptq.yaml_tree import parse

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.+?)```", TEXT, re.DOTALL) for line in block.splitlines()]
WRITTEN = [
    "compare/compare.json",
    "compare/compare.html",
    "sweep/compare.html",
    "sweep/three/report.html",
    "sweep/four-small-groups/report.html",
    "sweep/rounding/report.html",
    "three.html",
]


def test_the_commands_run(tmp_path, monkeypatch):
    """In a directory that looks like the repository's root and may be written to."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    assert len(COMMANDS) == 4
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        assert program == "ptq"
        assert cli.main(arguments) == 0
    for name in WRITTEN:
        assert (tmp_path / "out" / name).is_file()


def test_the_variants_shown_are_those_in_the_file():
    shown = [parse(block, "docs") for block in re.findall(r"```yaml\n(.+?)```", TEXT, re.DOTALL)]
    assert parse((ROOT / "examples/variants.yaml").read_text(), "file") in shown
