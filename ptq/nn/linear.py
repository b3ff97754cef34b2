"""A linear layer that keeps its weight packed."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypedDict

import ptq_kernels
import torch
from torch import Tensor, nn

from ptq.errors import FormatError
from ptq.formats.codec import QuantizedWeight, Scheme
from ptq.nn.checks import check_quantized, check_state, inexact
from ptq.nn.lazy import LazyWeight

_SAME_WIDTH_INT = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


class _Sizes(TypedDict):
    """What `ptq_kernels` must be told of the tensors of a weight."""

    bits: int
    group_size: int
    in_features: int


class QuantLinear(nn.Module):
    """``y = x @ dequantize(qweight, scales, zeros).T + bias`` through `ptq_kernels.matmul`.

    Buffers: ``qweight`` int32 ``[N, ceil(K * bits / 32)]`` (a dense little-endian bit stream of codes along K),
    ``scales`` ``[N, G]``, ``zeros`` uint8 ``[N, G]`` or None when symmetric. ``bias`` is a parameter ``[N]`` or None.
    ``perm`` int32 ``[K]`` or None: of a weight whose groups were not contiguous (act-order), the columns are sorted by
    group, and column j is for ``x[..., perm[j]]``.
    After `prepare_` the packed weight lies in a faster layout; a state dict always holds the canonical tensors above.
    Loading one, or a move to another device, prepares such a layer anew; after a move it stays canonical where `impl`
    or `activation` was chosen, which the new device may not have.

    The faster layout holds copies of scales and zeros. All of these buffers are constants: to change one, load a state
    dict, or call the layer with all of one through ``torch.func.functional_call``. Scales or zeros that are changed in
    place, or replaced without ``qweight``, reach what is dequantized, but not the product of a prepared layer.

    A change of dtype (``.to(torch.bfloat16)``, ``.half()``) converts the bias only: a float16 scale is not exact in
    bfloat16. The result of a forward pass has the dtype of its input, or of autocast. ``weight_dtype`` is what
    ``weight`` has, for models that convert their rows to it: the dtype of the layer that stood here, after the same
    changes of dtype.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        tensors: tuple[Tensor, Tensor, Tensor | None],
        scheme: Scheme,
        bias: Tensor | None,
        in_features: int,
        perm: Tensor | None = None,
    ) -> None:
        """Hold canonical ``(qweight, scales, zeros)``; use `from_quantized` or `empty` instead."""
        super().__init__()
        qweight, scales, zeros = tensors
        self.in_features, self.out_features = in_features, scales.shape[0]
        self.bits, self.group_size, self.symmetric = scheme.bits, scheme.columns(in_features), scheme.symmetric
        self.impl = "auto"
        self.activation: str | None = None  # "int8": see ptq_kernels.matmul
        self.weight_dtype = scales.dtype if bias is None else bias.dtype
        self.layout = "canonical"
        self._prepare_when_loaded = False  # it was prepared before it went to meta
        self.register_buffer("qweight", qweight)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.register_buffer("perm", perm)
        parameter = None if bias is None else nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
        self.register_parameter("bias", parameter)

    @classmethod
    def from_quantized(
        cls,
        quantized: QuantizedWeight,
        bias: Tensor | None = None,
        scales_dtype: torch.dtype = torch.float32,
        g_idx: Tensor | None = None,
    ) -> "QuantLinear":
        """Pack the codes of `quantized`.

        The bias ``[N]`` becomes a parameter of the same dtype that requires a gradient only if the given one does.
        g_idx: int32 or int64 ``[K]``, of GPTQ files with act-order: column k of the codes has the scale and the zero of
        group ``g_idx[k]``, not of ``k // group_size``. The columns are sorted by group here, once; x is gathered in
        every forward pass. Where g_idx is ``k // group_size`` there is nothing to gather, and `perm` is None.

        Raises FormatError for tensors that do not fit bits, group size and each other, a scale that is not finite or
        not exact in `scales_dtype`, zeros that are no code (of a symmetric weight: other than the midpoint), or a g_idx
        that does not put ``group_size`` columns in every group.
        """
        check_quantized(quantized)
        scales = quantized.scales.detach().to(scales_dtype)
        if count := inexact(quantized.scales, scales_dtype):
            raise FormatError(
                f"every scale must be exact in {scales_dtype}, {count} of {scales.numel()} are not; keep them in "
                "float32 or quantize with scales of that dtype"
            )
        zeros = None if quantized.symmetric else quantized.zeros
        scheme = Scheme(quantized.bits, quantized.group_size, quantized.symmetric)
        codes, perm = quantized.codes, None
        if g_idx is not None:
            perm = _group_order(g_idx.to(codes.device), quantized)
            codes = codes if perm is None else codes.index_select(1, perm)
        tensors = (ptq_kernels.pack(codes, quantized.bits), scales, zeros)
        return cls(tensors, scheme, bias, codes.shape[1], perm)

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str = "meta",
        scales_dtype: torch.dtype = torch.float32,
        permuted: bool = False,
    ) -> "QuantLinear":
        """A layer of the right shapes with arbitrary contents, to be filled from a state dict.

        dtype: of the bias and of `weight`.

        permuted: the state dict has `perm`. Raises FormatError for less than one input or output, or if the group size
        does not divide `in_features`.
        """
        if min(in_features, out_features) < 1:
            raise FormatError(
                f"a packed layer must have inputs and outputs, found {in_features} and {out_features}; leave it dense"
            )
        columns = scheme.columns(in_features)
        if in_features % columns:
            raise FormatError(
                f"group_size must divide in_features = {in_features}, found {columns}; use a divisor, or -1"
            )
        groups = in_features // columns
        qweight = torch.empty(out_features, -(-in_features * scheme.bits // 32), dtype=torch.int32, device=device)
        scales = torch.empty(out_features, groups, dtype=scales_dtype, device=device)
        zeros = None if scheme.symmetric else torch.empty(out_features, groups, dtype=torch.uint8, device=device)
        values = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        perm = torch.arange(in_features, dtype=torch.int32, device=device) if permuted else None
        layer = cls((qweight, scales, zeros), scheme, values, in_features, perm)
        layer.weight_dtype = dtype
        return layer

    @classmethod
    def stacked(cls, linears: Sequence["QuantLinear"]) -> "QuantLinear":
        """One canonical layer with the outputs of all `linears`, which agree in scheme, input, perm, dtype, device."""
        first = linears[0]
        qweight = torch.cat([linear._canonical_qweight() for linear in linears])
        scales = torch.cat([linear.scales for linear in linears])
        zeros = [linear.zeros for linear in linears if linear.zeros is not None]
        biases = [linear.bias for linear in linears if linear.bias is not None]
        bias = torch.cat([each.detach() for each in biases]) if biases else None
        scheme = Scheme(first.bits, first.group_size, first.symmetric)
        tensors = (qweight, scales, torch.cat(zeros) if zeros else None)
        layer = cls(tensors, scheme, bias, first.in_features, first.perm)
        layer.weight_dtype = first.weight_dtype
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """``[..., K]`` bfloat16, float16 or float32 to ``[..., N]`` in the same dtype; accumulation in float32.

        Under ``torch.autocast`` the input is converted to its dtype first, as torch's own layers do.
        """
        # The first question is the cheaper one, and mostly answered with no.
        if torch._C._is_any_autocast_enabled():
            input = _autocast(input)
        bias = self._parameters["bias"]
        # A module's attributes that are tensors are found by a slow detour, which a decoding step takes 400 times.
        held: dict[str, Any] = self._buffers
        qweight = held["qweight"]
        return ptq_kernels.matmul(
            input,
            qweight,
            held["scales"],
            held["zeros"],
            bias if bias is None or bias.dtype is input.dtype else bias.to(input.dtype),
            bits=self.bits,
            group_size=self.group_size,
            # Words are canonical: those of a state dict, which stand here while functional_call runs the layer.
            layout="canonical" if qweight.dtype is torch.int32 else self.layout,
            impl=self.impl,
            perm=held["perm"],
            activation=self.activation,
        )

    def prepare_(self) -> "QuantLinear":
        """Lay the packed weight out as the implementation for its device wants it; does nothing the second time."""
        if self.layout == "canonical":
            prepared = ptq_kernels.prepare(*self._tensors, **self._sizes, impl=self.impl, activation=self.activation)
            self.qweight, self.layout = prepared.qweight, prepared.layout
        return self

    def warmup(self, dtype: torch.dtype) -> None:
        """Make ready what forward passes with rows of `dtype` need (see `ptq_kernels.warmup`); after `prepare_`."""
        ptq_kernels.warmup(
            *self._tensors, **self._sizes, layout=self.layout, dtype=dtype, has_bias=self.bias is not None,
            impl=self.impl, perm=self.perm,
        )  # fmt: skip

    def quantized(self) -> QuantizedWeight:
        """The codes, scales (float32) and zeros this layer was made from, exactly; columns lie as `perm` says."""
        zeros = self.zeros
        if zeros is None:
            zeros = torch.full(self.scales.shape, 2 ** (self.bits - 1), dtype=torch.uint8, device=self.scales.device)
        codes = ptq_kernels.unpack(self._canonical_qweight(), self.bits, self.in_features)
        return QuantizedWeight(codes, self.scales.float(), zeros, self.bits, self.group_size, self.symmetric)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense ``[N, K]`` weight, rounded once from float32 to `dtype` (default: the dtype of the scales)."""
        return self._dequantizer(dtype or self.scales.dtype)()

    def _dequantizer(self, dtype: torch.dtype) -> Callable[[], Tensor]:
        """Of the tensors that are here now, wherever the layer goes and whatever stands in it later."""
        return partial(
            ptq_kernels.dequantize, *self._tensors, **self._sizes, dtype=dtype, layout=self.layout, perm=self.perm
        )

    @property
    def weight(self) -> Tensor:
        """The dense weight, dequantized anew after every read, once anything but its dtype, device or shape is used.

        It is neither a parameter nor a buffer, so state dicts, moves and optimizers do not see it, and it cannot be
        assigned. torch asks nobody in ``other.data = layer.weight``, which leaves ``other`` without values: write
        ``layer.dequantize()`` there.
        """
        dequantized = self._dequantizer(self.weight_dtype)
        if torch.compiler.is_compiling():  # it drops what nothing uses
            return dequantized()
        shape = (self.out_features, self.in_features)
        found: Tensor = LazyWeight(shape, self.weight_dtype, self.scales.device, dequantized)
        return found

    @weight.setter
    def weight(self, value: object) -> None:
        raise _stays_packed(value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As torch has it, which assigns parameters by it. Raises AttributeError for "weight", which is computed."""
        if name == "weight":
            raise _stays_packed(param)
        super().register_parameter(name, param)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, symmetric={self.symmetric}, bias={self.bias is not None}, "
            f"layout={self.layout}" + (", permuted" if self.perm is not None else "")
        )

    def _canonical_qweight(self) -> Tensor:
        return ptq_kernels.canonical(*self._tensors, **self._sizes, layout=self.layout)

    @property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.qweight, self.scales, self.zeros

    @property
    def _sizes(self) -> _Sizes:
        return {"bits": self.bits, "group_size": self.group_size, "in_features": self.in_features}

    def _canonicalize_(self) -> None:
        self.qweight, self.layout = self._canonical_qweight(), "canonical"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
        """Every move and conversion of a module passes here: `fn` may move codes and scales but not convert them."""

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)  # ``module.type(dtype)`` converts integers as well
            return new if tensor.is_floating_point() or new.dtype == tensor.dtype else tensor.to(new.device)

        device = self.qweight.device
        moves = self.layout != "canonical" and fn(torch.empty(0, dtype=torch.uint8, device=device)).device != device
        converted = fn(torch.empty(0, dtype=self.weight_dtype, device=device)).dtype
        if moves:
            self._canonicalize_()  # another device may not read, or even invert, this layout
        dtype = self.scales.dtype
        self.scales = self.scales.view(_SAME_WIDTH_INT[dtype])  # conversions of a module leave integers alone
        try:
            super()._apply(moved, recurse)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        finally:  # a move may fail for want of a device or of memory on it
            self.scales = self.scales.view(dtype)
        if converted.is_floating_point:
            self.weight_dtype = converted
        if moves and self.impl == "auto" and self.activation is None:
            if self.qweight.is_meta:
                self._prepare_when_loaded = True
            else:
                self.prepare_()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a pickle, which may be of a version without these."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self.__dict__.setdefault("weight_dtype", self.scales.dtype if self.bias is None else self.bias.dtype)
        self.__dict__.setdefault("_prepare_when_loaded", False)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout != "canonical":
            destination[prefix + "qweight"] = self._canonical_qweight()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        check_state(state_dict, prefix, self.scales.dtype)
        # A state dict of an adapter has nothing for this layer, and leaves it as it is.
        held = any(name.startswith(prefix) for name in state_dict)
        prepared = held and (self.layout != "canonical" or self._prepare_when_loaded)
        if prepared:
            self._canonicalize_()
        before = None if self.bias is None else self.bias.dtype
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if self.bias is not None and self.bias.dtype != before:  # assigned, not copied
            self.weight_dtype = self.bias.dtype
        if prepared and not self.qweight.is_meta:
            self.prepare_()
            self._prepare_when_loaded = False


def _autocast(input: Tensor) -> Tensor:
    """In the dtype of autocast, where it is on for that device and takes such a tensor."""
    device = input.device.type  # of meta, autocast may not be asked
    takes = input.is_floating_point() and input.dtype != torch.float64 and device != "meta"
    if not (takes and torch.is_autocast_enabled(device)):
        return input
    return input.to(torch.get_autocast_dtype(device))


def _group_order(g_idx: Tensor, quantized: QuantizedWeight) -> Tensor | None:
    columns = quantized.codes.shape[1]
    try:
        perm = ptq_kernels.group_order(g_idx, quantized.group_size, columns)
    except (TypeError, ValueError) as error:
        raise FormatError(str(error)) from error
    return None if torch.equal(perm, torch.arange(columns, dtype=perm.dtype, device=perm.device)) else perm


def _stays_packed(value: object) -> AttributeError:
    return AttributeError(
        f"the weight of a QuantLinear must stay packed, found a {type(value).__name__} for it; load a state dict, or "
        "put an nn.Linear in the layer's place"
    )
