"""How a tokenizer cuts text, as llama.cpp is told of it.

Two families: byte-level BPE (``gpt2`` in GGUF), whose way of cutting text into words llama.cpp knows by a name, and
SentencePiece-style BPE with byte fallback (``llama``). What llama.cpp would cut differently is an error, never a guess,
but for the space before a text, in which most tokenizers of the second family differ from it: that is a note.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ptq.errors import UnsupportedModelError

Value = bool | int | float | str | list[str] | list[int] | list[float]

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
# Where llama.cpp takes a word that is a token whole, without its merges.
WHOLE_WORDS = ("llama-bpe", "tekken")


def words_keys(spec: Mapping[str, Any]) -> dict[str, Value]:
    """The keys of a tokenizer's family and its way of cutting words.

    Args:
        spec: tokenizer.json of a BPE tokenizer.

    Raises:
        UnsupportedModelError: llama.cpp would cut text differently.
    """
    for key in ("end_of_word_suffix", "continuing_subword_prefix"):
        if spec["model"].get(key):
            raise UnsupportedModelError(
                f"llama.cpp's BPE puts nothing before or after the pieces of a word; this tokenizer has the {key} "
                f"{spec['model'][key]!r}: use llama.cpp's own converter"
            )
    return _sentencepiece(spec) if spec["model"].get("byte_fallback") else _byte_level(spec)


def _byte_level(spec: Mapping[str, Any]) -> dict[str, Value]:
    normalizer = (spec.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):  # llama.cpp does no normalization; NFC leaves nearly all text as it is
        raise UnsupportedModelError(
            f"llama.cpp's byte-level BPE does not normalize text; this tokenizer applies {normalizer}: use llama.cpp's "
            "own converter"
        )
    name = _pre_tokenizer(spec)
    _require_whole_words(spec, name)
    merges = [each if isinstance(each, str) else " ".join(each) for each in spec["model"]["merges"]]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges}


def _pre_tokenizer(spec: Mapping[str, Any]) -> str:
    """llama.cpp's name for how words are cut."""
    outer = spec.get("pre_tokenizer") or {}
    steps = outer["pretokenizers"] if outer.get("type") == "Sequence" else [outer]
    last = steps[-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if len(steps) == 1 and last.get("use_regex", True):
            return "gpt-2"
        first = steps[0]
        digits = first.get("type") == "Digits" and first.get("individual_digits")
        if len(steps) == 2 and digits and last.get("use_regex", True):
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


def _require_whole_words(spec: Mapping[str, Any], name: str) -> None:
    """Raise UnsupportedModelError where llama.cpp and the tokenizer cut a token's own text differently.

    One takes a word that is a token whole, the other joins it by its merges, which may not lead there.
    """
    model, theirs = spec["model"], name in WHOLE_WORDS
    if bool(model.get("ignore_merges")) == theirs:
        return
    from tokenizers import Tokenizer, decoders

    plain = {**spec, "truncation": None, "padding": None, "post_processor": None}
    one, other = (
        Tokenizer.from_str(json.dumps({**plain, "model": {**model, "ignore_merges": whole}})) for whole in (True, False)
    )
    texts = [decoders.ByteLevel().decode([piece]) for piece in model["vocab"]]
    for text, whole, merged in zip(texts, one.encode_batch(texts), other.encode_batch(texts), strict=True):
        if whole.ids != merged.ids:
            raise UnsupportedModelError(
                f"llama.cpp's {name} takes a word that is a token {'whole' if theirs else 'apart and merges it'}, this "
                f"tokenizer (ignore_merges: {json.dumps(not theirs)}) does the opposite, and of {text!r} the pieces "
                "differ: use llama.cpp's own converter"
            )


def _steps(spec: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Normalizers, then pre-tokenizers."""
    for key, inner in {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}.items():
        outer = spec.get(key) or {}
        yield from outer.get(inner, []) if outer.get("type") == "Sequence" else [outer] if outer else []


def _sentencepiece(spec: Mapping[str, Any]) -> dict[str, Value]:
    prefix = spaces = False
    for step in _steps(spec):
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == MARK:
            prefix = True
        elif kind == "Metaspace" and step["replacement"] == MARK:
            prefix, spaces = prefix or step.get("prepend_scheme", "always") != "never", True
            _require_no_split(spec, step)
        elif kind == "Replace" and step["pattern"] == {"String": " "} and step["content"] == MARK:
            spaces = True
        # Gemma's cuts at spaces, of which the normalizer has left none.
        elif not (kind == "Split" and step["pattern"] == {"String": " "} and spaces):
            raise UnsupportedModelError(
                f"llama.cpp's SentencePiece tokenizer turns spaces into {MARK} and does nothing else; this one applies "
                f"{kind}: use llama.cpp's own converter"
            )
    if not spaces:
        raise UnsupportedModelError(
            f"llama.cpp's SentencePiece tokenizer turns spaces into {MARK}; no step of this one does: use llama.cpp's "
            "own converter"
        )
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.add_space_prefix": prefix}


def _require_no_split(spec: Mapping[str, Any], metaspace: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError where words end before each mark, and a merge that llama.cpp does reaches beyond."""
    if not metaspace.get("split", True):
        return
    for merge in spec["model"]["merges"]:
        joined = "".join(merge) if isinstance(merge, list) else merge.replace(" ", "")
        if MARK in joined[1:]:
            raise UnsupportedModelError(
                f"llama.cpp's SentencePiece tokenizer does not cut at spaces; this one's Metaspace does, and so never "
                f"makes its piece {joined!r}: use llama.cpp's own converter"
            )


def space_note(spec: Mapping[str, Any]) -> str | None:
    """Where llama.cpp puts a space before a text and the tokenizer does not; None if nowhere.

    llama.cpp puts one before whatever stands at the beginning or after a special token. So does a Prepend of
    tokenizer.json; a Metaspace puts none before a space, and of the scheme "first" only at the beginning.
    """
    steps = list(_steps(spec)) if spec["model"].get("byte_fallback") else []
    scheme = next((s.get("prepend_scheme", "always") for s in steps if s["type"] == "Metaspace"), "never")
    if scheme == "never" or any(step["type"] == "Prepend" for step in steps):
        return None
    where = "begins with one" + (" or follows a special token" if scheme == "first" else "")
    return f"llama.cpp puts a space before a text that {where}, this tokenizer does not: their tokens differ there"
