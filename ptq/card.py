"""The model card of a quantized checkpoint: what its report holds, and where `ptq lint` says that it loads."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from ptq.formats.capability import is_head
from ptq.formats.staging import read_json
from ptq.gguf.layout import ARCHITECTURES
from ptq.lint import Lint
from ptq.models.classes import auto_class
from ptq.parent import HUB_NAME
from ptq.readers import REFUSES, Verdict
from ptq.yaml_tree import unparse

Document = Mapping[str, Any]
_NAMED = 8  # Linears left in float
PROCESSORS = ("processor_config.json", "preprocessor_config.json")
METHODS = {"gptq": "GPTQ", "awq": "AWQ", "rtn": "round to nearest"}


def model_card(repo: str, document: Document, result: Lint) -> str:
    """README.md for ``repo``; ``document`` is a report, or empty where there is none.

    Nothing is said that the report or the lint does not hold; what is missing is said to be missing.
    """
    parts = [
        f"---\n{unparse(metadata(document))}---",
        f"# {repo.rpartition('/')[2]}",
        _lead(document),
        "## How it was made",
        _made(document),
        "## Quality",
        _quality(document),
        "## Where it loads",
        *_loading(repo, document, result),
        "## Licence",
        _licence(document),
    ]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def metadata(document: Document) -> dict[str, Any]:
    """The card's front matter."""
    parent = document.get("parent") or {}
    found: dict[str, Any] = dict(parent.get("card") or {})
    link = found.get("license_link")
    if isinstance(link, str) and parent.get("name") and not link.startswith("http"):
        found["license_link"] = f"https://huggingface.co/{parent['name']}/blob/main/{link}"
    if parent.get("name"):
        found |= {"base_model": parent["name"], "base_model_relation": "quantized"}
    widths = sorted({row["bits"] for row in document.get("modules", {}).values()})
    method = document.get("configuration", {}).get("method")
    found["library_name"] = "transformers"
    found["tags"] = ["ptq", *([method] if method else []), *(f"{bits}-bit" for bits in widths)]
    return found


def _lead(document: Document) -> str:
    configuration = document.get("configuration", {})
    if not configuration:
        return "A quantized checkpoint that was pushed without a report: how it was made is not known."
    method = _plain(str(METHODS.get(configuration["method"], configuration["method"])))
    name = (document.get("parent") or {}).get("name")
    model = PurePath(configuration["model"]).name
    parent = _link(name) if name else f"A model in a local directory called `{model.replace('`', '')}`"
    version = _plain(str(document.get("versions", {}).get("ptq", "")))
    return f"{parent} quantized with {method} by ptq {version}".rstrip() + "."


def _link(name: str) -> str:
    """A model on the hub; what is none's name is text."""
    return f"[{name}](https://huggingface.co/{name})" if HUB_NAME.fullmatch(name) else _plain(name)


def _made(document: Document) -> str:
    configuration = document.get("configuration", {})
    if not configuration:
        return "The report is missing."
    rows = [("method", _method(configuration))]
    schemes = Counter(
        (row["bits"], row["group_size"], row["symmetric"]) for row in document.get("modules", {}).values()
    )
    if budget := document.get("budget"):
        widths = ", ".join(map(str, budget["widths"]))
        asked = f"{budget['budget']:g} bits a weight on average, without scales and zeros, among {widths}"
        rows.append(("bit budget", f"{asked}; {budget['average_bits']:.4g} were spent"))
    for (bits, group_size, symmetric), count in schemes.most_common():
        groups = "one group a row" if group_size == -1 else f"groups of {group_size}"
        rows.append(
            (
                f"{count} Linear{'' if count == 1 else 's'}",
                f"{bits} bits, {groups}, {'symmetric' if symmetric else 'asymmetric'}",
            )
        )
    rows.append(("left in float", _some(document.get("kept_in_float", ())) or "no Linear"))
    rows.append(("format", configuration["format"]))
    size = document.get("size")
    if size:
        rows.append(("size", f"{size['after'] / 1e6:.1f} MB, parent {size['before'] / 1e6:.1f} MB"))
        rows.append(("bits a weight, scales and zeros included", f"{size['bits_per_weight']:.3f}"))
    rows.append(("calibration", _calibration(document)))
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {_plain(value)} |" for key, value in rows)])


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _plain(text: str) -> str:
    """Text from outside as it is, in a cell or beside one: Markdown takes nothing in it for its own."""
    inside = r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"  # underscores within words are none of Markdown's
    return re.sub(rf"([\\`*~|<>&#\[\]]|{inside})", r"\\\1", " ".join(text.split()))


def _method(configuration: Document) -> str:
    said = str(METHODS.get(configuration["method"], configuration["method"]))
    if configuration["method"] == "awq" and configuration.get("awq", {}).get("codes") == "gptq":
        said += ", codes by GPTQ"
    refine = configuration.get("refine", {})
    for key, of in (("steps", "a block"), ("model_steps", "of the whole model")):
        if refine.get(key):
            said += f", {refine[key]} steps of refinement {of}"
    return said


def _calibration(document: Document) -> str:
    used = document.get("calibration")
    if not used:
        return "none" if document["configuration"]["method"] == "rtn" else "not in the report"
    source = document["configuration"]["calibration"]["dataset"]
    files = ", ".join(PurePath(file).name for file in source.get("files", ()))
    text = source.get("name") or files or "data given in Python"
    return f"{used['sequences']} sequences, {used['tokens']} tokens of {text}, seed {used['seed']}"


def _quality(document: Document) -> str:
    evaluation = document.get("evaluation")
    if not evaluation:
        return "Not evaluated: the report holds no perplexity and no KL divergence."
    lines = ["| | perplexity | KL divergence | same top token |", "|---|---|---|---|"]
    for name, row in evaluation["models"].items():
        cells = [("perplexity", ".3f"), ("kl", ".5f"), ("top1", ".2%")]
        values = ["-" if row.get(key) is None else format(row[key], spec) for key, spec in cells]
        lines.append(f"| {_plain(str(name))} | {' | '.join(values)} |")
    text = evaluation["text"]
    sources = text if isinstance(text, str) else ", ".join(PurePath(file).name for file in text)
    protocol = (
        f"{evaluation['tokens']} tokens of {_plain(sources)}, window {evaluation['window']}, stride "
        f"{evaluation['stride']}. KL divergence is to the parent, in nats a token."
    )
    return "\n".join([*lines, "", protocol])


def _loading(repo: str, document: Document, result: Lint) -> list[str]:
    if not result.readers:
        return ["Not checked: the files are damaged, or their quantization is not one that is read."]
    parts = ["What `ptq lint` found; engines change, so look at the release you run."]
    config = read_json(result.directory / "config.json") if (result.directory / "config.json").is_file() else {}
    processor = any((result.directory / name).is_file() for name in PROCESSORS)
    parts += [_snippet(repo, verdict, config, processor=processor) for verdict in result.readers]
    splits = [str(count) for count, problems in result.parallel.items() if not problems]
    if result.parallel:
        said = f"can be split over {', '.join(splits)}" if splits else "cannot be split over 2, 4 or 8"
        parts.append(f"Tensor parallel: the packed weights {said} GPUs.")
    if not config or (config.get("model_type") in ARCHITECTURES and _auto(config) == "AutoModelForCausalLM"):
        parts.append(_llama_cpp(repo, document))
    parts.append(f'With `ptq`, packed in memory:\n\n```python\nimport ptq\n\nmodel = ptq.load("{repo}")\n```')
    return parts


def _auto(config: Document) -> str:
    named = config.get("architectures") or ()
    return auto_class(named[0]) if named and "auto_map" not in config else "AutoModelForCausalLM"


def _snippet(repo: str, verdict: Verdict, config: Document, *, processor: bool) -> str:
    head = f"**{verdict.reader}** {verdict.status}{': ' if verdict.reason else ''}{verdict.reason}."
    if verdict.status == REFUSES:
        return head
    if verdict.reader == "transformers":
        dequantize = "dequantize=True" in verdict.reason
        auto, text = _auto(config), "AutoProcessor" if processor else "AutoTokenizer"
        names = ", ".join([auto, text, *(["CompressedTensorsConfig"] if dequantize else [])])
        option = ", quantization_config=CompressedTensorsConfig(dequantize=True)" if dequantize else ""
        return (
            f"{head}\n\n```python\nfrom transformers import {names}\n\n"
            f'model = {auto}.from_pretrained("{repo}"{option})\n'
            f'{text.removeprefix("Auto").lower()} = {text}.from_pretrained("{repo}")\n```'
        )
    if verdict.reader == "vLLM":
        return f"{head}\n\n```bash\nvllm serve {repo}\n```"
    half = " --dtype half" if "float16" in verdict.reason else ""
    return f"{head}\n\n```bash\npython -m sglang.launch_server --model-path {repo}{half}\n```"


def _llama_cpp(repo: str, document: Document) -> str:
    """The command that carries the codes over, for schemes that a block format holds."""
    rows = document.get("modules", {}).values()
    known = bool(rows) and all(row["group_size"] % 32 == 0 for row in rows)
    if not known:
        return "**llama.cpp** reads GGUF files; no block format is known to hold these groups. Export the float parent."
    symmetric, widest = all(row["symmetric"] for row in rows), max(row["bits"] for row in rows)
    head = any(is_head(name) for name in document["modules"])  # for which a file type has a kind of its own
    kind = "Q8_0" if widest > 4 or head else "Q4_0" if symmetric else "Q4_1"
    if widest == 8 and not symmetric:
        return "**llama.cpp** reads GGUF files; none of its types has asymmetric 8-bit codes. Export the float parent."
    return (
        "**llama.cpp** reads GGUF files, which `ptq export` writes of Llama, Mistral, Qwen2 and Qwen3:\n\n"
        f"```bash\nptq export {repo} --type {kind} --out .\n```"
    )


def _licence(document: Document) -> str:
    parent = document.get("parent") or {}
    card = parent.get("card") or {}
    name = card.get("license_name") or card.get("license")
    if name:
        return f"That of the parent: {_plain(str(name))}."
    where = f" {_link(parent['name'])}" if parent.get("name") else ""
    return f"The parent's licence is not known here: look at the parent{where} before you use this."
