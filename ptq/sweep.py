"""Several checkpoints of one model from one command: each variant changes a few keys of a configuration.

What is the same for all is done once: the calibration text is tokenized once, budgets that differ in nothing else share
one pass of measurements, and the comparison at the end runs the parent once. Solving is not shared: GPTQ collects a
layer's inputs after the layers before it were quantized, so each variant has statistics of its own.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ptq.calibration.data import token_hash
from ptq.compare import PARENT, compare_checkpoints
from ptq.compare_page import FILES
from ptq.config import RunConfig, configured, load_config
from ptq.config_paths import config_text
from ptq.errors import ConfigError, FormatError
from ptq.formats.checkpoint import CheckpointReader, atomic_write_text
from ptq.formats.staging import json_text, output_path, require_writable
from ptq.journal_directory import sweep_up
from ptq.page_report import report_page
from ptq.pipeline import quantize
from ptq.plan import make_plan
from ptq.prepared import Prepared
from ptq.progress import Progress
from ptq.report import read_report
from ptq.yaml_tree import parse, unparse

# One parent and one text for all, or they could not be compared.
COMMON = ("model", "revision", "output", "evaluation")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def load_variants(config: str, variants: str, out: Path, assignments: Sequence[str] = ()) -> dict[str, RunConfig]:
    """The configuration of every variant, checked.

    Args:
        config: YAML file of what the variants have in common (found as for a run).
        variants: YAML file with a mapping of name to changed keys, nested as in a configuration or dotted, as in
            ``small: {bits: 3, gptq: {damping: 0.05}}``.
        out: directory the variants are written into, each under its name.
        assignments: ``key=value`` changes to all variants.

    Raises:
        ConfigError: a file, name, key or value that is not as required; no evaluation text.
    """
    file, text = config_text(variants)
    tree = parse(text, str(file))
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(f"{file} must map names to changed keys, as in 'three: {{bits: 3}}'; found {tree!r}")
    source, configs = config_text(config), {}
    for name, changes in tree.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in (PARENT, *FILES):
            raise ConfigError(
                f"a variant's name is that of its directory: letters, digits, '.', '_' and '-', and none of {PARENT}, "
                f"{', '.join(FILES)}; {file} has {name!r}"
            )
        if not isinstance(changes, dict):
            raise ConfigError(f"{file}: {name} must map keys to values, found {changes!r}; use {{}} for no change")
        common = [key for key in changes if str(key).partition(".")[0] in COMMON]
        if common:
            raise ConfigError(f"{file}: {name} changes {common[0]}, which is the same for all variants: use --set")
        changed = [*assignments, _assignment("output", str(out / name)), *_assignments(changes)]
        configs[name] = configured(*source, changed)
        if configs[name].evaluation is None:
            raise ConfigError(f"a sweep compares on held-out text; {config} names none: set evaluation.files")
    return configs


def _assignments(changes: Mapping[Any, Any], prefix: str = "") -> list[str]:
    """Changed keys as ``key=value``: a mapping adds to what is there, except that ``bits`` is one value."""
    found = []
    for key, value in changes.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value and path != "bits" and not prefix.startswith("overrides."):
            found += _assignments(value, f"{path}.")
        else:
            found.append(_assignment(path, value))
    return found


def _assignment(path: str, value: Any) -> str:
    """``key=value`` for any value that YAML can hold: dates and sets, too, so that the key's own check refuses them."""
    written = unparse(value).rstrip().removesuffix("\n...")  # the mark of a document's end
    return f"{path}={written}"


def sweep(
    configs: Mapping[str, RunConfig], *, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Make every variant and compare them; a variant that an earlier sweep finished is kept.

    Args:
        configs: from `load_variants`.
        overwrite: make variants again that are there.
        progress: shows what goes on.

    Returns:
        The comparison, as `ptq.compare.compare_checkpoints`; each variant's report holds its own figures.

    Raises:
        PtqError: as `ptq.pipeline.quantize` and `compare_checkpoints`; configurations and outputs are checked before
            anything is computed, and variants made before an error stay.
    """
    progress, prepared = progress or Progress(), Prepared()
    runs = {name: replace(config, evaluation=None) for name, config in configs.items()}
    for config in configs.values():  # with the evaluation: its window must fit the model, too
        make_plan(config, weights=False)
    kept = [name for name, config in runs.items() if not overwrite and _finished(config, prepared)]
    for name, config in runs.items():
        if name not in kept:
            require_writable(output_path(Path(config.output), "--out"), overwrite, "--out")
    for name, config in runs.items():
        if name in kept:
            sweep_up(Path(config.output))
            progress.say(f"{name}: kept, {config.output} was made with this configuration")
            continue
        progress.say(f"{name}: {config.output}")
        quantize(config, overwrite=overwrite, progress=progress, prepared=prepared)
    first = next(iter(configs.values()))
    assert first.evaluation is not None
    outputs = {name: config.output for name, config in configs.items()}
    with progress.stage("compare"):
        document = compare_checkpoints(
            list(outputs.values()), first.model, first.evaluation, device=first.device, dtype=first.dtype,
            trust_remote_code=first.trust_remote_code,
        )  # fmt: skip
    for name, output in outputs.items():
        _complete(Path(output), name, document)
    return document


def _finished(config: RunConfig, prepared: Prepared) -> bool:
    """Whether the output is a whole checkpoint, with a report, of this configuration, calibrated on the same text."""
    made = Path(config.output) / "ptq_config.yaml"
    try:
        if not made.is_file() or load_config(made) != config:
            return False
        CheckpointReader(made.parent)  # of shards cut short, and of lost ones
        report = read_report(made.parent / "report.json")
        if not config.calibrates:
            return "modules" in report
        hashed = report["calibration"]["token_hash"]
    except (ConfigError, FormatError, KeyError):  # of a version with other options, or damaged
        return False
    return bool(token_hash(prepared.batches(make_plan(config, weights=False))) == hashed)


def _complete(output: Path, name: str, document: Mapping[str, Any]) -> None:
    """Put a variant's figures into its report."""
    report = read_report(output / "report.json")
    keys = ("perplexity", "kl", "top1", "megabytes")
    rows = {"parent": document["models"][PARENT], "result": document["models"][name]}
    models = {label: {key: row[key] for key in keys} for label, row in rows.items()}
    protocol = {key: document[key] for key in ("text", "window", "stride", "tokens")}
    report["evaluation"] = {**protocol, "models": models}
    atomic_write_text(output / "report.json", json_text(report))
    atomic_write_text(output / "report.html", report_page(name, report))
