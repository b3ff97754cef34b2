"""Every ``ptq`` command in docs/gguf.md runs as it stands there, on tiny random models under the names the text uses.

Oracle: exit code 0 and the files that the text names.
"""

import re
import shlex
from pathlib import Path

import torch
from tiny_models import ROOT, TEXT, build, run, save, settings

from ptq import cli

BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)


def test_the_commands_of_the_page_run(tmp_path, monkeypatch):
    page = (ROOT / "docs/gguf.md").read_text(encoding="utf-8")
    commands = [shlex.split(line, comments=True) for block in BLOCK.findall(page) for line in block.splitlines()]
    assert [command[:2] for command in commands] == [["ptq", "export"]] * 3
    monkeypatch.chdir(tmp_path)
    Path("examples/text").mkdir(parents=True)
    Path("examples/text/calibration.txt").write_text(TEXT.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    save(build("llama", torch.bfloat16), Path("examples/tiny-llama"))
    run(settings(Path("examples/tiny-llama"), Path("out/demo"), method="rtn"))
    for command in commands:
        assert cli.main(command[1:]) == 0
    for name in ("tiny-llama-Q4_K_M", "demo-Q4_0", "demo-Q4_K_M"):
        assert Path(f"out/{name}.gguf").is_file()
