"""A Hugging Face tokenizer as the keys llama.cpp's tokenizers read: vocabulary, special tokens, chat templates.

How text is cut is `ptq.gguf.words`'s.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from ptq.affixes import around
from ptq.errors import UnsupportedModelError
from ptq.gguf.words import Value, space_note, words_keys

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


# Special tokens: what transformers calls them, and GGUF.
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def tokenizer_keys(tokenizer: Any, rows: int, ids: Mapping[str, int] | None = None) -> dict[str, Value]:
    """``tokenizer.*`` of a GGUF file.

    Args:
        tokenizer: fast tokenizer of transformers.
        rows: of the embedding; rows no token has are named as unused.
        ids: of the special tokens that the tokenizer does not name, by the first word of `SPECIAL`.

    Raises:
        UnsupportedModelError: a tokenizer llama.cpp has no counterpart for, or with more tokens than rows.
    """
    spec = _spec(tokenizer)
    model = spec["model"]
    keys = words_keys(spec)
    named = {name: getattr(tokenizer, f"{name}_token_id", None) for name in SPECIAL}
    has_bytes = bool(model.get("byte_fallback"))
    # Of byte-level tokenizers none is unknown, yet many name some control token here, as SmolLM2 and Qwen2 do.
    is_other = not has_bytes or named["unk"] in (named["bos"], named["eos"])
    pieces, kinds = _vocabulary(spec, rows, has_bytes, None if is_other else named["unk"])
    keys |= {"tokenizer.ggml.tokens": pieces, "tokenizer.ggml.token_type": kinds}
    if has_bytes:
        keys["tokenizer.ggml.scores"] = _scores(model, pieces)
    found = {name: index for name, index in named.items() if isinstance(index, int)}
    return keys | _special(tokenizer, spec, {**(ids or {}), **found}) | _templates(tokenizer)


def tokenizer_notes(tokenizer: Any) -> tuple[str, ...]:
    """What llama.cpp cuts differently. Raises UnsupportedModelError as `tokenizer_keys`."""
    note = space_note(_spec(tokenizer))
    return () if note is None else (note,)


def _spec(tokenizer: Any) -> dict[str, Any]:
    """tokenizer.json."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError(
            f"GGUF needs a fast tokenizer (tokenizer.json); {type(tokenizer).__name__} has none: save one beside the "
            "model"
        )
    spec: dict[str, Any] = json.loads(backend.to_str())
    if spec["model"].get("type") != "BPE":
        raise UnsupportedModelError(
            f"GGUF export knows BPE tokenizers; this model's is {spec['model'].get('type')}: use llama.cpp's own "
            "converter"
        )
    return spec


def _vocabulary(
    spec: Mapping[str, Any], rows: int, has_bytes: bool, unknown: int | None
) -> tuple[list[str], list[int]]:
    """The text and the type of every row of the embedding; ``unknown`` is what transformers takes for any other."""
    by_id = {index: piece for piece, index in spec["model"]["vocab"].items()}
    added = {each["id"]: each for each in spec["added_tokens"]}
    last = max([*by_id, *added])
    if last >= rows:
        raise UnsupportedModelError(
            f"the embedding must have a row for every token; the tokenizer goes up to {last}, the embedding has {rows} "
            "rows: the two do not belong together"
        )
    taken = {*by_id.values(), *(token["content"] for token in added.values())}
    pieces, kinds = [], []
    for index in range(rows):
        if index in added:
            token = added[index]
            pieces.append(token["content"])
            is_unknown = index == unknown or token["content"] == spec["model"].get("unk_token")
            kinds.append(UNKNOWN if is_unknown else CONTROL if token["special"] else USER_DEFINED)
        elif index in by_id:
            pieces.append(by_id[index])
            is_byte = has_bytes and len(by_id[index]) == 6 and by_id[index].startswith("<0x")
            kinds.append(BYTE if is_byte else NORMAL)
        else:
            filler = f"[PAD{index}]"
            while filler in taken:
                filler += "_"
            pieces.append(filler)
            kinds.append(UNUSED)
    return pieces, kinds


def _scores(model: Mapping[str, Any], pieces: list[str]) -> list[float]:
    """llama.cpp joins the neighbours whose union scores highest: minus the rank of the first merge that makes it."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge if isinstance(merge, list) else merge.split(" ", 1)
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(piece, len(ranks))) for piece in pieces]


def _special(tokenizer: Any, spec: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, Value]:
    """Ids of special tokens, and which of them stand around a text."""
    keys: dict[str, Value] = {f"tokenizer.ggml.{SPECIAL[name]}_token_id": index for name, index in ids.items()}
    added = {token["id"] for token in spec["added_tokens"]}
    for name, found in zip(("bos", "eos"), around(tokenizer, added), strict=True):
        if found not in ([], [ids.get(name)]):
            where = {"bos": "before", "eos": "after"}[name]
            raise UnsupportedModelError(
                f"llama.cpp puts nothing but the {name} token {where} a text; this tokenizer puts "
                f"{' '.join(map(str, tokenizer.convert_ids_to_tokens(found)))} there, and its {name} token is "
                f"{getattr(tokenizer, f'{name}_token', None)}: use llama.cpp's own converter"
            )
        keys[f"tokenizer.ggml.add_{name}_token"] = bool(found)
    return keys


def _templates(tokenizer: Any) -> dict[str, Value]:
    keys: dict[str, Value] = {}
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
