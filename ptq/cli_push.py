"""The verbs ``ptq lint`` and ``ptq push``."""

import argparse
from pathlib import Path

from ptq.cli_ending import printable


def lint_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of ``ptq lint``."""
    parser.add_argument("checkpoint", metavar="DIR", help="a quantized checkpoint, whoever made it")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    parser.set_defaults(action=_lint)


def _lint(options: argparse.Namespace) -> int:
    from ptq.lint import describe, lint

    result = lint(options.checkpoint, trust_remote_code=options.trust_remote_code)
    print(*map(printable, describe(result).split("\n")), sep="\n")
    return 1 if result.failure else 0


def push_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of ``ptq push``."""
    parser.add_argument("checkpoint", metavar="DIR", help="a quantized checkpoint with its report")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="model repository; made if it is not there")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="push to this branch, made if it is not there")
    parser.add_argument("--overwrite", action="store_true", help="replace the files that the branch holds")
    parser.add_argument("--force", action="store_true", help="push without a report, or what the lint refuses")
    parser.add_argument("--dry-run", action="store_true", help="write the folder that would be pushed; ask no hub")
    parser.add_argument("--out", metavar="DIR", help="where the dry run writes it (default: DIR-push beside DIR)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    parser.set_defaults(action=_push)


def _push(options: argparse.Namespace) -> int:
    from ptq.errors import ConfigError
    from ptq.push import Target, check_target, folder, push, write_folder

    if options.out and not options.dry_run:
        raise ConfigError("--out is where a dry run writes; add --dry-run or leave it out")
    target = Target(options.repo, options.revision, options.private, options.overwrite)
    check_target(target)
    checkpoint = Path(options.checkpoint).expanduser().resolve()
    out = Path(options.out).resolve() if options.out else checkpoint.with_name(f"{checkpoint.name}-push")
    if checkpoint in out.parents:
        raise ConfigError(f"--out must not be inside the checkpoint, found {out}: name a directory beside it")
    files = folder(options.checkpoint, options.repo, force=options.force, trust_remote_code=options.trust_remote_code)
    if options.dry_run:
        print(f"{len(files)} files in {write_folder(files, out)}; nothing was pushed")
        return 0
    done = push(files, target)
    print(f"{done.files} files, {done.size / 1e6:.1f} MB: {done.url}")
    return 0
