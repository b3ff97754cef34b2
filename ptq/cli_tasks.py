"""What ``ptq eval`` has for tasks of lm-evaluation-harness."""

import argparse
from pathlib import Path
from typing import Any

from ptq.errors import ConfigError


def task_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments."""
    parser.add_argument("--tasks", metavar="NAMES", help="tasks of lm-evaluation-harness, separated by commas")
    parser.add_argument("--include", metavar="DIR",
                        help="directory with task files of your own; the Python they name is run")  # fmt: skip
    parser.add_argument("--fewshot", type=int, metavar="N", help="examples before each question (default: the task's)")
    parser.add_argument("--limit", type=int, metavar="N", help="questions of each task at most (default: all)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="sequences of a task at a time (default 8)")
    parser.add_argument("--chat-template", action="store_true", help="put questions of tasks as a conversation")


def run_tasks(options: argparse.Namespace) -> dict[str, Any]:
    """The result, which is printed as well; nothing where no task was asked for.

    Raises:
        ConfigError: neither tasks nor a text, a condition without a text, options of tasks without any, and as
            `ptq.tasks.evaluate_tasks`.
    """
    if options.tasks is not None and not options.tasks.strip(","):
        raise ConfigError(f"--tasks must name tasks, separated by commas; found {options.tasks!r}")
    if not options.text and (options.fail_if or not options.tasks):
        wanted = "--fail-if needs --text FILE" if options.tasks else "eval needs --text FILE or --tasks NAMES"
        raise ConfigError(f"{wanted}; found {'--tasks alone' if options.tasks else 'neither'}")
    if not options.tasks:
        given = ("include", "fewshot", "limit", "batch_size", "chat_template")
        values = {f"--{name.replace('_', '-')}": getattr(options, name) for name in given}
        idle = [name for name, value in values.items() if value is not None and value is not False]
        if idle:
            need = "need" if idle[1:] else "needs"
            raise ConfigError(f"{', '.join(idle)} {need} --tasks NAMES; found none: name tasks, or leave them out")
        return {}
    if options.include and not Path(options.include).is_dir():
        raise ConfigError(f"--include must be a directory with task files; {options.include} is none")
    from ptq.tasks import TaskSettings, evaluate_tasks, show

    models = {"parent": options.parent} if options.parent else {}
    settings = TaskSettings(
        tuple(name for name in options.tasks.split(",") if name), options.include, options.fewshot, options.limit,
        8 if options.batch_size is None else options.batch_size, options.chat_template,
    )  # fmt: skip
    document = evaluate_tasks(
        {**models, "result": options.checkpoint}, settings, device=options.device, dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    print(show(document), flush=True)
    return {"tasks": document}
