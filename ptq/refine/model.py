"""Refining a whole model: gradient steps that bring its predictions nearer to the parent's, within the packed format.

A block that comes near to its float block may still predict another token, and what its errors do later in the model no
block knows. Here the loss is what the result is judged by, the KL divergence of the next token's distribution. The idea
is that of the second phase of EfficientQAT (https://arxiv.org/abs/2407.11062), which tunes scales; codes and zeros are
tuned as well.

So many latents learn a little text by heart, and then come nearer to the parent there and nowhere else. So no batch is
read twice as it is: the parent also speaks (after LLM-QAT, https://arxiv.org/abs/2305.17888, where it writes all text).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ptq.errors import NumericsError
from ptq.formats.codec import QuantizedWeight
from ptq.models.structure import is_transposed
from ptq.refine.steps import descend
from ptq.refine.weight import TunedWeight

# How far a code or zero comes, in codes, when every step goes the same way, and the most it may come in the first step.
CODE_TRAVEL, CODE_RATE = 0.6, 1.2e-2
# Of so many batches one is not tuned on: by it the result is judged.
JUDGED = 8
# Of so many tokens of a batch that was read before, the parent says what stands there now.
SPOKEN = 0.6
AT_ONCE = 1 << 20  # logits whose probabilities are in memory


class Divergence(torch.autograd.Function):
    """Mean KL divergence of logits ``[..., V]`` from other logits, in nats a token, with the gradient to the former.

    Some tokens at a time, value and gradient together: probabilities of a large vocabulary would take more memory than
    all else, several times over.
    """

    @staticmethod
    def forward(ctx: Any, found: Tensor, wanted: Tensor) -> Tensor:
        """float32."""
        rows, others = found.flatten(0, -2), wanted.flatten(0, -2)
        gradient, total = torch.empty_like(rows), torch.zeros((), device=rows.device)
        count = max(1, AT_ONCE // rows.shape[-1])
        for q, p, g in zip(rows.split(count), others.split(count), gradient.split(count), strict=True):
            q, p = q.float().log_softmax(-1), p.float().log_softmax(-1)
            likely = p.exp()
            total += (p.sub_(q)).mul_(likely).sum()
            g.copy_(q.exp_().sub_(likely).div_(len(rows)))
        ctx.save_for_backward(gradient.view_as(found))
        return total / len(rows)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        """In the dtype of the logits."""
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0], None


def respoken(tokens: Tensor, logits: Tensor, generator: torch.Generator) -> Tensor:
    """A text where `SPOKEN` of the tokens are drawn from the parent's predictions for their places.

    It predicts all places from the text as it was, in the one pass that was made anyway, so what was drawn for a place
    does not know what was drawn before it.

    Args:
        tokens: int64 ``[B, T]``; the first of each row stays.
        logits: ``[B, T, V]``, at each place those of the token after it.
        generator: of the CPU, so that every device draws alike.
    """
    found, count = tokens.clone(), max(1, AT_ONCE // logits.shape[-1])
    chosen = torch.rand(tokens[:, 1:].shape, generator=generator).lt(SPOKEN).nonzero().to(tokens.device)
    for row, place in (some.unbind(-1) for some in chosen.split(count)):
        below = logits[row, place].float().softmax(-1).cumsum(-1)
        at = torch.rand((len(row), 1), generator=generator).to(below.device) * below[:, -1:]
        drawn = torch.searchsorted(below, at, right=True).squeeze(1)
        found[row, place + 1] = drawn.clamp_(max=logits.shape[-1] - 1)
    return found


class Refined(NamedTuple):
    """Weights by module, and the mean KL divergence to the parent in nats a token before and after."""

    weights: dict[str, QuantizedWeight]
    before: float
    after: float


def refine_model(
    parent: nn.Module,
    student: nn.Module,
    start: Mapping[str, QuantizedWeight],
    batches: Sequence[Tensor],
    *,
    steps: int,
    seed: int,
    scale_dtype: torch.dtype,
    from_parent: bool = True,
) -> Refined:
    """Tune the weights of a quantized model.

    Args:
        parent: the float model, called with ``input_ids`` and returning ``logits``; stays as it is.
        student: a float32 copy with everything that the quantized model holds beside the packed weights.
        start: the packed weights, by module.
        batches: token ids, int64 ``[B, T]``. One of every `JUDGED` is kept apart, and the loss is that on these; of
            fewer batches it is that on all.
        steps: gradient steps, each on one batch.
        seed: of the order of the batches, and of what the parent says.
        scale_dtype: dtype the checkpoint keeps scales in.
        from_parent: codes stand for the parent's weights as they are (not where channels were scaled).

    Returns:
        What was tuned, or, where the loss did not fall, ``start``.

    Raises:
        NumericsError: the loss is NaN or infinite before the first step.
        UnsupportedModelError: no gradient reaches the logits.
    """
    with torch.enable_grad():
        tuning = _Tuning(parent, student, start, scale_dtype, from_parent)
        judged = list(batches[JUDGED - 1 :: JUDGED]) or list(batches)
        tuned = [b for i, b in enumerate(batches) if i % JUDGED != JUDGED - 1]
        before = tuning.loss_of_all(judged)
        if not math.isfinite(before):
            raise NumericsError(
                f"predictions must be finite before refinement; the KL divergence to the parent is {before}: check the "
                "checkpoint and the calibration text, or set refine.model_steps to 0"
            )
        tuning.descend(tuned, steps, seed)
        after = tuning.loss_of_all(judged)
    if not after < before:
        return Refined(dict(start), before, before)
    return Refined({name: weight.result() for name, weight in tuning.weights.items()}, before, after)


class _Tuning:
    def __init__(
        self,
        parent: nn.Module,
        student: nn.Module,
        start: Mapping[str, QuantizedWeight],
        scale_dtype: torch.dtype,
        from_parent: bool,
    ) -> None:
        self._parent, self._student, self._scale_dtype = parent, student.requires_grad_(False), scale_dtype
        self._transposed = {name: is_transposed(student.get_submodule(name)) for name in start}
        self.weights = {
            name: TunedWeight(quantized, scale_dtype, self._float_weight(name) if from_parent else None)
            for name, quantized in start.items()
        }

    def loss_of_all(self, batches: Sequence[Tensor]) -> float:
        """Mean over the tokens, in float32."""
        with torch.no_grad():
            tokens = sum(batch.numel() for batch in batches)
            losses = [float(self._loss(batch, self._parent_on(batch))) * batch.numel() for batch in batches]
            return sum(losses) / tokens

    def descend(self, batches: Sequence[Tensor], steps: int, seed: int) -> None:
        """Gradient steps, each on one batch, of which the parent says much anew each time."""
        texts, generator = list(batches), torch.Generator().manual_seed(seed)

        def loss_of(index: int) -> Tensor:
            wanted = self._parent_on(texts[index])
            loss = self._loss(texts[index], wanted)
            texts[index] = respoken(batches[index], wanted, generator)
            return loss

        descend(
            self.weights.values(), loss_of, len(texts), steps=steps, seed=seed,
            code_rate=min(CODE_RATE, 2 * CODE_TRAVEL / steps), dtype=next(self._parent.parameters()).dtype,
            what=f"the output of {type(self._student).__name__}",
        )  # fmt: skip

    def _float_weight(self, name: str) -> Tensor:
        weight = self._student.get_submodule(name).get_parameter("weight")
        return weight.t() if self._transposed[name] else weight

    @torch.no_grad()
    def _parent_on(self, batch: Tensor) -> Tensor:
        logits: Tensor = self._parent(input_ids=batch, use_cache=False).logits
        return logits

    def _loss(self, batch: Tensor, wanted: Tensor) -> Tensor:
        call = {"input_ids": batch, "use_cache": False}
        # A head that shares its weight with the embeddings shares it no more once it is packed.
        found = functional_call(self._student, self._parameters(), kwargs=call, tie_weights=False).logits
        apply: Any = Divergence.apply  # which some releases of torch annotate, some not
        loss: Tensor = apply(found, wanted)
        return loss

    def _parameters(self) -> dict[str, Tensor]:
        """What stands in for the student's own: the values that the checkpoint would hold now."""
        dense = {name: weight.dense() for name, weight in self.weights.items()}
        return {f"{name}.weight": d.t() if self._transposed[name] else d for name, d in dense.items()}
