"""A quantized weight with a gradient: what the file will hold going forward, as if nothing were rounded going back."""

import torch
from torch import Tensor

from ptq.formats.codec import QuantizedWeight
from ptq.grid import round_scales

# How far towards its float weight a code starts: below 1, so that none is about to change at the first step.
SPREAD = 0.7


class TunedWeight:
    """Latent scales, zeros and codes that start at those of a `QuantizedWeight`.

    Every value of `dense` is one that the format can hold: scales rounded to the export dtype, whole codes and zeros
    in range. The gradient passes the rounding unchanged (the straight-through estimator) and stops at the range.

    Args:
        start: where tuning starts; `result` returns it unchanged until a latent has moved far enough.
        scale_dtype: dtype the checkpoint will keep scales in (see `ptq.grid.round_scales`).
        dense: the float ``[N, K]`` weight that the codes stand for: codes that lie nearly half way to the next one
            start nearly half way. None starts each in the middle.
    """

    def __init__(self, start: QuantizedWeight, scale_dtype: torch.dtype, dense: Tensor | None = None) -> None:
        self._start, self._scale_dtype = start, scale_dtype
        self._top = 2**start.bits - 1
        self.log_factor = torch.zeros_like(start.scales).requires_grad_()  # [N, G], of the scale
        codes = start.codes.float()
        if dense is not None:
            groups = dense.float().reshape(*start.scales.shape, start.group_size)
            exact = (groups / start.scales.unsqueeze(-1) + start.zeros.unsqueeze(-1)).reshape(codes.shape)
            codes += SPREAD * (exact - codes).clamp(-0.5, 0.5)
        self.codes = codes.requires_grad_()  # [N, K], in codes
        self.zeros = start.zeros.float().requires_grad_(not start.symmetric)  # [N, G], in codes

    def dense(self) -> Tensor:
        """The weight, float32 ``[N, K]``."""
        codes = _whole(self.codes, self._top)
        groups = codes.reshape(*self._start.scales.shape, self._start.group_size)
        centred = groups - self._whole_zeros().unsqueeze(-1)
        return (centred * self._stored_scales().unsqueeze(-1)).reshape(codes.shape)

    @torch.no_grad()
    def result(self) -> QuantizedWeight:
        """What the file will hold."""
        codes = torch.round(self.codes).clamp(0, self._top).to(torch.uint8)
        zeros = self._whole_zeros().to(torch.uint8)
        return self._start._replace(codes=codes, scales=self._stored_scales().clone(), zeros=zeros)

    def _stored_scales(self) -> Tensor:
        scales = self._start.scales * self.log_factor.exp()
        return _held_as(scales, round_scales(scales.detach(), self._scale_dtype))

    def _whole_zeros(self) -> Tensor:
        return _whole(self.zeros, self._top)


def _whole(latent: Tensor, top: int) -> Tensor:
    """Rounded to 0..top, with the gradient of ``latent`` where rounding alone leads there.

    Not by torch's clamp: at 0 and at the top its gradient is 1 up to torch 2.13, and 0 from 2.14 on.
    """
    stored = torch.round(latent.detach())
    inside = (stored >= 0) & (stored <= top)
    return stored.clamp_(0, top) + (latent - latent.detach()) * inside


def _held_as(latent: Tensor, stored: Tensor) -> Tensor:
    """Exactly ``stored``, with the gradient of ``latent``."""
    return stored + (latent - latent.detach())
