"""Which block format each tensor gets under a file type, as llama.cpp's own quantizer decides.

Mixed types spend more bits where they matter most: on the output head, and in part of the layers on values and on the
second half of the MLP. Rows that a K-quant's blocks of 256 do not fill fall back to a kind with blocks of 32.
"""

from typing import NamedTuple

from ptq.errors import ConfigError
from ptq.gguf.blocks import KINDS

FLOAT = "F16"


class FileType(NamedTuple):
    """The kind most tensors of a file have, and the number llama.cpp knows the mixture by."""

    kind: str
    number: int
    mixed: bool = False


FILE_TYPES = {
    "F16": FileType(FLOAT, 1),
    "Q4_0": FileType("Q4_0", 2),
    "Q4_1": FileType("Q4_1", 3),
    "Q8_0": FileType("Q8_0", 7),
    "Q4_K_M": FileType("Q4_K", 15, mixed=True),
    "Q5_K_M": FileType("Q5_K", 17, mixed=True),
    "Q6_K": FileType("Q6_K", 18),
}
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


class Place(NamedTuple):
    """Where a tensor stands in the model."""

    name: str  # as in the GGUF file, with .weight
    in_features: int
    block: int  # -1 outside the blocks
    blocks: int
    is_head: bool  # the output head, or the embedding that serves as one
    shares_values: bool  # 80 layers with grouped queries: eight heads read one value head


def file_type(name: str) -> FileType:
    """The file type of a name, in capitals or not. Raises ConfigError for an unknown one."""
    if name.upper() not in FILE_TYPES:
        raise ConfigError(f"--type must be one of {', '.join(FILE_TYPES)}; found {name!r}")
    return FILE_TYPES[name.upper()]


def wanted_kind(file: FileType, place: Place) -> str:
    """The kind a tensor would have if its rows had the right length."""
    if file.kind == FLOAT:
        return FLOAT
    if place.is_head:
        return "Q8_0" if file.kind == "Q8_0" or place.in_features % KINDS[file.kind].columns else "Q6_K"
    leaf = place.name.rpartition(".weight")[0].rpartition(".")[2]
    if file.mixed and leaf in ("attn_v", "ffn_down") and _favoured(place.block, place.blocks):
        return "Q6_K"
    if leaf == "attn_v" and place.shares_values and file.kind == "Q4_K":
        return "Q5_K"
    return file.kind


def kind_of(file: FileType, place: Place) -> str:
    """The kind a tensor gets."""
    kind = wanted_kind(file, place)
    for candidate in (kind, FALLBACK.get(kind, FLOAT)):
        if candidate == FLOAT or place.in_features % KINDS[candidate].columns == 0:
            return candidate
    return FLOAT


def _favoured(block: int, blocks: int) -> bool:
    """The first and last eighth of the layers and every third between them."""
    eighth = blocks // 8
    return block < eighth or block >= 7 * blocks // 8 or (block - eighth) % 3 == 2
