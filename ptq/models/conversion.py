"""What transformers does to names and tensors when it reads a checkpoint, applied to one parameter at a time."""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ptq.errors import FormatError


class Piece(NamedTuple):
    """A stored tensor that is converted, alone or with others, into one or several parameters."""

    stored: str
    name: str  # after renaming
    targets: tuple[str, ...]  # parameters
    pattern: str
    part: int  # which of the conversion's sources it is
    expert: int | None
    converter: Any


class Conversions:
    """The renamings and conversions of one model."""

    def __init__(self, model: nn.Module) -> None:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping

        self._all = get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else []
        self._renamings = [t for t in self._all if not hasattr(t, "operations")]
        self._converters = [t for t in self._all if hasattr(t, "operations")]

    def used(self) -> list[Any]:
        """Those that applied to a name so far, in transformers' order."""
        return [t for t in self._all if t.was_used()]

    def rename(self, stored: str) -> str:
        """The name of a stored tensor after renaming."""
        name = stored
        for transform in self._renamings:
            name = str(transform.rename_source_key(name)[0])
        return name

    def piece(self, stored: str, renamed: str) -> Piece | None:
        """What a tensor is part of, None where it is a parameter as it is."""
        for converter in self._converters:
            target, pattern = converter.rename_source_key(renamed)
            if pattern is None:
                continue
            first, *others = converter.target_patterns
            # \1 in a pattern stands for a part of the name; several targets never use it
            targets = (target, *(target.replace(first, other, 1) for other in others))
            rest = renamed[len(_common(renamed, target)) :]
            number = re.match(r"(\d+)\.", rest)
            part = converter.source_patterns.index(pattern)
            expert = int(number[1]) if number and "*" in pattern else None
            return Piece(stored, renamed, targets, pattern, part, expert, converter)
        return None

    def gathers(self, stored: str) -> bool:
        """Whether a tensor of one expert is put into a stacked parameter; if not, transformers reads past it."""
        piece = self.piece(stored, self.rename(stored))
        return piece is not None and piece.expert is not None


def _common(one: str, other: str) -> str:
    """The longest common start that ends with a dot."""
    start = os.path.commonprefix([one, other])  # noqa: RUF071  (characters are meant: no path)
    return start[: start.rfind(".") + 1]


def is_one_tensor_each(piece: Piece) -> bool:
    """Whether the conversion only stacks experts and puts gate and up one after the other."""
    operations = [(type(op).__name__, getattr(op, "dim", None)) for op in piece.converter.operations]
    stacked = operations[:1] == [("MergeModulelist", 0)]
    return stacked and operations[1:] in ([], [("Concatenate", 1)]) and len(piece.targets) == 1


def put_together(model: nn.Module, name: str, pieces: Sequence[Piece], read: Callable[[str], Tensor]) -> Tensor:
    """A parameter from the tensors it is made of, as transformers itself makes it.

    Raises:
        FormatError: the tensors do not fit together.
    """
    first = pieces[0]
    converter = type(first.converter)(  # one of its own: it gathers tensors
        list(first.converter._original_source_patterns),
        list(first.converter._original_target_patterns),
        operations=first.converter.operations,
    )
    for piece in sorted(
        pieces, key=lambda piece: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", piece.name)]
    ):
        converter.add_tensor(first.targets[0], piece.name, piece.pattern, read(piece.stored))
    try:
        made = converter.convert(first.targets[0], model=model, config=getattr(model, "config", None))
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise FormatError(
            f"{name} must be made of {len(pieces)} tensors such as {first.stored}; transformers could not put them "
            f"together: {str(error).splitlines()[0]}: the checkpoint may be damaged or of another architecture"
        ) from error
    found = next((value for key, value in made.items() if name.endswith(key) or key.endswith(name)), None)
    value = found[0] if isinstance(found, list) else found
    if not isinstance(value, Tensor):
        raise FormatError(f"{name} must come out of {first.stored}; transformers made {', '.join(made)} of it")
    return value
