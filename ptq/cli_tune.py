"""``ptq tune``: times the configurations of the GPU kernels for the shapes of one checkpoint."""

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ptq.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

Kinds = dict[tuple[int, int], set[tuple[int, int]]]  # (N, K) by bits and group size


def tune_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments."""
    parser.add_argument("checkpoint", help="quantized model directory or hub name")
    parser.add_argument("--head-bits", type=int, choices=(4, 8), help="the output head too, as ptq.load packs it")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    parser.set_defaults(action=_tune)


def _tune(options: argparse.Namespace) -> int:
    """Tune, and print what was found."""
    import torch
    from ptq_kernels.triton.tune import NothingToTuneError, tune_device

    from ptq.models.structure import output_head
    from ptq.nn.head import GROUPS, check_head
    from ptq.runtime import open_checkpoint

    if not torch.cuda.is_available():
        raise ConfigError(
            "tune times the kernels on a CUDA GPU, this machine has none; on a CPU there is nothing to tune"
        )
    opened = open_checkpoint(options.checkpoint, trust_remote_code=options.trust_remote_code)
    kinds = shapes_of(opened.model)
    if not kinds:
        raise ConfigError(
            f"tune needs a packed checkpoint, {options.checkpoint} holds no packed Linear; quantize it first"
        )
    head = output_head(opened.model)
    if options.head_bits:
        check_head(head, options.head_bits)
        assert isinstance(head, torch.nn.Linear)
        group = next((size for size in GROUPS if head.in_features % size == 0), head.in_features)
        kinds.setdefault((options.head_bits, group), set()).add((head.out_features, head.in_features))
    for (bits, group_size), shapes in kinds.items():
        try:
            found = tune_device(sorted(shapes), device="cuda", bits=bits, group_size=group_size, dtype=opened.dtype)
        except NothingToTuneError as error:  # the kernel for such weights has nothing to choose
            print(f"{bits} bits, groups of {group_size}: {error}")
            continue
        for problem, (plan, microseconds) in found.items():
            early = ", begins early" if plan.early else ""
            print(
                f"{problem.n} x {problem.k}, {bits} bits, groups of {group_size}, up to {problem.rows} rows: "
                f"tile {plan.tile.name}, {plan.splits} splits{early}, {microseconds:.1f} us"
            )
    return 0


def shapes_of(model: "nn.Module") -> Kinds:
    """Of every packed Linear, and of those that ``ptq.load(fuse=True)`` makes one product of."""
    from ptq.formats.codec import FUSED_LINEARS
    from ptq.nn.linear import QuantLinear

    kinds: Kinds = {}

    def add(linears: Iterable[QuantLinear]) -> None:
        found = list(linears)
        first = found[0]
        shape = (sum(linear.out_features for linear in found), first.in_features)
        kinds.setdefault((first.bits, first.group_size), set()).add(shape)

    for parent in model.modules():
        children = {name: child for name, child in parent.named_children() if isinstance(child, QuantLinear)}
        for child in children.values():
            add([child])
        for members in FUSED_LINEARS.values():
            together = [children[name] for name in members if name in children]
            if len(together) == len(members) and len({(m.bits, m.group_size, m.in_features) for m in together}) == 1:
                add(together)
    return kinds
