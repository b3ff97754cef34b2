"""Where a configuration may come from, and where the paths in it count from. Oracle: the same text as a file."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ptq.config import load_config
from ptq.config_paths import SHIPPED, find_files, resolve_config_path
from ptq.errors import ConfigError
from ptq.sweep import load_variants

ROOT = Path(__file__).resolve().parent.parent
TEXT = "{model: some/model, output: out, method: rtn, bits: 4, evaluation: {files: [text.txt], tokens: 512}}"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "run.yaml").write_text(TEXT)
    return tmp_path


def pipe(text: str) -> str:
    """As a shell gives it for ``<(...)``."""
    reading, writing = os.pipe()

    def write() -> None:
        with open(writing, "w") as file:
            file.write(text)

    threading.Thread(target=write).start()
    return f"/dev/fd/{reading}"


def test_a_configuration_may_come_through_a_pipe(place: Path) -> None:
    assert load_config(pipe(TEXT), ["bits=3"]) == load_config("run.yaml", ["bits=3"])


def test_all_variants_of_a_sweep_have_the_one_text_of_a_pipe(place: Path) -> None:
    variants = "{three: {bits: 3}, four: {bits: 4}}"
    (place / "variants.yaml").write_text(variants)
    found = load_variants(pipe(TEXT), pipe(variants), Path("out"))
    assert found == load_variants("run.yaml", "variants.yaml", Path("out"))
    assert list(found) == ["three", "four"]


def test_standard_input(place: Path) -> None:
    code = "import sys; from ptq.config import load_config; print(load_config('/dev/stdin').bits)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, "-c", code], input=TEXT, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr


def test_a_directory_is_no_configuration(place: Path) -> None:
    (place / "demo.yaml").mkdir()
    assert load_config("demo.yaml", [f"calibration.dataset.files=[{place / 'text.txt'}]"]).bits == 4, "the shipped one"
    for name in ("configs", str(place)):
        (place / "configs").mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match=f"must be a file of YAML; {name} is a directory: name a file in it"):
            load_config(name)
    with pytest.raises(ConfigError, match="no configuration file at /dev/zero"):  # which never ends
        load_config("/dev/zero")


def test_relative_paths_count_from_the_working_directory(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = ": a relative one counts from the working directory, wherever the configuration is"
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    for change, required in ((), "evaluation.files must name files"), (("model=./no", "evaluation=null"), "model must"):
        with pytest.raises(ConfigError, match=required) as caught:
            load_config("../run.yaml", change)
        assert str(caught.value).endswith(said)
    with pytest.raises(ConfigError, match="check the path$"):
        load_config("../run.yaml", ["evaluation.files=[/no/text.txt]"])
    above = re.escape(str(SHIPPED.resolve().parent))
    shipped = f"working directory and, as this configuration comes with ptq, from {above}$"
    for change in ("calibration.dataset.files=[no.txt]", "model=./no"):
        with pytest.raises(ConfigError, match=shipped):
            load_config("demo.yaml", [change])
    (place / "elsewhere" / "text.txt").write_text("text")
    assert load_config("../run.yaml").evaluation.files == ("text.txt",)


def test_patterns_of_files_are_not_expanded(tmp_path):
    """A name with such a character in it may be there."""
    (tmp_path / "a[1].txt").touch()
    with pytest.raises(ConfigError, match=r"found none at \S+/\*.txt: patterns are not expanded, name each file"):
        find_files(["*.txt"], "files", [tmp_path])
    assert find_files(["a[1].txt"], "files", [tmp_path]) == (str(tmp_path / "a[1].txt"),)


@pytest.mark.parametrize("name", ["no-such.txt", "/x/no-such.txt"])
def test_a_place_that_was_looked_at_twice_is_named_once(name, monkeypatch):
    monkeypatch.chdir(ROOT / "ptq")  # where the paths of shipped configurations count from
    place = re.escape(str(Path(name).absolute()))
    with pytest.raises(ConfigError, match=f"found none at {place}; check the path"):
        find_files([name], "files", [Path(), Path.cwd()])
    monkeypatch.chdir(ROOT / "ptq/configs")
    with pytest.raises(ConfigError, match=r"no configuration file at \S+/dmeo.yaml; did you mean"):
        resolve_config_path("dmeo.yaml")


def test_a_missing_file_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        resolve_config_path("dmeo.yaml")
    message = str(caught.value)
    assert str(tmp_path / "dmeo.yaml") in message
    assert str(ROOT / "ptq/configs/dmeo.yaml") in message
    assert "did you mean demo.yaml?" in message
    with pytest.raises(ConfigError) as caught:
        resolve_config_path("there/demo.yaml")
    assert str(ROOT) not in str(caught.value), "a name with a directory is looked for there only"
