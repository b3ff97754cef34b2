"""The packed weights of a checkpoint that becomes a GGUF file: which kinds hold them, and what they are."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ptq.formats.capability import describe
from ptq.formats.codec import QuantizedWeight
from ptq.gguf.blocks import KINDS
from ptq.gguf.carry import fits
from ptq.gguf.layout import Target
from ptq.gguf.mix import FLOAT
from ptq.runtime import Checkpoint


def misfit(source: Checkpoint, found: Sequence[Target]) -> str | None:
    """Which packed Linear's codes do not fit the kind of its tensor; None where all do, or F16 was asked for."""
    for target in found:
        module = target.module
        scheme = source.schemes.get(module)
        if scheme is None or target.wanted == FLOAT:
            continue
        if not (target.kind in KINDS and fits(target.kind, scheme, target.shape[1])):
            return f"{target.parameter} ({describe(scheme)}) does not fit {target.kind}"
        if _is_permuted(source, module, target.shape[1]):
            return (
                f"{target.parameter} ({describe(scheme)}, act-order) has scales of columns that lie apart, which does "
                f"not fit {target.kind}"
            )
    return None


def packed_weight(source: Checkpoint, module: str) -> QuantizedWeight:
    """Codes and scales of a Linear. Raises FormatError for damage, or scales of columns that lie apart."""
    assert source.codec is not None
    stored, scheme = source.names.of_module(module), source.schemes[module]
    return source.codec.decode(stored, source.reader.tensors(source.codec.tensor_names(stored, scheme)), scheme)


def dense_weight(source: Checkpoint, module: str) -> Tensor:
    """The float32 ``[N, K]`` weight that the codes of a Linear mean. Raises FormatError for damage."""
    assert source.codec is not None
    stored, scheme = source.names.of_module(module), source.schemes[module]
    tensors = source.reader.tensors(source.codec.tensor_names(stored, scheme))
    quantized, order = source.codec.decode_ordered(stored, tensors, scheme)
    if order is None:
        return quantized.dequantize()
    scales, zeros = (each.float()[:, order] for each in (quantized.scales, quantized.zeros))
    return (quantized.codes.float() - zeros) * scales


def _is_permuted(source: Checkpoint, module: str, columns: int) -> bool:
    """Whether a file says that the columns of a group are not neighbours (act-order)."""
    assert source.codec is not None
    name = source.codec.order_name(source.names.of_module(module))
    order = source.reader.tensors([name]).get(name) if name is not None else None
    if order is None:
        return False
    size = source.schemes[module].columns(columns)
    return not torch.equal(order.long(), torch.arange(columns) // size)
