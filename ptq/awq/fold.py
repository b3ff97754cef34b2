"""Folding channel scales into whatever produces the channels, for any architecture.

A fold divides the outputs of a producer (a norm, or some rows of a Linear) by s and multiplies the input columns of the
Linears that read them by s. Whether that leaves a block's function unchanged is not looked up in a table of
architectures: candidates come from one traced forward pass, and each is tried with random scales on a float32 copy
of the block. What changes the output is no fold.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ptq.calibration.capture import InputGroup
from ptq.models.experts import UnfusedExperts, experts_of, routers
from ptq.models.structure import is_transposed, linears, weight_of
from ptq.routing import everyone

Probe = Callable[[nn.Module], Tensor]

# float32 arithmetic through one block; a wrong fold with scales between 0.5 and 2 is off by more than 1e-2.
UNCHANGED = 1e-4
# Rows on which a fold inside an expert is tried.
EXPERT_ROWS = 64


class Fold(NamedTuple):
    """Where the scales of one input group can go."""

    producer: str  # path below the block
    consumers: tuple[str, ...]
    rows: Tensor  # int64 [K]: the producer's output that becomes input channel k
    offset: bool  # the norm multiplies by (1 + weight)
    floats: tuple[str, ...] = ()  # routers that read the same: scaled, never quantized


class _Readers(NamedTuple):
    """Linears that get one set of scales, what else must be scaled with them, and who may stand before them."""

    members: tuple[str, ...]
    floats: tuple[str, ...]
    norm: str | None
    earlier: tuple[str, ...]
    expert: str | None  # they and whoever stands before them are Linears of this expert


def find_folds(block: nn.Module, groups: Sequence[InputGroup], probe: Probe) -> list[Fold]:
    """Folds of a block that leave its output unchanged, at most one for each input group, in execution order.

    What a router and experts read is one input: a fold before it scales the router and all experts. A fold inside an
    expert is tried on that expert alone.

    Args:
        block: float32 block; comes back unchanged.
        groups: Linears that share an input.
        probe: runs a module in the block's place on a float32 batch and returns its output.
    """
    whole = with_all_experts(probe)
    expected, inputs = _with_expert_inputs(block, whole)
    heads = _head_sizes(block)
    generator = torch.Generator().manual_seed(0)
    folds: list[Fold] = []
    for readers in _readers(block, groups, _norm_outputs(block, groups, probe)):
        trial, wanted = whole, expected
        if readers.expert is not None:
            trial = _expert_alone(readers.expert, inputs)
            wanted = trial(block)
        for fold in _candidates(block, readers, heads):
            random = torch.rand(int(fold.rows.max()) + 1, generator=generator).mul_(1.4).sub_(0.7).exp_()
            if _unchanged(block, fold, random.to(fold.rows.device)[fold.rows], trial, wanted):
                folds.append(fold)
                break
    return folds


def with_all_experts(probe: Probe) -> Probe:
    """The same, but all experts add to the output, so that what is wrong with any of them shows."""

    def probed(module: nn.Module) -> Tensor:
        with everyone():
            return probe(module)

    return probed


def _with_expert_inputs(block: nn.Module, probe: Probe) -> tuple[Tensor, dict[str, Tensor]]:
    """A block's output, and some of the rows that each experts module in it reads."""
    inputs: dict[str, Tensor] = {}
    pools = experts_of(block)
    handles = [
        pool.register_forward_pre_hook(_keep_input(inputs, path), with_kwargs=True) for path, pool in pools.items()
    ]
    try:
        output = probe(block)
    finally:
        for handle in handles:
            handle.remove()
    rows = {path: x.reshape(-1, x.shape[-1]) for path, x in inputs.items()}
    return output, {path: x[x.any(-1)][:EXPERT_ROWS] for path, x in rows.items()}


def _expert_alone(path: str, inputs: Mapping[str, Tensor]) -> Probe:
    pool, _, index = path.rpartition(".")

    def probed(block: nn.Module) -> Tensor:
        experts = block.get_submodule(pool)
        assert isinstance(experts, UnfusedExperts)
        return experts.run_expert(int(index), inputs[pool])

    return probed


def _readers(block: nn.Module, groups: Sequence[InputGroup], norms: Mapping[str, str]) -> Iterator[_Readers]:
    """Input groups in execution order; of each experts module those that read its input are one with its router."""
    pools, beside = experts_of(block), tuple(routers(block))
    done: set[str] = set()
    for index, group in enumerate(groups):
        head = group.members[0]
        earlier = tuple(member for g in groups[:index] for member in g.members)
        pool = next((path for path in pools if head.startswith(f"{path}.")), None)
        if pool is not None and head.endswith(".down_proj"):
            expert = head.rpartition(".")[0]
            yield _Readers(group.members, (), None, tuple(m for m in earlier if m.startswith(f"{expert}.")), expert)
            continue
        near = [path for path in beside if pool is not None and _same_parent(path, pool)]
        norm = norms.get(head) or next((norms[path] for path in near if path in norms), None)
        reading = tuple(path for path in beside if norm is not None and norms.get(path) == norm)
        if not reading:
            yield _Readers(group.members, (), norm, earlier, None)
        elif norm not in done:
            done.add(str(norm))
            fed = tuple(f"{path}." for path in pools if any(_same_parent(router, path) for router in reading))
            members = tuple(
                member
                for g in groups
                for member in g.members
                if norms.get(g.members[0]) == norm or (member.startswith(fed) and not member.endswith(".down_proj"))
            )
            yield _Readers(members, tuple(path for path in reading if path not in members), norm, earlier, None)


def _same_parent(router: str, pool: str) -> bool:
    return f"{router}.".startswith(f"{pool.rpartition('.')[0]}.".lstrip("."))


def _unchanged(block: nn.Module, fold: Fold, scales: Tensor, probe: Probe, expected: Tensor) -> bool:
    """Whether a fold leaves the output as it was; the block is put back."""
    touched = [block.get_submodule(path) for path in (fold.producer, *fold.consumers, *fold.floats)]
    before = [(p, p.detach().clone()) for module in touched for p in module.parameters(recurse=False)]
    apply_fold(block, fold, scales)
    try:
        return difference(probe(block), expected) < UNCHANGED
    finally:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative distance of two outputs in the maximum norm."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


@torch.no_grad()
def apply_fold(block: nn.Module, fold: Fold, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Fold scales ``[K]`` into a float32 block.

    A norm's new weight is rounded to ``dtype``, in which the checkpoint keeps it, and the consumers are multiplied by
    what was really divided out, so that the rounding costs nothing.

    Returns:
        The scales that were applied, ``[K]``.
    """
    producer = block.get_submodule(fold.producer)
    per_row = torch.ones(_outputs(producer), dtype=scales.dtype, device=scales.device).scatter_(0, fold.rows, scales)
    if fold.producer in dict(linears(block)):
        weight_of(producer).div_(per_row[:, None])
    else:
        weight = producer.weight
        assert isinstance(weight, Tensor)
        gain = weight + 1 if fold.offset else weight.clone()
        new = (gain / per_row - (1 if fold.offset else 0)).to(dtype).float()
        left = new + 1 if fold.offset else new
        sound = (left.abs() > 1e-3 * gain.abs().mean()) & (gain != 0)
        per_row = torch.where(sound, gain / left, per_row)
        weight.copy_(new)
    bias = getattr(producer, "bias", None)
    if isinstance(bias, Tensor):
        bias.div_(per_row)
    scales = per_row[fold.rows]
    for consumer in (*fold.consumers, *fold.floats):
        weight_of(block.get_submodule(consumer)).mul_(scales)
    return scales


def _outputs(producer: nn.Module) -> int:
    weight = producer.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[-1] if weight.dim() == 1 or is_transposed(producer) else weight.shape[0])


def _candidates(block: nn.Module, readers: _Readers, heads: Sequence[int]) -> Iterator[Fold]:
    weight = weight_of(block.get_submodule(readers.members[0]))
    k, device = weight.shape[1], weight.device
    if readers.norm is not None and _outputs(block.get_submodule(readers.norm)) == k:
        every = torch.arange(k, device=device)
        for offset in (False, True):
            yield Fold(readers.norm, readers.members, every, offset, readers.floats)
        return
    for producer in reversed(readers.earlier):
        n = weight_of(block.get_submodule(producer)).shape[0]
        for rows in _row_maps(n, k, heads):
            yield Fold(producer, readers.members, rows.to(device), False, readers.floats)


def _row_maps(n: int, k: int, heads: Sequence[int]) -> Iterator[Tensor]:
    """Ways in which the k inputs of one Linear can be among the n outputs of another."""
    if n >= k:
        yield torch.arange(n - k, n)  # all of it, or its last part (up of gate_up, v of qkv)
        if n > k:
            yield torch.arange(k)
    for size in heads:  # grouped-query attention: several query heads read one value head
        for values in (n, (n - k) // 2):  # v alone, or last in a fused q, k, v
            if 0 < values < k and k % values == 0 and values % size == 0 and k % size == 0:
                head = torch.arange(k // size) // (k // values)
                yield (n - values) + (head[:, None] * size + torch.arange(size)).reshape(-1)
    if n == 3 * k:  # q, k, v interleaved head by head
        for size in heads:
            if k % size == 0:
                head = torch.arange(k // size)
                yield (head[:, None] * 3 * size + 2 * size + torch.arange(size)).reshape(-1)


def _head_sizes(block: nn.Module) -> list[int]:
    sizes = {getattr(module, "head_dim", None) or getattr(module, "head_size", None) for module in block.modules()}
    return sorted(size for size in sizes if isinstance(size, int))


def _norm_outputs(block: nn.Module, groups: Sequence[InputGroup], probe: Probe) -> Mapping[str, str]:
    """First member of an input group, or router -> the norm whose output it reads."""
    heads = {group.members[0] for group in groups} | set(routers(block))
    known = dict(linears(block))
    outputs: list[tuple[str, Tensor]] = []
    inputs: dict[str, Tensor] = {}
    handles = []
    for path, module in block.named_modules():
        weight = getattr(module, "weight", None)
        if path in heads:
            handles.append(module.register_forward_pre_hook(_keep_input(inputs, path), with_kwargs=True))
        elif path not in known and isinstance(weight, nn.Parameter) and weight.dim() == 1:
            handles.append(module.register_forward_hook(_keep_output(outputs, path)))
    try:
        probe(block)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: path
        for name, x in inputs.items()
        for path, y in outputs
        if y.data_ptr() == x.data_ptr() and y.numel() == x.numel()
    }


def _keep_input(store: dict[str, Tensor], path: str) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        store[path] = args[0] if args else next(iter(kwargs.values()))

    return hook


def _keep_output(store: list[tuple[str, Tensor]], path: str) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: object) -> None:
        if isinstance(output, Tensor):
            store.append((path, output))

    return hook
