"""Which files beside the weights go along, and which of them a run that goes on looks at."""

import ast
from pathlib import Path
from types import SimpleNamespace

import transformers

from ptq.journal_signature import model_signature
from ptq.models.description import copy_description

# Names as publishers of models spell them.
TERMS = (
    *("LICENSE", "LICENSE.md", "License.txt", "LICENCE", "license", "MODEL_LICENSE", "LLAMA_LICENSE", "LICENSE-MODEL"),
    *(
        "THIRD-PARTY-LICENSES",
        "Dolphin-License.pdf",
        "Notice",
        "NOTICE.txt",
        "THIRD_PARTY_NOTICES",
        "COPYING",
        "USE_POLICY.md",
        "AUTHORS",
    ),
)
CODE = ("cache_kernel.cuh", "cache_kernel.cu", "kernel.h", "kernel.cpp", "modeling_x.py")
WORDS = (
    *("tokenizer.jsonl", "prophetnet.tokenizer", "vocab", "vocab.pkl", "vocab_1.tsv", "rwkv.vocab", "vocab.bpe"),
    *("tokenizer.model.v3", "qwen.tiktoken", "bpe.codes", "source.spm"),
)
WEIGHTS = (
    *("vocab.safetensors", "vocab.bin", "vocab.pt", "vocab.gguf", "vocab.h5", "vocab.msgpack", "vocab.onnx"),
    *("vocab.npz", "license.zip", "model.ckpt.index", "pytorch_model.bin"),
)


def named_by_transformers() -> set[str]:
    """What its tokenizers call their files: the values of VOCAB_FILES_NAMES in their modules."""
    found = set()
    for file in Path(transformers.__file__).parent.rglob("tokenization*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            targets = node.targets if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) else ()
            if "VOCAB_FILES_NAMES" in {getattr(target, "id", None) for target in targets}:
                found |= {value.value for value in node.value.values if isinstance(value, ast.Constant)}
    return found


def copied(names: set[str], place: Path) -> set[str]:
    """Those of ``names`` that go along."""
    source, staged = place / "source", place / "staged"
    source.mkdir()
    staged.mkdir()
    for name in names:
        (source / name).write_text(name)
    copy_description(source, staged)
    return {path.name for path in staged.iterdir()}


def test_every_file_of_a_tokenizer_goes_along(tmp_path: Path) -> None:
    names = named_by_transformers()
    assert {"vocab.json", "merges.txt", "spiece.model", "tokenizer.json"} <= names, (
        "the modules are as this test reads them"
    )
    assert copied(names | set(WORDS), tmp_path) == names | set(WORDS)


def test_code_and_terms_go_along_and_weights_do_not(tmp_path: Path) -> None:
    names = {*TERMS, *CODE}
    assert copied(names | set(WEIGHTS), tmp_path) == names


def test_a_run_that_goes_on_looks_at_every_file_of_a_tokenizer(tmp_path: Path) -> None:
    """And at the weights it reads, but at no others, and at no licence or log."""
    names = named_by_transformers() | {*WORDS, "chat_template.jinja", "modeling_x.py", "model.safetensors"}
    for name in (*names, *TERMS, *WEIGHTS, "log.txt"):
        (tmp_path / name).write_text(name)
    reader = SimpleNamespace(files=lambda: {"model.safetensors": 1})
    plan = SimpleNamespace(directory=tmp_path, reader=reader)
    assert set(model_signature(plan)) == {f"model.{name}" for name in names}  # type: ignore[arg-type]
