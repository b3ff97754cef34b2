"""Benchmarks of lm-evaluation-harness on packed and float checkpoints."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ptq.calibration.data import require_embeddable
from ptq.errors import ConfigError
from ptq.half_products import fast_half_products
from ptq.models.loading import load_tokenizer, locate
from ptq.plan import resolve_device
from ptq.progress import Progress
from ptq.report import table
from ptq.runtime import load

# Resamplings for the standard error of metrics that have no formula for it.
BOOTSTRAPS = 1000


class TaskSettings(NamedTuple):
    """What to run.

    names: tasks, groups or patterns of the harness; include: directory with task files of one's own, whose Python the
    harness runs (``!function``, templates), whatever ``trust_remote_code`` says; fewshot: examples in front of each
    question (None: the task's own number); limit: questions of each task at most (None: all); batch_size: sequences at
    a time; chat_template: render each question as a conversation.
    """

    names: tuple[str, ...]
    include: str | None = None
    fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    chat_template: bool = False


def evaluate_tasks(
    models: Mapping[str, str],
    settings: TaskSettings,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run tasks on one model after another.

    Args:
        models: directory or hub name by the name to show, for instance ``parent`` and ``result``.
        settings: which tasks, and how.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        dtype: of everything that is not packed.
        trust_remote_code: run Python code that comes with a model.
        progress: where to report to; the harness shows bars of its own on stderr.

    Returns:
        ``models``: model to task to metric to ``value`` and ``stderr`` (None where there is none); ``questions`` and
        ``fewshot`` by task; ``limit``; ``harness``: its version.

    Raises:
        ConfigError: the harness is not installed, an unknown or faulty task, no such model or device.
        PtqError: a checkpoint that cannot be read, a tokenizer with tokens the model cannot embed.
    """
    _require_harness()
    _check(settings)
    manager = _manager(settings)
    if settings.include is not None:
        _require_sound(manager, settings)
    progress = progress or Progress()
    found = {}
    for name, path in models.items():
        with progress.stage(f"tasks of {name}"):
            found[name] = _run(path, settings, manager, device, dtype, trust_remote_code)
    one = next(iter(found.values()))
    return {
        "models": {name: _figures(result) for name, result in found.items()},
        "questions": {task: count["effective"] for task, count in one["n-samples"].items()},
        "fewshot": dict(one["n-shot"]),
        "limit": settings.limit,
        "harness": _version(),
    }


def show(document: Mapping[str, Any]) -> str:
    """The result as a table: a line for each task and metric, a column for each model."""
    models = document["models"]
    columns = {column: ".4f" for name in models for column in (name, f"{name} +-")}
    rows: dict[str, dict[str, float | None]] = {}
    for name, tasks in models.items():
        for task, metrics in tasks.items():
            for metric, cell in metrics.items():
                row = rows.setdefault(f"{task} {metric}", {})
                row |= {name: cell["value"], f"{name} +-": cell["stderr"]}
    questions = ", ".join(
        f"{task}: {count} questions, {document['fewshot'].get(task, 0)} examples before each"
        for task, count in document["questions"].items()
    )
    return "\n".join([table(rows, columns), f"{questions}; lm-evaluation-harness {document['harness']}"])


def _require_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError("tasks need lm-evaluation-harness, which is not installed: pip install lm-eval") from error


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")


def _check(settings: TaskSettings) -> None:
    if not settings.names:
        raise ConfigError("tasks must be named, separated by commas; found none")
    smallest = {"fewshot": 0, "limit": 1, "batch_size": 1}
    for key, least in smallest.items():
        value = getattr(settings, key)
        if value is not None and value < least:
            raise ConfigError(f"{key} must be at least {least}; found {value}")
    if settings.include is not None and not Path(settings.include).is_dir():
        raise ConfigError(f"include must be a directory with task files; there is none at {settings.include}")


def _manager(settings: TaskSettings) -> Any:
    """An index of the tasks there are: one's own if these are enough, as indexing the harness's takes a while."""
    from lm_eval.tasks import TaskManager

    managers = []
    for defaults in (False, True):
        if defaults or settings.include is not None:
            manager = TaskManager(include_path=settings.include, include_defaults=defaults)
            if all(manager.match_tasks([name]) for name in settings.names):
                return manager
            managers.append(manager)
    known = managers[-1].all_tasks
    unknown = next(name for name in settings.names if not managers[-1].match_tasks([name]))
    if settings.include is not None:
        _require_yaml(Path(settings.include), unknown)
    near = get_close_matches(unknown, known, n=3, cutoff=0.5)
    raise ConfigError(
        f"a task must be one of the harness's or in a file in --include; {unknown!r} is not"
        + (f": did you mean {' or '.join(near)}?" if near else f" ({len(known)} are known)")
    )


def _require_yaml(include: Path, name: str) -> None:
    """Raises ConfigError for a file that has the task of that name in it, and that the harness passes over unread."""
    import yaml

    class Loader(yaml.SafeLoader):
        """With the harness's tag for functions, of which none is called here."""

    Loader.add_constructor("!function", lambda loader, node: None)
    for path in sorted(include.rglob("*.yaml")):
        try:
            content = path.read_bytes()
            if name.encode() in content:
                yaml.load(content, Loader)  # a SafeLoader
        except (yaml.YAMLError, RecursionError, ValueError, OSError) as error:
            raise ConfigError(
                f"a task file must be YAML, {path} is not: {' '.join(str(error).split())}: correct it"
            ) from error


def _require_sound(manager: Any, settings: TaskSettings) -> None:
    """Raise ConfigError for task files of one's own that the harness stops at, before a model is loaded for them."""
    try:
        load = manager.load if hasattr(manager, "load") else manager.load_task_or_group  # the older name
        load(manager.match_tasks(list(settings.names)))
    except Exception as error:  # of whatever kind: such a file may name any Python function
        raise ConfigError(
            f"the harness must be able to load {', '.join(settings.names)} with the files in {settings.include}; it "
            f"stops with {type(error).__name__}: {error}"
        ) from error


def _run(
    path: str, settings: TaskSettings, manager: Any, device: str, dtype: str, trust_remote_code: bool
) -> dict[str, Any]:
    from jinja2 import TemplateError
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = load(path, device=resolve_device(device), dtype=dtype, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(locate(path), trust_remote_code)
    if settings.chat_template and not tokenizer.chat_template:
        raise ConfigError(f"a chat template needs one in the tokenizer; that of {path} has none: leave it out")
    if tokenizer.embedding_rows is not None:
        model.get_input_embeddings().register_forward_pre_hook(_embeddable(tokenizer.embedding_rows))
    names: Sequence[str] = manager.match_tasks(list(settings.names))
    with _without_launcher_advice():
        harnessed = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size, backend="causal")
    try:
        with fast_half_products(model.device):
            result: dict[str, Any] = simple_evaluate(
                harnessed, tasks=list(names), task_manager=manager, num_fewshot=settings.fewshot, limit=settings.limit,
                apply_chat_template=settings.chat_template, log_samples=False, bootstrap_iters=BOOTSTRAPS,
            )  # fmt: skip
    except TemplateError as error:
        raise ConfigError(
            f"the templates of {', '.join(names)} (doc_to_text and its kin) must be Jinja that fits the questions; the "
            f"harness stops with {type(error).__name__}: {error}"
        ) from error
    except ValueError as error:  # more examples than a task has, for one
        raise ConfigError(
            f"the harness must be able to run {', '.join(names)} as asked, it says: {error}; see fewshot and limit"
        ) from error
    return result


def _embeddable(rows: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook for the embedding: the harness tokenizes by itself, and an id out of range would end as a CUDA assert."""

    def check(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        require_embeddable(int(inputs[0].max()), rows)

    return check


@contextmanager
def _without_launcher_advice() -> Iterator[None]:
    """Without the harness's warning that a loaded model must not be started by accelerate, which nothing does here."""
    logger = logging.getLogger("lm_eval.models.huggingface")

    def wanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("`pretrained` model kwarg is not of type `str`")

    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


def _figures(result: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Metrics by task; the harness calls them ``metric,filter`` and has the standard error beside each."""
    figures: dict[str, dict[str, dict[str, float | None]]] = {}
    for task, row in result["results"].items():
        for key, value in row.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = row.get(f"{metric}_stderr,{kind}")
                label = metric if kind == "none" else f"{metric} ({kind})"
                cell = {"value": float(value), "stderr": error if isinstance(error, float) else None}
                figures.setdefault(task, {})[label] = cell
    return figures
