"""Values in a checkpoint that no writer should write: what `ptq.lint` finds beyond dtypes and shapes."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ptq.errors import FormatError
from ptq.formats.checkpoint import CheckpointReader
from ptq.formats.checks import FLOATS, read_order
from ptq.formats.codec import Codec, Scheme
from ptq.models.names import SourceNames

_CODES = (".qweight", ".weight_packed")  # any code is one that a writer may write


def packed_values(
    codec: Codec, schemes: Mapping[str, Scheme], names: SourceNames, reader: CheckpointReader
) -> tuple[list[str], frozenset[str]]:
    """Bad scales, zero points and groups; and the Linears whose groups are not contiguous. Shapes must be right."""
    problems: list[str] = []
    permuted: set[str] = set()
    for name, scheme in schemes.items():
        spelled = names.of_module(name)
        tensors = reader.tensors(t for t in codec.tensor_names(spelled, scheme) if not t.endswith(_CODES))
        scales = next(tensor for key, tensor in tensors.items() if key.endswith(("scales", "_scale")))
        bad = int((~torch.isfinite(scales) | (scales == 0)).sum())
        if bad:
            problems.append(f"{spelled}: {bad} of {scales.numel()} scales are zero or not finite")
        # Compressed-tensors keeps a row's scales together, the other formats a group's.
        grid = scales.shape if f"{spelled}.weight_scale" in tensors else scales.shape[::-1]
        try:
            codec.read_zeros(spelled, tensors, (grid[0], grid[1]), scheme)
            if _order(codec, spelled, tensors, scheme) is not None:
                permuted.add(name)
        except FormatError as error:
            problems.append(str(error))
    return problems, frozenset(permuted)


def _order(codec: Codec, spelled: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor | None:
    name = codec.order_name(spelled)
    if name is None or name not in tensors:
        return None
    columns = len(tensors[name])
    return read_order(name, tensors, columns, scheme.columns(columns))


def float_values(
    model: nn.Module, schemes: Mapping[str, Scheme], names: SourceNames, reader: CheckpointReader
) -> list[str]:
    """Tensors of float parameters that hold NaN or infinity, each named once."""
    problems: dict[str, str] = {}
    packed = {f"{name}.weight" for name in schemes}
    for name, _ in model.named_parameters(remove_duplicate=False):
        for source in () if name in packed else names.sources(name):
            if source in problems or reader.spec(source)[0] not in FLOATS:
                continue
            tensor = reader.tensor(source)
            bad = tensor.numel() - int(torch.isfinite(tensor).sum())
            problems[source] = f"{source}: {bad} of {tensor.numel()} values are not finite" if bad else ""
    return [problem for problem in problems.values() if problem]
