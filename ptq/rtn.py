"""Round-to-nearest: every weight to the nearest point of its group's min-max grid. The baseline of every comparison."""

import torch
from torch import Tensor

from ptq.formats.codec import QuantizedWeight, Scheme
from ptq.grid import min_max_grid, nearest_codes, pack_result


def rtn_solve(weight: Tensor, scheme: Scheme, *, scale_dtype: torch.dtype = torch.float16) -> QuantizedWeight:
    """Quantize ``[N, K]`` by rounding alone.

    Raises:
        ConfigError: the group size does not divide K.
        NumericsError: the weight holds NaN or infinity.
    """
    weight = weight.float()
    grid = min_max_grid(weight, scheme, scale_dtype=scale_dtype)
    return pack_result(nearest_codes(weight, grid), grid)
