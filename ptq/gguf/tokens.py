"""A Hugging Face tokenizer as the keys llama.cpp's tokenizers read.

Two families: byte-level BPE (``gpt2`` in GGUF), whose way of cutting text into words llama.cpp knows by a name, and
SentencePiece-style BPE with byte fallback (``llama``), whose merges become scores. What llama.cpp would cut
differently is an error, never a guess.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from ptq.errors import UnsupportedModelError

Value = bool | int | float | str | list[str] | list[int] | list[float]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
MARK = "\u2581"  # stands for a space in SentencePiece tokens
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# How words are cut before BPE: the regular expression in tokenizer.json to llama.cpp's name for it.
PATTERNS = {
    _CONTRACTIONS + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _ENDS: "llama-bpe",
    _CONTRACTIONS + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _ENDS: "qwen2",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|"
    + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _ENDS: "tekken",
}  # fmt: skip


def tokenizer_keys(tokenizer: Any, rows: int) -> dict[str, Value]:
    """``tokenizer.*`` of a GGUF file.

    Args:
        tokenizer: fast tokenizer of transformers.
        rows: of the embedding; rows no token has are named as unused.

    Raises:
        UnsupportedModelError: a tokenizer llama.cpp has no counterpart for, or with more tokens than rows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError(
            f"GGUF needs a fast tokenizer (tokenizer.json); {type(tokenizer).__name__} has none: save one beside the "
            "model"
        )
    spec = json.loads(backend.to_str())
    model = spec["model"]
    if model.get("type") != "BPE":
        raise UnsupportedModelError(
            f"GGUF export knows BPE tokenizers; this model's is {model.get('type')}: use llama.cpp's own converter"
        )
    keys = _sentencepiece(spec) if model.get("byte_fallback") else _byte_level(spec)
    pieces, kinds = _vocabulary(spec, rows, bool(model.get("byte_fallback")))
    keys |= {"tokenizer.ggml.tokens": pieces, "tokenizer.ggml.token_type": kinds}
    if model.get("byte_fallback"):
        keys["tokenizer.ggml.scores"] = _scores(model, pieces)
    return keys | _special(tokenizer)


def _vocabulary(spec: Mapping[str, Any], rows: int, has_bytes: bool) -> tuple[list[str], list[int]]:
    """The text and the type of every row of the embedding."""
    by_id = {index: piece for piece, index in spec["model"]["vocab"].items()}
    added = {each["id"]: each for each in spec["added_tokens"]}
    last = max([*by_id, *added])
    if last >= rows:
        raise UnsupportedModelError(
            f"the embedding must have a row for every token; the tokenizer goes up to {last}, the embedding has {rows} "
            "rows: the two do not belong together"
        )
    pieces, kinds = [], []
    for index in range(rows):
        if index in added:
            token = added[index]
            pieces.append(token["content"])
            unknown = token["content"] == spec["model"].get("unk_token")
            kinds.append(UNKNOWN if unknown else CONTROL if token["special"] else USER_DEFINED)
        elif index in by_id:
            pieces.append(by_id[index])
            is_byte = has_bytes and len(by_id[index]) == 6 and by_id[index].startswith("<0x")
            kinds.append(BYTE if is_byte else NORMAL)
        else:
            pieces.append(f"[PAD{index}]")
            kinds.append(UNUSED)
    return pieces, kinds


def _byte_level(spec: Mapping[str, Any]) -> dict[str, Value]:
    normalizer = (spec.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):  # llama.cpp does no normalization; NFC leaves nearly all text as it is
        raise UnsupportedModelError(
            f"llama.cpp's byte-level BPE does not normalize text; this tokenizer applies {normalizer}: use llama.cpp's "
            "own converter"
        )
    merges = [each if isinstance(each, str) else " ".join(each) for each in spec["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_tokenizer(spec),
        "tokenizer.ggml.merges": merges,
    }


def _pre_tokenizer(spec: Mapping[str, Any]) -> str:
    """llama.cpp's name for how words are cut."""
    outer = spec.get("pre_tokenizer") or {}
    steps = outer["pretokenizers"] if outer.get("type") == "Sequence" else [outer]
    last = steps[-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if len(steps) == 1 and last.get("use_regex", True):
            return "gpt-2"
        first = steps[0]
        if len(steps) == 2 and first.get("type") == "Digits" and first.get("individual_digits"):
            return "smollm"
        if len(steps) == 2 and first.get("type") == "Split" and not last.get("use_regex", True):
            name = PATTERNS.get(first["pattern"].get("Regex", ""))
            if name is not None and first.get("behavior") == "Isolated" and not first.get("invert"):
                return name
    known = ", ".join(["gpt-2", "smollm", *PATTERNS.values()])
    raise UnsupportedModelError(
        f"the tokenizer must cut words in a way llama.cpp has a name for ({known}); this one's pre-tokenizer is "
        f"{json.dumps(outer)[:200]}: use llama.cpp's own converter"
    )


def _sentencepiece(spec: Mapping[str, Any]) -> dict[str, Value]:
    def parts(key: str, inner: str) -> list[dict[str, Any]]:
        outer = spec.get(key) or {}
        steps = outer.get(inner, []) if outer.get("type") == "Sequence" else [outer] if outer else []
        return [step for step in steps if step]

    steps = parts("normalizer", "normalizers") + parts("pre_tokenizer", "pretokenizers")
    prefix = False
    for step in steps:
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == MARK:
            prefix = True
        elif kind == "Metaspace" and step["replacement"] == MARK:
            prefix = prefix or step.get("prepend_scheme", "always") != "never"
        elif not (kind == "Replace" and step["pattern"] == {"String": " "} and step["content"] == MARK):
            raise UnsupportedModelError(
                f"llama.cpp's SentencePiece tokenizer turns spaces into {MARK} and does nothing else; this one applies "
                f"{kind}: use llama.cpp's own converter"
            )
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _scores(model: Mapping[str, Any], pieces: list[str]) -> list[float]:
    """llama.cpp joins the neighbours whose union scores highest: minus the rank of the first merge that makes it."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge if isinstance(merge, list) else merge.split(" ", 1)
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(piece, len(ranks))) for piece in pieces]


def _special(tokenizer: Any) -> dict[str, Value]:
    keys: dict[str, Value] = {}
    for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        index = getattr(tokenizer, f"{name}_token_id", None)
        if isinstance(index, int):
            keys[f"tokenizer.ggml.{key}_token_id"] = index
    around = tokenizer("a")["input_ids"]
    keys["tokenizer.ggml.add_bos_token"] = tokenizer.bos_token_id is not None and around[0] == tokenizer.bos_token_id
    keys["tokenizer.ggml.add_eos_token"] = tokenizer.eos_token_id is not None and around[-1] == tokenizer.eos_token_id
    template = getattr(tokenizer, "chat_template", None)
    named = template if isinstance(template, Mapping) else {"default": template}
    others = []
    for name, text in named.items():
        if not (isinstance(text, str) and text and name):
            continue
        if name == "default":
            keys["tokenizer.chat_template"] = text
        else:
            plain = re.sub(r"[^A-Za-z0-9]", "_", name)
            while plain in others:  # of two that differ in nothing but such characters
                plain += "_"
            others.append(plain)
            keys[f"tokenizer.chat_template.{others[-1]}"] = text
    if others:
        keys["tokenizer.chat_templates"] = others
    return keys
