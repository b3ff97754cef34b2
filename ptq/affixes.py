"""What a tokenizer puts around a text."""

from collections.abc import Collection, Iterator
from itertools import islice
from typing import Any

TEXTS = 1000  # that are tried: where none of so many stands whole among the tokens, none will


def around(tokenizer: Any, special: Collection[int]) -> tuple[list[int], list[int]]:
    """The tokens that stand before and after a text.

    It is tried on one that the tokenizer has tokens for, none of them among ``special``: what stands for an unknown
    letter may be what stands at an end, too. Where there is none, what stands around nothing is parted behind the
    token that begins a text.
    """

    def texts() -> Iterator[str]:
        yield "a"
        yield from (tokenizer.decode([index]) for index in tokenizer.get_vocab().values() if index not in special)

    for text in islice(texts(), TEXTS):
        inside = tokenizer(text, add_special_tokens=False)["input_ids"]
        if inside and not set(special).intersection(inside):
            whole = tokenizer(text)["input_ids"]
            found = [i for i in range(len(whole)) if whole[i : i + len(inside)] == inside]
            if found:
                return whole[: found[0]], whole[found[0] + len(inside) :]
    empty, bos = tokenizer("")["input_ids"], getattr(tokenizer, "bos_token_id", None)
    if bos not in empty:
        return [], []
    end = empty.index(bos) + 1
    return empty[:end], empty[end:]
