"""Every command in docs/compare.md runs as it stands there. Oracle: exit code 0 and the files that the text names."""

import argparse
import re
import shlex
from pathlib import Path

from ptq import cli
from ptq.cli_compare import sweep_arguments
from ptq.sweep import load_variants
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


def test_the_command_of_the_budgets_table_describes_its_rows(monkeypatch):
    """It takes minutes, so that only its configurations are made. Oracle: the widths in the table."""
    monkeypatch.chdir(ROOT)
    (command,) = re.findall(r"```\n(ptq sweep .+)\n```", TEXT)
    parser = argparse.ArgumentParser()
    sweep_arguments(parser)
    options = parser.parse_args(shlex.split(command)[2:])
    configs = load_variants(options.config, options.variants, Path(options.out), options.overrides)
    rows = {name: float(bits) for name, bits in re.findall(r"^\| `(\w+)`: .*? \| ([\d.]+) \|", TEXT, re.MULTILINE)}
    assert {name: getattr(c.bits, "budget", c.bits) for name, c in configs.items()} == rows
    assert all((c.calibration.samples, c.calibration.sequence_length) == (64, 512) for c in configs.values())
    assert all(c.evaluation.tokens == 16384 for c in configs.values())
