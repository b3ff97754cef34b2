"""The gradient steps of refinement, whatever the loss is of."""

from collections.abc import Callable, Collection, Iterator
from itertools import islice

import torch
from ptq_kernels.cpu import library
from torch import Tensor

from ptq.errors import UnsupportedModelError
from ptq.refine.weight import TunedWeight

# First steps of Adam: of the logarithm of a scale; that of codes and zeros is the caller's.
SCALE_RATE = 3e-3
BETAS = (0.9, 0.95)


def descend(
    weights: Collection[TunedWeight],
    loss_of: Callable[[int], Tensor],
    batches: int,
    *,
    steps: int,
    code_rate: float,
    seed: int,
    dtype: torch.dtype,
    what: str,
) -> None:
    """Adam, each step on one batch, at rates that fall linearly to zero.

    Args:
        weights: tuned in place.
        loss_of: the loss on one batch, by its number.
        batches: how many there are; each is seen once before one is seen again.
        steps: how many.
        code_rate: first step of codes and zeros, in codes.
        seed: of the order of the batches.
        dtype: products are in bfloat16 where this is, and the device multiplies it faster than float32.
        what: the loss is of, for the message.

    Raises:
        UnsupportedModelError: no gradient reaches the loss.
    """
    groups = [
        {"params": [w.log_factor for w in weights], "lr": SCALE_RATE},
        {"params": [w.codes for w in weights], "lr": code_rate},
        {"params": [w.zeros for w in weights if w.zeros.requires_grad], "lr": code_rate},
    ]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]], betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    device = next(iter(weights)).log_factor.device
    bfloat16 = dtype == torch.bfloat16 and _is_fast(device)
    for batch in islice(_shuffled(batches, seed), steps):
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            loss = loss_of(batch)
        if not loss.requires_grad:
            raise UnsupportedModelError(
                f"refine needs gradients; {what} has none with respect to its Linears (a forward under no_grad?): "
                "set refine.steps and refine.model_steps to 0"
            )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def _shuffled(count: int, seed: int) -> Iterator[int]:
    """Every batch once, in random order, then again in another."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _is_fast(device: torch.device) -> bool:
    """Whether bfloat16 is worth it there; older processors do it in several steps of float32."""
    return device.type != "cpu" or library.refuse("avx512bf16") is None
