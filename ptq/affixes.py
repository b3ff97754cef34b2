"""What a tokenizer puts around a text."""

from collections.abc import Collection, Iterator
from typing import Any


def around(tokenizer: Any, special: Collection[int]) -> tuple[list[int], list[int]]:
    """The tokens that stand before and after a text.

    It is tried on one that the tokenizer has tokens for, none of them among ``special``: what stands for an unknown
    letter may be what stands at an end, too.
    """

    def texts() -> Iterator[str]:
        yield "a"
        yield from (tokenizer.decode([index]) for index in tokenizer.get_vocab().values() if index not in special)

    for text in texts():
        inside = tokenizer(text, add_special_tokens=False)["input_ids"]
        if inside and not set(special).intersection(inside):
            whole = tokenizer(text)["input_ids"]
            found = [i for i in range(len(whole)) if whole[i : i + len(inside)] == inside]
            if found:
                return whole[: found[0]], whole[found[0] + len(inside) :]
    return tokenizer("")["input_ids"], []  # no text has tokens
