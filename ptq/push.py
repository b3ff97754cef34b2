"""``ptq push``: a checkpoint and its card as one commit on the hub, or as a folder to look at first."""

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from ptq.card import model_card
from ptq.errors import ConfigError, FormatError, PtqError, UnsupportedModelError
from ptq.formats.checkpoint import staged_directory
from ptq.formats.staging import CHAT_TEMPLATES, json_text
from ptq.lint import Lint, lint
from ptq.page_report import report_page
from ptq.parent import HUB_NAME, parent_of
from ptq.report import read_report
from ptq.yaml_tree import parse, unparse

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

Files = Mapping[str, Path | bytes]  # name on the hub: a file here, or its content
_BRANCH = re.compile(
    r"(?!HEAD$)(?!.*(\.\.|//|@\{|/\.|\.lock(/|$)))[^\x00-\x20\x7f~^:?*\[\\/.-][^\x00-\x20\x7f~^:?*\[\\]*(?<![/.])"
)  # as git has them
_KEPT = (".gitattributes",)  # the hub's own
_TOKENS = "at https://huggingface.co/settings/tokens and set it with `hf auth login` or HF_TOKEN"
_AGAIN = "nothing was committed: the same command starts again and sends no large file twice"


class Target(NamedTuple):
    """Where to push."""

    repo: str  # owner/name
    revision: str | None = None  # a branch, made from main where there is none; None: main
    private: bool = False
    overwrite: bool = False  # replace what the branch holds


class Pushed(NamedTuple):
    """What became of a push."""

    url: str
    files: int
    size: int  # bytes


def folder(directory: str | Path, repo: str, *, force: bool = False, trust_remote_code: bool = False) -> Files:
    """Everything that a push of a checkpoint directory uploads, by name.

    Every file beside config.json whose name does not start with a dot, a card in place of README.md, and the report and
    its page without the paths of this machine. ``force`` overrules a missing report and what the lint found.

    Raises:
        ConfigError: ``repo`` is no owner/name, no checkpoint directory, or one without a report.
        FormatError: the files are damaged or load nowhere, or the report is not theirs.
    """
    directory = Path(directory).expanduser()
    check_target(Target(repo))
    result = _linted(directory, force, trust_remote_code)
    document = _report(directory, force)
    files: dict[str, Path | bytes] = {
        path.name: path for path in sorted(directory.iterdir()) if path.is_file() and not path.name.startswith(".")
    }
    templates = directory / CHAT_TEMPLATES
    if templates.is_dir():
        files |= {f"{CHAT_TEMPLATES}/{path.name}": path for path in sorted(templates.iterdir()) if path.is_file()}
    names = _private_paths(document)
    shared = _without(document, names)
    if document:
        files["report.json"] = json_text(shared).encode()
        files["report.html"] = report_page(repo.rpartition("/")[2], shared).encode()
    settings = directory / "ptq_config.yaml"
    if settings.is_file():
        tree = parse(settings.read_text(encoding="utf-8"), str(settings))  # as text a long path stands on two lines
        files[settings.name] = unparse(_without(tree, names | _private_paths(tree))).encode()
    files["README.md"] = model_card(repo, shared, result).encode()
    return files


def check_target(target: Target) -> None:
    """Raises ConfigError for what can be no repository or branch."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    if not HUB_NAME.fullmatch(target.repo):
        raise ConfigError(f"--repo must be owner/name, found {target.repo!r}")
    try:
        validate_repo_id(target.repo)
    except HFValidationError as error:
        raise ConfigError(f"--repo must be a name that the hub takes: {_first_line(error)}") from error
    if target.revision is not None and not _BRANCH.fullmatch(target.revision):
        raise ConfigError(f"--revision must be a name that git takes for a branch, found {target.revision!r}")


def write_folder(files: Files, out: str | Path) -> Path:
    """Write what `folder` describes, whole or not at all; shards become hard links where the file system has them.

    Raises:
        ConfigError: ``out`` exists.
    """
    out = Path(out).expanduser()
    if out.exists():
        raise ConfigError(f"a dry run writes a new folder; {out} exists: remove it, or name another with --out")
    with staged_directory(out, overwrite=False) as staged:
        for name, content in files.items():
            (staged / name).parent.mkdir(exist_ok=True)
            if isinstance(content, bytes):
                (staged / name).write_bytes(content)
            else:
                _place(content, staged / name)
    return out


def push(files: Files, target: Target) -> Pushed:
    """Upload ``files`` as one commit. Large files are sent first; those that the hub has from a push before are not.

    Nothing is half pushed: until the commit, which comes last, the branch holds what it held.

    Raises:
        ConfigError: ``target`` can be no branch, the branch holds files and ``overwrite`` is false, or a public
            repository cannot be private.
        PtqError: no network, no token, a token that may not write, or the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    check_target(target)
    api = HfApi()
    with _sentences(target.repo):
        _require_token(api)
        main = _existing(api, target.repo, None)
        branch = main if target.revision is None else _existing(api, target.repo, target.revision)
        _require_free(target, main, branch)
        if main is None:
            api.create_repo(target.repo, private=target.private)
            main = api.model_info(target.repo)
        base = branch or main
        additions = [CommitOperationAdd(name, content) for name, content in files.items()]
        stale = [CommitOperationDelete(name) for name in _held(base) if name not in files]
        # Where the branch is still to be made, it will begin as a copy of main.
        made = target.revision is not None and branch is None
        known = None if made else target.revision
        api.preupload_lfs_files(target.repo, additions, revision=known, free_memory=False)
        if made:
            assert target.revision is not None
            api.create_branch(target.repo, branch=target.revision, revision=main.sha)
        try:
            done = api.create_commit(
                target.repo, [*additions, *stale], commit_message="Quantized checkpoint",
                revision=target.revision, parent_commit=base.sha,
            )  # fmt: skip
        except BaseException:
            if made:
                assert target.revision is not None
                api.delete_branch(target.repo, branch=target.revision)
            raise
    size = sum(len(content) if isinstance(content, bytes) else content.stat().st_size for content in files.values())
    return Pushed(str(done.commit_url), len(files), size)


def _linted(directory: Path, force: bool, trust_remote_code: bool) -> Lint:
    try:
        result = lint(directory, trust_remote_code=trust_remote_code)
    except (FormatError, UnsupportedModelError) as error:
        if not force:
            raise
        return Lint(directory, [str(error)], [], [], {})
    if result.failure and not force:
        raise FormatError(f"{result.failure}; see `ptq lint {directory}`, or push it as it is with --force")
    return result


def _report(directory: Path, force: bool) -> dict[str, Any]:
    path = directory / "report.json"
    if not path.is_file():
        if force:
            return {}
        raise ConfigError(
            f"a push needs the report of the run, for the card; there is no {path}: quantize again, or push a card "
            "without figures with --force"
        )
    document = read_report(path)
    found = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    written = document.get("size", {}).get("after")
    if written != found and not force:
        raise FormatError(
            f"{path} must be the report of the files beside it: it says {written} bytes of weights, they have {found}; "
            "quantize again, or push them as they are with --force"
        )
    if "parent" not in document and "configuration" in document:  # written before reports named the parent
        model = document["configuration"]["model"]
        document["parent"] = parent_of(model, Path(model).expanduser())
    return document


def _private_paths(document: Any) -> set[str]:
    """Every absolute path that a report holds."""
    if isinstance(document, str):
        return {document} if PurePath(document).is_absolute() else set()
    inner = document.values() if isinstance(document, dict) else document if isinstance(document, list) else ()
    return {path for each in inner for path in _private_paths(each)}


def _without(document: Any, paths: set[str]) -> Any:
    """The same with the last name of each path only."""
    if isinstance(document, dict):
        return {key: _without(value, paths) for key, value in document.items()}
    if isinstance(document, list):
        return [_without(value, paths) for value in document]
    return PurePath(document).name if isinstance(document, str) and document in paths else document


def _place(source: Path, target: Path) -> None:
    if source.suffix == ".safetensors":  # never changed in place; the small ones may be edited
        try:
            os.link(source.resolve(), target)
        except OSError:
            shutil.copyfile(source, target)
    else:
        shutil.copyfile(source, target)


def _require_token(api: "HfApi") -> None:
    """Raise PtqError where the token at hand can only read."""
    role = api.whoami().get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise PtqError(
            f"a push needs a token that may write, this one may read; nothing was committed: make another {_TOKENS}"
        )


def _existing(api: "HfApi", repo: str, revision: str | None) -> "ModelInfo | None":
    """What the hub has, None where it has no such repository or branch."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return api.model_info(repo, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None


def _held(info: "ModelInfo | None") -> list[str]:
    siblings = (info.siblings if info else None) or []
    return [each.rfilename for each in siblings if each.rfilename not in _KEPT]


def _require_free(target: Target, main: "ModelInfo | None", branch: "ModelInfo | None") -> None:
    """Raise ConfigError where a push would replace or expose something unasked."""
    held = _held(branch)
    if held and not target.overwrite:
        raise ConfigError(
            f"{target.repo} exists and holds {len(held)} files at {target.revision or 'main'}: choose another name or "
            "--revision, or replace them with --overwrite"
        )
    if main is not None and target.private and not main.private:
        raise ConfigError(f"{target.repo} exists and is public: make it private on the hub, or leave --private out")


@contextmanager
def _sentences(repo: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into a PtqError."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    # Of the HTTP library that huggingface_hub uses, whichever it is.
    transport = cast(type[Exception], HfHubHTTPError.__bases__[0])
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise PtqError(
            f"a push needs a token, none was found; nothing was committed: make one that may write {_TOKENS}"
        ) from error
    except HfHubHTTPError as error:
        raise PtqError(_refusal(repo, error)) from error
    except (transport, OSError, RuntimeError, ValueError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise  # no matter of the network
        reason = _first_line(error.__cause__ or error)
        raise PtqError(
            f"{repo} could not be pushed to: {reason}. Check the network, and the repository, as an answer may "
            "have been lost; the same command starts again and sends no large file twice"
        ) from error


def _refusal(repo: str, error: Any) -> str:
    status = error.response.status_code
    if status == 401:
        return f"the hub does not know the token; nothing was committed: make another {_TOKENS}"
    if status == 403:
        return f"the token may not write to {repo}: use one of its owner, with that permission; nothing was committed"
    return f"{repo} could not be pushed to, the hub answered {status}: {_first_line(error)}; {_AGAIN}"


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
