"""The files beside a model's weights that tell how it is run, and under which licence."""

import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from ptq.formats.staging import CHAT_TEMPLATES

# Of tokenizers, beside what is JSON.
TOKENIZERS = (
    *("*.model", "tokenizer.model.*", "tokenizer.jsonl", "*.tokenizer", "vocab*", "*.vocab"),
    *("*.tiktoken", "*.spm", "*.bpe", "*.codes", "merges.txt", "dict.txt"),
)
# What is fetched of a hub model and copied of a local one. Anything else is not of use to who loads the checkpoint:
# weights of other frameworks, archives, logs.
DESCRIPTION = (
    *("*.json", "*.jinja", "*.py", "*.cpp", "*.cu", "*.cuh", "*.h", "*.txt"),
    *TOKENIZERS,
    *("USE_POLICY*", "AUTHORS*", "*[Tt][Ee][Rr][Mm][Ss]*"),
    *("README.md", "*[Ll][Ii][Cc][Ee][Nn][CcSs][Ee]*", "*[Nn][Oo][Tt][Ii][Cc][Ee]*", "COPYING*"),
)
# Never, whatever else the name says.
WEIGHTS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.npz", "*.onnx", "*.onnx_data"),
    *("*.ot", "*.ckpt", "*.ckpt.*", "*.tflite", "*.mlmodel", "*.gz", "*.tar", "*.zip"),
)
# Of these, what is written anew, and what tells how another tool quantized the model.
ANEW = ("config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json", "*.index.json",
        "report.json", "README.md", ".*")  # fmt: skip


def copy_description(directory: Path, staged: Path) -> None:
    """Copy what describes the model in ``directory``, but for what its quantized or dense copy has of its own."""
    for entry in directory.iterdir():
        if entry.is_file() and describes(entry.name) and not _matches(entry.name, ANEW):
            shutil.copyfile(entry, staged / entry.name)
    if (directory / CHAT_TEMPLATES).is_dir():
        shutil.copytree(directory / CHAT_TEMPLATES, staged / CHAT_TEMPLATES, dirs_exist_ok=True)


def describes(name: str, patterns: tuple[str, ...] = DESCRIPTION) -> bool:
    """Whether a file of this name is one of ``patterns``, and holds no weights."""
    return _matches(name, patterns) and not _matches(name, WEIGHTS)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
