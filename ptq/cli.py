"""The command line: ``ptq VERB``, ``python -m ptq.gptq`` and ``python -m ptq.awq``."""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ptq.cli_adapters import merge_arguments
from ptq.cli_compare import compare_arguments, scored_text, scoring_arguments, sweep_arguments
from ptq.cli_ending import run
from ptq.cli_places import write_result
from ptq.cli_push import lint_arguments, push_arguments
from ptq.cli_tasks import run_tasks, task_arguments
from ptq.cli_tune import tune_arguments
from ptq.errors import ConfigError

if TYPE_CHECKING:
    from ptq.config import RunConfig
    from ptq.plan import Plan
    from ptq.predict import Prediction

SAMPLES, LENGTH = 128, 512  # of the text that an export is solved on


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the ``ptq`` command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="ptq", description="Quantize, evaluate and inspect causal language models.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for name, define, said in (
        ("quantize", _quantize_arguments, "quantize a model as a configuration says"),
        ("plan", _plan_arguments, "what a run would do, and the memory, disk and time it would need"),
        ("eval", _eval_arguments, "perplexity of a checkpoint, and its distance to its parent"),
        ("inspect", _inspect_arguments, "what a checkpoint holds"),
        ("compare", compare_arguments, "several checkpoints of one parent side by side"),
        ("sweep", sweep_arguments, "make and compare variants of one configuration"),
        ("bench", _bench_arguments, "time the packed matmul beside dense ones on this machine"),
        ("tune", tune_arguments, "time the GPU kernels' configurations for a checkpoint's shapes"),
        ("lint", lint_arguments, "whether a checkpoint is sound, where it loads, how it can be split"),
        ("push", push_arguments, "a checkpoint and its model card to the hub, or to a folder"),
        ("export", _export_arguments, "write a model as a file for another runtime (GGUF)"),
        ("merge", merge_arguments, "add a LoRA adapter to a checkpoint, as a dense copy"),
    ):
        verb = verbs.add_parser(name, help=said)
        define(verb)
        _debug_argument(verb)
    return run(parser, arguments)


def main_of_method(method: str, arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m ptq.gptq`` and ``python -m ptq.awq``."""
    parser = argparse.ArgumentParser(prog=f"python -m ptq.{method}", description=f"Quantize a model with {method}.")
    _quantize_arguments(parser)
    _debug_argument(parser)
    parser.set_defaults(method=method)
    return run(parser, arguments)


def _debug_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    where = "YAML file; a bare name is searched in the working directory, then in configs/"
    parser.add_argument("--config", required=True, metavar="FILE", help=where)
    change = "override a key of the configuration, e.g. calibration.samples=64; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help=change)


def _quantize_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the plan, check output and text; read no weight")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output directory")
    fresh = "start over instead of continuing a run that was cut short"
    parser.add_argument("--fresh", action="store_true", help=fresh)
    parser.set_defaults(action=_quantize, method=None)


def _quantize(options: argparse.Namespace) -> int:
    from ptq.config import load_config
    from ptq.distributed import joined

    options.ranks = ranks = joined()
    config = load_config(options.config, options.overrides)
    if options.method is not None and config.method != options.method:
        raise ConfigError(
            f"python -m ptq.{options.method} needs method: {options.method}; {options.config} says {config.method}: "
            f"use python -m ptq quantize, or --set method={options.method}"
        )
    if options.dry_run:
        return _try(config, options.overwrite) if ranks.first else 0
    from ptq.evaluation import show
    from ptq.pipeline import quantize
    from ptq.report import summary

    report = quantize(config, overwrite=options.overwrite, fresh=options.fresh, ranks=ranks)
    if ranks.first:
        print()
        if report.document.get("evaluation"):
            print(show(report.document["evaluation"]), end="\n\n")
        print(summary(report))
    ranks.leave()
    return 0


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.set_defaults(action=_plan)


def _plan(options: argparse.Namespace) -> int:
    from ptq.config import load_config
    from ptq.predict import require_disk

    plan, found = _print_plan(load_config(options.config, options.overrides))
    require_disk(found, plan.config)
    return 0


def _try(config: "RunConfig", overwrite: bool) -> int:
    """What a run does before it reads a weight: output, plan, texts; and whether the disk has room."""
    from ptq.evaluation import require_text
    from ptq.formats.staging import output_path, require_writable
    from ptq.predict import require_disk
    from ptq.prepared import Prepared

    require_writable(output_path(Path(config.output)), overwrite)
    plan, found = _print_plan(config)
    if config.calibrates:
        Prepared().batches(plan)
    require_text(plan)
    require_disk(found, config)
    return 0


def _print_plan(config: "RunConfig") -> "tuple[Plan, Prediction]":
    from ptq.formats.staging import output_path
    from ptq.plan import make_plan
    from ptq.plan_size import describe
    from ptq.predict import describe_prediction, home_of, predict
    from ptq.predict_time import measure_rates
    from ptq.report import anonymous_bytes

    output = output_path(Path(config.output))
    plan = make_plan(config, weights=False)
    existing = next(parent for parent in output.parents if parent.is_dir())
    print(describe(plan))
    found = predict(plan, measure_rates(plan.device, existing, plan.dtype), anonymous_bytes(), home_of(plan))
    print(describe_prediction(found))
    return plan, found


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="model directory or hub name")
    parser.add_argument("--parent", help="the float model it came from: adds KL divergence and top-1 agreement")
    files = ".txt, .jsonl, .json or .parquet; may be repeated"
    parser.add_argument("--text", action="append", default=[], metavar="FILE", help=files)
    scoring_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="write the figures to a file as well")
    gate = "exit with 3 if this holds, as in 'kl>0.05' (kl, perplexity, top1, agreement; >, >=, <, <=); may be repeated"
    parser.add_argument("--fail-if", action="append", default=[], metavar="CONDITION", help=gate)
    task_arguments(parser)
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    parser.set_defaults(action=_eval)


def _eval(options: argparse.Namespace) -> int:
    from ptq.gate import parse_condition, require_parent, require_passed

    conditions = [parse_condition(text) for text in options.fail_if]
    require_parent(conditions, options.parent)
    document = run_tasks(options)
    if options.text:
        document |= _eval_text(options)
    if options.json:
        from ptq.formats.staging import json_text

        write_result(Path(options.json), json_text(document))
    if options.text:
        require_passed(conditions, document["models"]["result"])
    return 0


def _eval_text(options: argparse.Namespace) -> dict[str, Any]:
    from ptq.evaluation import evaluate_checkpoint, show

    document = evaluate_checkpoint(
        options.checkpoint, options.parent, scored_text(options), device=options.device, dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    print(show(document), flush=True)
    return document


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="model directory or hub name")
    parser.add_argument("--modules", action="store_true", help="one line for each quantized Linear")
    parser.add_argument("--html", metavar="FILE", help="write a page for people as well")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    parser.set_defaults(action=_inspect)


def _inspect(options: argparse.Namespace) -> int:
    from ptq.inspection import inspect, inspection_page

    print(inspect(options.checkpoint, modules=options.modules, trust_remote_code=options.trust_remote_code))
    if options.html:
        text = inspection_page(options.checkpoint, trust_remote_code=options.trust_remote_code)
        write_result(Path(options.html), text)
        print(f"page        {options.html}")
    return 0


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="model directory or hub name, float or quantized")
    parser.add_argument("--format", default="gguf", choices=["gguf"], help="gguf, the file of llama.cpp (the default)")
    parser.add_argument("--type", required=True, help="Q4_0, Q4_1, Q8_0, Q4_K_M, Q5_K_M, Q6_K or F16")
    parser.add_argument("--out", metavar="PATH", help="file, or directory for NAME-TYPE.gguf (default: here)")
    text = "solve for the block formats on this text; may be repeated"
    parser.add_argument("--text", action="append", metavar="FILE", help=text)
    parser.add_argument("--column", help="of rows that holds it (default text)")
    parser.add_argument("--samples", type=int, help=f"sequences of it (default {SAMPLES})")
    parser.add_argument("--length", type=int, help=f"tokens of each (default {LENGTH})")
    how = "take text, options and device from a configuration instead: its calibration, gptq, device, dtype and strict"
    parser.add_argument("--config", metavar="FILE", help=how)
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N to solve on (default auto)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    parser.set_defaults(action=_export)


def _export(options: argparse.Namespace) -> int:
    from ptq.config import CalibrationConfig, DatasetConfig, RunConfig, load_config
    from ptq.export import export_gguf, show
    from ptq.schema import check_rules

    if options.config and options.text:
        raise ConfigError("export takes its text from --text or from --config, found both: leave one of them out")
    given = [f"--{name}" for name in ("column", "samples", "length", "device") if getattr(options, name) is not None]
    if given and not options.text:
        found = "--config, which has its own" if options.config else "none"
        need = "need" if given[1:] else "needs"
        raise ConfigError(f"{', '.join(given)} {need} --text FILE to solve on; found {found}: leave that out")
    run = load_config(options.config) if options.config else None
    if options.text:
        text = DatasetConfig(files=tuple(options.text), column=options.column or "text")
        samples = SAMPLES if options.samples is None else options.samples
        length = LENGTH if options.length is None else options.length
        calibration = CalibrationConfig(dataset=text, samples=samples, sequence_length=length)
        run = RunConfig(
            model=options.checkpoint, output="", method="gptq", device=options.device or "auto", calibration=calibration
        )
        check_rules(run, "")
        check_rules(calibration, "--", {"sequence_length": "length"})
    done = export_gguf(
        options.checkpoint, options.type, options.out, run,
        overwrite=options.overwrite, trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    print(show(done))
    return 0


def _shape(text: str) -> str:
    """For argparse: input and output features of a layer to time, in groups of 128."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None or int(found[1]) % 128 or not int(found[1]) or not int(found[2]):
        raise argparse.ArgumentTypeError(f"a shape is KxN, K a multiple of 128 and N at least 1, found {text!r}")
    return text


def _count(text: str) -> int:
    """For argparse: at least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is required, found {text!r}")
    return int(text)


def _threads(text: str) -> int:
    """For argparse: as many as there are processors at most, as they are pinned."""
    most = os.cpu_count() or 1
    if (count := _count(text)) > most:
        raise argparse.ArgumentTypeError(f"at most {most} threads have a processor each here, found {text}")
    return count


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", choices=["cpu"], help="GPUs are timed by scripts/gpu_check")
    sizes = "input x output features (default: four of a Llama-3-8B, and 512x1536)"
    parser.add_argument("--shapes", nargs="+", metavar="KxN", type=_shape, help=sizes)
    parser.add_argument("--rows", nargs="+", type=_count, help="rows of the input (default: 1 to 512)")
    parser.add_argument("--threads", nargs="+", type=_threads, default=[1], help="numbers of threads (default 1)")
    parser.add_argument("--compiled", action="store_true", help="add torch.compile's int4 path (needs a compiler)")
    parser.add_argument("--json", metavar="FILE", help="write the figures to a file as well")
    parser.set_defaults(action=_bench)


def _bench(options: argparse.Namespace) -> int:
    from ptq_kernels import bench_cpu

    shapes, rows = options.shapes or bench_cpu.SHAPES, options.rows or bench_cpu.ROWS
    if not options.json:
        return bench_cpu.main(shapes, rows, options.threads, None, options.compiled)
    with TemporaryDirectory(prefix="ptq-bench-") as folder:  # written by another process, which knows no devices
        made = Path(folder) / "figures.json"
        if code := bench_cpu.main(shapes, rows, options.threads, str(made), options.compiled):
            return code
        write_result(Path(options.json), made.read_text(encoding="utf-8"))
    return 0
