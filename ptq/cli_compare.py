"""The verbs ``ptq compare`` and ``ptq sweep``, and what ``ptq eval`` has in common with the first."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ptq.config import EvaluationConfig


def scoring_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments that say how much of ``--text`` is scored, and how."""
    parser.add_argument("--column", default="text", help="of rows that holds it (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens to score at most (default %(default)s)")
    parser.add_argument("--window", type=int, default=512, help="tokens seen at once (default %(default)s)")
    parser.add_argument("--stride", type=int, default=None, help="step between windows (default: the window)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"],
                        help="of the activations; float32 takes their rounding out of the comparison")  # fmt: skip


def scored_text(options: argparse.Namespace) -> "EvaluationConfig":
    """What these arguments ask for. Raises ConfigError for values out of range or at odds."""
    from ptq.config import DatasetConfig, EvaluationConfig, check_evaluation

    text = DatasetConfig(files=tuple(options.text), column=options.column)
    stride = options.window if options.stride is None else options.stride
    settings = EvaluationConfig(dataset=text, tokens=options.tokens, window=options.window, stride=stride)
    check_evaluation(settings, "--")
    return settings


def compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of ``ptq compare``."""
    parser.add_argument("checkpoints", nargs="+", metavar="DIR", help="directories or hub names, whoever made them")
    parser.add_argument("--parent", required=True, metavar="MODEL", help="the float model they were made from")
    parser.add_argument("--text", required=True, action="append", metavar="FILE",
                        help=".txt, .jsonl, .json or .parquet; may be repeated")  # fmt: skip
    scoring_arguments(parser)
    parser.add_argument("--out", metavar="DIR", help="write compare.json, compare.html and compare.png there")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the models")
    parser.set_defaults(action=_compare)


def _compare(options: argparse.Namespace) -> int:
    from ptq.compare import compare_checkpoints, show
    from ptq.compare_page import write_comparison
    from ptq.formats.staging import output_path

    settings = scored_text(options)
    if options.out:
        output_path(Path(options.out), "--out")
    document = compare_checkpoints(
        options.checkpoints, options.parent, settings, device=options.device, dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    print(show(document))
    if options.out:
        print("", *write_comparison(document, Path(options.out)), sep="\n")
    return 0


def sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of ``ptq sweep``."""
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of what the variants have in common")
    parser.add_argument("--variants", required=True, metavar="FILE", help="YAML file: name: {changed keys}")
    parser.add_argument("--out", required=True, metavar="DIR", help="where each variant is written under its name")
    change = "override a key for all variants, e.g. calibration.samples=64; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help=change)
    parser.add_argument("--overwrite", action="store_true", help="make variants again that are there")
    parser.set_defaults(action=_sweep)


def _sweep(options: argparse.Namespace) -> int:
    from ptq.compare import show
    from ptq.compare_page import write_comparison
    from ptq.sweep import load_variants, sweep

    out = Path(options.out)
    configs = load_variants(options.config, options.variants, out, options.overrides)
    document = sweep(configs, overwrite=options.overwrite)
    print("", show(document), "", *write_comparison(document, out), sep="\n")
    return 0
