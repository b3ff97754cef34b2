"""The output head of a model, packed when the model is loaded."""

import torch
from torch import nn

from ptq.errors import ConfigError
from ptq.formats.codec import QuantizedWeight, Scheme
from ptq.grid import nearest_codes, pack_result
from ptq.grid_search import search_grid
from ptq.nn.linear import QuantLinear
from ptq.nn.swap import to_quant_linear

BITS = (4, 8)
GROUPS = (128, 64, 32)  # the first that divides the inputs; where none does, a row is a group
_ROWS = 8192  # rounded at a time: a large head is never held in float32


def check_head(head: nn.Module | None, bits: int) -> None:
    """Raise ConfigError unless `head` is a float Linear and `bits` a width it can be packed with."""
    if bits not in BITS:
        raise ConfigError(f"head_bits must be 4, 8 or None, found {bits!r}; leave it out to keep the head in float")
    if isinstance(head, QuantLinear):
        raise ConfigError(
            f"head_bits is for a head in float; this checkpoint holds its head in {head.bits} bits: leave head_bits out"
        )
    if not isinstance(head, nn.Linear):
        raise ConfigError(
            f"head_bits needs an output head that is a Linear; the model has {type(head).__name__}: leave head_bits out"
        )


@torch.no_grad()
def pack_head(head: nn.Linear, bits: int) -> QuantLinear:
    """The Linear that puts out the logits as a packed layer: rounded to nearest, not calibrated.

    Groups of 128 inputs (64, 32 or the whole row where 128 does not divide them), symmetric. The signed float16 scale
    of each group is the one of least squared error in the weight, of those that `ptq.grid_search` tries. The weight of
    `head` is left as it is: an embedding may share it.

    Raises NumericsError if the weight holds NaN or infinity.
    """
    columns = head.in_features
    scheme = Scheme(bits, next((size for size in GROUPS if columns % size == 0), -1), True)
    even = torch.ones(columns, device=head.weight.device)  # every input counts alike
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for rows in head.weight.detach().split(_ROWS):
        weight = rows.float()
        grid = search_grid(weight, even, scheme)
        found = pack_result(nearest_codes(weight, grid), grid)
        parts.append((found.codes, found.scales, found.zeros))
    codes, scales, zeros = (torch.cat(part) for part in zip(*parts, strict=True))
    quantized = QuantizedWeight(codes, scales, zeros, bits, scheme.columns(columns), True)
    return to_quant_linear(quantized, head.bias, head.weight.dtype)
