"""What a plan comes to: the bytes of the checkpoint, and the lines that ``ptq plan`` shows."""

from collections import Counter
from typing import NamedTuple

import torch

from ptq.config import BitBudget, fixed_bits
from ptq.formats.codec import WIDTHS, Scheme
from ptq.models.loading import working_dtype
from ptq.plan import Plan, block_count, describe_extra, extra_tensors, replaced_tensors, taken_apart


class Size(NamedTuple):
    """Bytes of the checkpoint before and after, and the bits a quantized weight takes with scales and zeros."""

    before: int
    after: int
    bits_per_weight: float


def estimate_size(plan: Plan) -> Size:
    """Sizes from the headers alone: exact up to the safetensors headers of the result."""
    before = sum(plan.reader.files().values())
    replaced = replaced_tensors(plan)
    after = 0
    for name in plan.reader.names():
        if name not in replaced:
            dtype, shape = plan.reader.spec(name)
            stand_in = torch.empty(shape, dtype=dtype, device="meta")
            after += stand_in.numel() * working_dtype(plan.skeleton, name, stand_in, plan.dtype).itemsize
    for path in taken_apart(plan):  # biases and excluded Linears that a fused parameter of the parent held
        for local, parameter in plan.skeleton.get_submodule(path).named_parameters():
            name = f"{path}.{local}"
            if plan.names.find(name) is None and name.removesuffix(".weight") not in plan.targets:
                after += parameter.numel() * plan.dtype.itemsize
    packed = weights = 0
    for path, scheme in plan.targets.items():
        n, k = plan.shapes[path]
        packed += _packed_bytes(plan, path, scheme)
        weights += n * k
    return Size(before, after + packed, 8 * packed / weights)


def _packed_bytes(plan: Plan, path: str, scheme: Scheme) -> int:
    specs = plan.codec.tensor_specs(path, *plan.shapes[path], scheme, plan.codec.scales_dtype(plan.dtype))
    return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in specs.values())


def describe(plan: Plan) -> str:
    """The plan as text, for ``--dry-run``."""
    size = _with_budget(plan, estimate_size(plan))
    kinds = Counter((scheme, plan.shapes[path]) for path, scheme in plan.targets.items())
    lines = [
        f"model      {plan.config.model} ({type(plan.skeleton).__name__}, {plan.dtype}, {len(plan.schemes)} Linears)",
        f"blocks     {plan.blocks}, {block_count(plan)} of them",
        f"method     {plan.config.method} on {plan.device}",
        f"format     {plan.config.format}, written to {plan.config.output}",
    ]
    if plan.config.calibrates:
        c = plan.config.calibration
        lines.append(f"calibrate  {c.samples} sequences of {c.sequence_length} tokens, seed {c.seed}")
    for (scheme, (n, k)), count in sorted(kinds.items(), key=lambda item: str(item[0])):
        kind = "symmetric" if scheme.symmetric else "asymmetric"
        columns = scheme.columns(k)
        groups = "1 group" if columns == k else f"{k // columns} groups of {columns}"
        lines.append(f"quantize   {count:4d} x {n} x {k}: {_bits(plan, scheme)}, {groups} a row, {kind}")
    left = [path for path, scheme in plan.schemes.items() if scheme is None]
    more = f" and {len(left) - 4} more" if len(left) > 4 else ""
    lines.append(f"keep       {len(left)} Linears in float{': ' + ', '.join(left[:4]) if left else ''}{more}")
    if extra := extra_tensors(plan):
        lines.append(f"extra      {describe_extra(extra)}")
    lines.append(
        f"size       {size.before / 1e6:.1f} MB -> {size.after / 1e6:.1f} MB of tensors (the files' headers come on "
        f"top), {size.bits_per_weight:.3f} bits a quantized weight"
    )
    if isinstance(plan.config.bits, BitBudget):
        lines.append("budget     is spent before the solve, by a pass over all blocks that the figures below leave out")
    return "\n".join(lines)


def _bits(plan: Plan, scheme: Scheme) -> str:
    """Widths that a run will choose are not known yet."""
    budget = plan.config.bits
    return f"{budget.budget:g} bits on average" if isinstance(budget, BitBudget) else f"{scheme.bits} bits"


def _with_budget(plan: Plan, size: Size) -> Size:
    """A size for the bits that stand in, corrected for those that a budget will spend."""
    if not isinstance(plan.config.bits, BitBudget):
        return size
    weights = {path: plan.shapes[path][0] * plan.shapes[path][1] for path in plan.targets}
    more = plan.config.bits.budget * sum(weights.values())
    more -= sum(scheme.bits * weights[path] for path, scheme in plan.targets.items())
    free = {path: scheme for path, scheme in plan.targets.items() if fixed_bits(plan.config, path) is None}
    if not free:
        return size
    added = 0.0  # bytes for a bit more of all that is free: zero points grow with the codes
    for path, scheme in free.items():
        other = next((bits for bits in WIDTHS if bits > scheme.bits), WIDTHS[0])
        between = _packed_bytes(plan, path, scheme._replace(bits=other)) - _packed_bytes(plan, path, scheme)
        added += between / (other - scheme.bits)
    added *= more / sum(weights[path] for path in free)
    return Size(size.before, size.after + round(added), size.bits_per_weight + 8 * added / sum(weights.values()))
