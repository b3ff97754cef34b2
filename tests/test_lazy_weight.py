"""``QuantLinear.weight`` costs nothing until its values are used; then it is the dense weight in every respect.

Its dtype is that of the layer that stood there.

Oracle: `QuantLinear.dequantize`, and what torch does with that.
"""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ptq_kernels
import pytest
import torch
from packed_weights import random_rows
from test_fuse import quant_linear
from tiny_models import build, run, save, settings
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, T5Config, T5EncoderModel

import ptq
from ptq.nn import QuantLinear
from ptq.nn.lazy import LazyWeight

ROWS = random_rows(3, 64, torch.float32)


def layer() -> QuantLinear:
    return quant_linear(48, 64, seed=0, bias=True)


def saved_and_loaded(weight: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    return torch.load(file)


USES: dict[str, Callable[[Tensor], Any]] = {
    "linear": lambda w: functional.linear(ROWS, w),
    "matmul": lambda w: ROWS @ w.T,
    "sum": lambda w: w.sum(0),
    "to": lambda w: w.to(torch.float16),
    "float": lambda w: w.float(),
    "clone": lambda w: w.detach().clone(),
    "copy": copy.deepcopy,
    "saved": saved_and_loaded,
    "data": lambda w: w.data,
    "slice": lambda w: w[3:5, 1],
    "split": lambda w: torch.cat(w.split(16)),
    "stack": lambda w: torch.stack([w, w]),
    "out": lambda w: torch.empty(48, 64).copy_(w),
    "numpy": lambda w: torch.from_numpy(w.numpy()),
    "parameter": lambda w: nn.Parameter(w, requires_grad=False),
    "dispatched": lambda w: torch.ops.aten.mm.default(ROWS, torch.ops.aten.t.default(w)),
    "vmap": lambda w: torch.func.vmap(lambda row: functional.linear(row, w))(ROWS),
    "grad": lambda w: torch.func.grad(lambda x: functional.linear(x, w).square().sum())(ROWS),
    "stride": lambda w: torch.tensor(w.stride()),
    "like": lambda w: torch.zeros_like(w),
    "like with values": lambda w: torch.full_like(w, 2.0, dtype=torch.bfloat16),
    "new": lambda w: w.new_ones(3),
}


@pytest.mark.parametrize("name", USES)
def test_values_are_those_of_the_dense_weight(name: str) -> None:
    found, wanted = USES[name](layer().weight), USES[name](layer().dequantize())
    assert isinstance(found, type(wanted))
    assert not isinstance(found, LazyWeight)
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)


def test_autograd_and_text_see_the_dense_weight() -> None:
    x = ROWS.clone().requires_grad_()
    functional.linear(x, layer().weight).sum().backward()
    torch.testing.assert_close(x.grad, layer().dequantize().sum(0).expand(3, 64))
    assert repr(layer().weight) == repr(layer().dequantize())
    assert not layer().weight.requires_grad


def test_what_is_known_without_values_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = layer().dequantize()
    monkeypatch.setattr(ptq_kernels, "dequantize", lambda *_, **__: 1 / 0)
    weight = layer().weight
    assert isinstance(weight, Tensor)
    for read in ("dtype", "device", "shape", "ndim", "itemsize", "nbytes", "is_cuda", "is_cpu", "is_meta"):
        assert getattr(weight, read) == getattr(dense, read), read
    for call in ("size", "dim", "numel", "nelement", "element_size", "is_floating_point"):
        assert getattr(weight, call)() == getattr(dense, call)(), call
    assert weight.size(1) == 64
    assert len(weight.shape) == 2


def test_values_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = [], ptq_kernels.dequantize
    monkeypatch.setattr(ptq_kernels, "dequantize", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    weight = layer().weight
    assert torch.equal(weight + weight, 2 * weight)
    assert type(weight) is Tensor
    held = layer().weight
    both = torch.ops.aten.stack.default([held, held])  # C++ holds it, so it cannot become another
    assert torch.equal(both[0], weight)
    assert isinstance(held, Tensor)
    assert torch.equal(held, weight)
    assert len(calls) == 2


def test_a_model_that_reads_dtypes_dequantizes_nothing_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """T5 asks each feed-forward layer for its weight's dtype, three times a pass."""
    model = T5EncoderModel(T5Config(vocab_size=32, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)).eval()
    ptq.quantize_linears(model, [], method="rtn", bits=4, group_size=32)
    ids = torch.arange(8)[None]
    expected = model(ids).last_hidden_state
    monkeypatch.setattr(ptq_kernels, "dequantize", lambda *_, **__: 1 / 0)
    assert torch.equal(model(ids).last_hidden_state, expected)


CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda module: module,
    "bfloat16": lambda module: module.bfloat16(),
    "half": lambda module: module.half(),
    "to": lambda module: module.half().to(torch.float32),
    "integers": lambda module: copy.deepcopy(module).to("cpu"),
    "type": lambda module: module.type(torch.float64),
    "meta": lambda module: module.to("meta"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_that_of_the_layer_that_stood_there(dtype: torch.dtype, bias: bool, change: str) -> None:
    dense = nn.Sequential(nn.Linear(64, 48, bias=bias, dtype=dtype))
    packed = copy.deepcopy(dense)
    ptq.quantize_linears(packed, [], method="rtn", bits=4, group_size=32)
    dense, packed = CHANGES[change](dense), CHANGES[change](packed)
    assert packed[0].weight.dtype == dense[0].weight.dtype == packed[0].weight_dtype
    assert copy.deepcopy(packed)[0].weight_dtype == dense[0].weight.dtype


def test_rows_that_a_model_converts_to_it_do_not_overflow() -> None:
    """T5's activations reach beyond float16, in which scales are exact."""
    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)).eval()
    ids = torch.arange(9)[None]
    with torch.no_grad():
        model.encoder.block[0].layer[-1].DenseReluDense.wi.weight.mul_(2e5)
        expected = model(ids).last_hidden_state
    ptq.quantize_linears(model, [], method="rtn", bits=8, group_size=-1)
    found = model(ids).last_hidden_state.detach()
    assert float((found - expected).norm() / expected.norm()) < 0.02  # 8 bits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("options", [{}, {"fuse": True, "head_bits": 4}], ids=["plain", "fused"])
def test_loaded_layers_have_the_dtype_of_the_model(dtype: str, options: dict[str, Any], tmp_path: Path) -> None:
    run(settings(save(build("llama"), tmp_path / "parent"), tmp_path / "out", "rtn"))
    model = ptq.load(tmp_path / "out", dtype=dtype, **options)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert layers
    assert {layer.weight.dtype for layer in layers} == {getattr(torch, dtype)}
    if not options:
        own = ptq.PtqConfig()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype, quantization_config=own)
        layers = [module for module in loaded.modules() if isinstance(module, QuantLinear)]
        assert {layer.weight.dtype for layer in layers} == {getattr(torch, dtype)}


def test_it_is_the_weight_of_the_moment_it_was_read() -> None:
    """Also where the layer goes elsewhere, or gets other tensors, before a value is used."""
    packed, other = layer(), quant_linear(48, 64, seed=1, bias=True)
    wanted, moved = packed.dequantize(), packed.weight
    given = torch.func.functional_call(Reads(packed), {f"inner.{k}": v for k, v in other.state_dict().items()}, ())
    assert torch.equal(given, other.dequantize())
    packed.to("meta")
    assert torch.equal(moved, wanted)


class Reads(nn.Module):
    def __init__(self, inner: QuantLinear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self) -> Tensor:
        return self.inner.weight


def test_a_layer_pickled_by_an_earlier_version_has_a_dtype() -> None:
    packed = layer().bfloat16()
    del packed.__dict__["weight_dtype"]
    packed = copy.deepcopy(packed)  # by __setstate__, as pickle does
    assert packed.weight.dtype == torch.bfloat16
    assert packed.half().weight.dtype == torch.float16


def test_a_bias_that_is_assigned_brings_its_dtype() -> None:
    packed = layer()
    state = packed.state_dict()
    packed.load_state_dict({**state, "bias": state["bias"].bfloat16()})
    assert packed.weight.dtype == packed.bias.dtype == torch.float32
    packed.load_state_dict({**state, "bias": state["bias"].bfloat16()}, assign=True)
    assert packed.weight.dtype == packed.bias.dtype == torch.bfloat16
