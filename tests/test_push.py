"""Pushing. Oracle: a hub on this machine (`hub_server`), whose commits are compared byte for byte with the dry run."""

import errno
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hub_server
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build, run, save, settings

from ptq import cli
from ptq.errors import ConfigError, FormatError, PtqError
from ptq.pipeline import quantize
from ptq.plan import make_plan
from ptq.plan_size import describe
from ptq.progress import Progress
from ptq.push import Target, check_target, folder, push, write_folder

ROOT = Path(__file__).resolve().parent.parent
REPO = "someone/small-gptq"
DOCS = (ROOT / "docs/push.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in two shards or more, of a parent with a card and a licence."""
    place = tmp_path_factory.mktemp("push")
    parent = save(build("llama", torch.bfloat16), place / "a name with which YAML's line breaks: it's of 80 characters")
    (parent / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\nmodel: x\n---\n# Parent\n")
    (parent / "LICENSE").write_text("terms")
    run(settings(parent, place / "small", "rtn", max_shard_size="60KB"))
    return place / "small"


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "small"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[hub_server.Hub]:
    """A hub, and a token that may write."""
    from huggingface_hub import constants

    with hub_server.serving() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", "hf_write")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield running


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def test_a_push_is_the_folder_of_the_dry_run(made: Path, hub: hub_server.Hub, tmp_path: Path) -> None:
    files = folder(made, REPO)
    done = push(files, Target(REPO, private=True))
    assert hub.files(REPO) == contents(write_folder(files, tmp_path / "dry"))
    assert hub.repos[REPO]["private"]
    assert done.url.startswith(f"{hub.endpoint}/{REPO}")
    assert (done.files, done.size) == (len(files), sum(map(len, hub.files(REPO).values())))
    kept = {"README.md", "report.json", "report.html", "ptq_config.yaml"}
    for path in made.iterdir():
        assert path.name in kept or hub.files(REPO)[path.name] == path.read_bytes()


def test_a_tensor_that_the_parent_has_no_place_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is said by plan, run and report, copied as it is, kept from other engines, and no reason to refuse a push."""
    parent = save(build("llama", torch.bfloat16), tmp_path / "parent")
    value = torch.arange(8.0).view(1, 8) + 1e-5
    tensors = {**load_file(parent / "model.safetensors"), "value_head.weight": value}
    (parent / "additional_chat_templates").mkdir()
    (parent / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    save_file(tensors, parent / "model.safetensors", {"format": "pt"})
    config = settings(parent, tmp_path / "small", "rtn")
    line = "tensors of the parent that its model has no place for are copied as they are: value_head.weight"
    assert f"extra      {line}" in describe(make_plan(config))
    said = io.StringIO()
    report = quantize(config, progress=Progress(said))
    assert line in said.getvalue()
    assert report.document["extra_tensors"] == ["value_head.weight"]
    (written,) = (tmp_path / "small").glob("*.safetensors")
    assert torch.equal(load_file(written)["value_head.weight"], value)
    written_config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert "-:^value_head$" in written_config["quantization_config"]["dynamic"]
    assert "additional_chat_templates/tool.jinja" in contents(tmp_path / "small")
    files = folder(tmp_path / "small", REPO)
    assert "additional_chat_templates/tool.jinja" in contents(write_folder(files, tmp_path / "dry"))
    assert cli.main(["push", str(tmp_path / "small"), "--repo", REPO, "--dry-run"]) == 0
    assert "nothing was pushed" in capsys.readouterr().out


def test_no_path_of_this_machine_is_in_it(made: Path) -> None:
    for name, content in folder(made, REPO).items():
        data = content if isinstance(content, bytes) else content.read_bytes()
        assert made.parent.name.encode() not in data, name
        assert str(ROOT).encode() not in data, name


def test_licence_and_its_text_come_from_the_parent(made: Path) -> None:
    files = folder(made, REPO)
    card = files["README.md"]
    assert isinstance(card, bytes)
    assert b"license: apache-2.0\nlanguage: en\n" in card
    assert b"base_model" not in card  # a directory here is no model there
    licence = files["LICENSE"]
    assert isinstance(licence, Path)
    assert licence.read_text() == "terms"


def test_a_repository_that_holds_files_is_replaced_only_when_asked(made: Path, hub: hub_server.Hub) -> None:
    hub.add(REPO, old__bin=b"old")
    files = folder(made, REPO)
    with pytest.raises(ConfigError, match="someone/small-gptq exists and holds 1 files at main.*--overwrite"):
        push(files, Target(REPO))
    assert hub.files(REPO) == {"old.bin": b"old"}
    push(files, Target(REPO, overwrite=True))
    assert set(hub.files(REPO)) == set(files)


def test_a_branch_is_made_and_main_left_alone(made: Path, hub: hub_server.Hub) -> None:
    hub.add(REPO, old__bin=b"old")
    files = folder(made, REPO)
    hub.refused_commits = 1
    with pytest.raises(PtqError, match="the hub answered 412.*nothing was committed"):
        push(files, Target(REPO, revision="w4"))
    assert list(hub.repos[REPO]["branches"]) == ["main"]  # no half of a branch either
    push(files, Target(REPO, revision="w4"))
    assert set(hub.files(REPO, "w4")) == set(files)
    assert hub.files(REPO) == {"old.bin": b"old"}
    push(files, Target(REPO, revision="w4", overwrite=True))
    assert set(hub.files(REPO, "w4")) == set(files)


def test_a_public_repository_does_not_become_private(made: Path, hub: hub_server.Hub) -> None:
    hub.add(REPO)
    with pytest.raises(ConfigError, match="exists and is public"):
        push(folder(made, REPO), Target(REPO, private=True))


def test_what_arrived_before_an_interruption_is_not_sent_again(made: Path, hub: hub_server.Hub) -> None:
    files = folder(made, REPO)
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) > 1
    hub.refused_uploads = {len(shards)}
    with pytest.raises(PtqError, match="sends no large file twice"):
        push(files, Target(REPO))
    assert hub.files(REPO) == {}
    push(files, Target(REPO))
    assert hub.uploads() == len(shards) + 1
    assert set(hub.files(REPO)) == set(files)


@pytest.mark.parametrize(
    ("token", "owner", "message"),
    [
        (None, "someone", "needs a token, none was found"),
        ("hf_read", "someone", "needs a token that may write, this one may read"),
        ("hf_stranger", "someone", "does not know the token"),
        ("hf_write", "another", "may not write to someone/small-gptq"),
    ],
)
def test_a_token_that_does_not_do_is_a_sentence(
    made: Path, hub: hub_server.Hub, monkeypatch: pytest.MonkeyPatch, token: str | None, owner: str, message: str
) -> None:
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.owner = owner
    with pytest.raises(PtqError, match=message):
        push(folder(made, REPO), Target(REPO))
    assert hub.repos == {}
    assert hub.uploads() == 0


def test_no_network_is_a_sentence(made: Path, hub: hub_server.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(PtqError, match="could not be pushed to: .*Check the network"):
        push(folder(made, REPO), Target(REPO))


def test_a_full_disk_is_not_the_network(made: Path, hub: hub_server.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.HfApi.preupload_lfs_files", fail)
    with pytest.raises(OSError, match="No space left"):
        push(folder(made, REPO), Target(REPO))


def test_a_push_needs_the_report_of_these_files(checkpoint: Path) -> None:
    report = checkpoint / "report.json"
    document = json.loads(report.read_text())
    document["size"]["after"] += 1
    report.write_text(json.dumps(document))
    with pytest.raises(FormatError, match="must be the report of the files beside it"):
        folder(checkpoint, REPO)
    assert "report.json" in folder(checkpoint, REPO, force=True)
    report.unlink()
    with pytest.raises(ConfigError, match="needs the report of the run"):
        folder(checkpoint, REPO)
    card = folder(checkpoint, REPO, force=True)["README.md"]
    assert isinstance(card, bytes)
    assert b"The report is missing." in card


def test_a_report_without_a_parent_is_read_as_well(checkpoint: Path) -> None:
    document = json.loads((checkpoint / "report.json").read_text())
    del document["parent"]
    (checkpoint / "report.json").write_text(json.dumps(document))
    card = folder(checkpoint, REPO)["README.md"]
    assert isinstance(card, bytes)
    assert b"license: apache-2.0" in card


def test_what_the_lint_refuses_is_pushed_by_force_only(checkpoint: Path) -> None:
    shard = min(checkpoint.glob("*.safetensors"))
    tensors = load_file(shard)
    scales = next(name for name in tensors if name.endswith(".scales"))
    save_file({**tensors, scales: torch.zeros_like(tensors[scales])}, shard, metadata={"format": "pt"})
    with pytest.raises(FormatError, match="scales are zero or not finite.*--force"):
        folder(checkpoint, REPO)
    assert "README.md" in folder(checkpoint, REPO, force=True)
    shard.write_bytes(b"")
    with pytest.raises(FormatError, match="truncated"):
        folder(checkpoint, REPO)
    card = folder(checkpoint, REPO, force=True)["README.md"]
    assert isinstance(card, bytes)
    assert b"Not checked: the files are damaged" in card


def test_wrong_arguments_are_sentences(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="--repo must be owner/name, found 'small'"):
        folder(made, "small")
    for name in ("me/b..c", "me/" + "x" * 120):
        with pytest.raises(ConfigError, match="--repo must be a name that the hub takes: "):
            check_target(Target(name))
    with pytest.raises(ConfigError, match=r"a dry run writes a new folder; .* exists"):
        write_folder({}, tmp_path)
    assert cli.main(["push", str(made), "--repo", REPO, "--out", "x"]) == 2
    assert "--out is where a dry run writes" in capsys.readouterr().err


def test_a_folder_is_written_where_links_cannot_be(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = folder(made, REPO)
    linked = write_folder(files, tmp_path / "linked")
    shard = next(name for name in files if name.endswith(".safetensors"))
    assert os.path.samefile(linked / shard, made / shard)
    assert not os.path.samefile(linked / "config.json", made / "config.json")  # it may be edited

    def fail(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", fail)
    copied = write_folder(files, tmp_path / "copied")
    assert not os.path.samefile(copied / shard, made / shard)
    assert contents(copied) == contents(linked)


def test_the_command_in_a_process_of_its_own(made: Path, hub: hub_server.Hub) -> None:
    """With the environment variables a person would set."""
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_write",
                   "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}  # fmt: skip
    command = [sys.executable, "-m", "ptq", "push", str(made), "--repo", REPO]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{len(hub.files(REPO))} files, ")


def test_the_commands_of_the_docs_run(
    made: Path, hub: hub_server.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: exit code 0, in a directory with the checkpoint where the text has it."""
    shutil.copytree(made, tmp_path / "out/demo")
    monkeypatch.chdir(tmp_path)
    commands = [line for block in re.findall(r"```bash\n(.+?)```", DOCS, re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 4
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "ptq"
        assert cli.main(arguments) == 0, command
    assert (tmp_path / "out/demo-push/README.md").is_file()
    assert list(hub.repos["someone/tiny-llama-gptq"]["branches"]) == ["main", "w4g128"]
