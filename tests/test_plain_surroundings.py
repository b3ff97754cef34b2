"""Plain PyTorch modules: weights that cannot be quantized, and settings of torch that must not reach the solver."""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from ptq_kernels.cpu import aten_int4, library
from test_fuse import quant_linear
from test_plain import MLP, K, inputs, output_error, seeded
from torch import Tensor, nn

import ptq
from ptq.block import quantize_block
from ptq.config import RunConfig
from ptq.errors import ConfigError, NumericsError
from ptq.formats.codec import Scheme
from ptq.nn import QuantLinear
from ptq.schema import build
from ptq.task import BlockTask

WEIGHTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "complex": (lambda: nn.Linear(64, 32, dtype=torch.complex64), "of dtype torch.complex64"),
    "double": (lambda: nn.Linear(64, 32, dtype=torch.float64), "of dtype torch.float64"),
    "meta": (lambda: nn.Linear(64, 32, device="meta"), "on the meta device"),
    "no columns": (lambda: nn.Linear(0, 32), r"shape \(32, 0\)"),
    "no rows": (lambda: nn.Linear(64, 0), r"shape \(0, 64\)"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_cannot_be_quantized_are_refused(case: str) -> None:
    make, message = WEIGHTS[case]
    module = nn.Sequential(nn.Linear(64, 64), make())
    with pytest.raises(ConfigError, match=f"weight of a Linear must be float32.*that of 1 is .*{message}.*exclude"):
        ptq.quantize_linears(module, method="rtn", group_size=32)
    assert not any(isinstance(child, QuantLinear) for child in module)


@pytest.mark.parametrize("batches", ["abc", {"input": torch.zeros(1, 64)}])
def test_one_batch_is_not_an_iterable_of_batches(batches: Any) -> None:
    with pytest.raises(ConfigError, match="must be an iterable of batches, .* found one .*: put it into a list"):
        ptq.quantize_linears(nn.Sequential(nn.Linear(64, 64)), batches, group_size=32)


def quantized(method: str, prepare: Callable[[nn.Module], object] = lambda module: None) -> Tensor:
    """What comes out for a fixed module and fixed batches."""
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32)).float()
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) / 8
    batches = [torch.randn(32, 64, generator=generator, dtype=torch.float32) for _ in range(3)]
    prepare(module)
    ptq.quantize_linears(module, batches, method=method, group_size=32)
    assert module(batches[0]).shape == (32, 32)
    return torch.cat([layer.dequantize(torch.float32).flatten() for layer in (module[0], module[2])])


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_compiled_module_is_calibrated_uncompiled(method: str) -> None:
    def compiled(module: nn.Module) -> None:
        module.compile(backend="aot_eager", fullgraph=True)

    assert torch.equal(quantized(method, compiled), quantized(method))


@pytest.fixture(params=["compiled", "torch"])
def libraries(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """With the C++ libraries that there are, and as where none was built."""
    if request.param == "torch":
        monkeypatch.setattr(library, "_DIRECTORY", tmp_path)
    library.forget()
    yield
    monkeypatch.undo()
    library.forget()


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
def test_neither_autocast_nor_a_default_dtype_changes_the_result(method: str) -> None:
    want = quantized(method)
    aten_int4.placement.cache_clear()  # found out anew, under the default dtype of that moment
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantized(method), want)
    before = torch.get_default_dtype()
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(quantized(method), want)
        finally:
            torch.set_default_dtype(before)


@pytest.mark.parametrize("columns", [64, 33])  # laid out for the kernels, and canonical
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_converts_rows_and_nothing_inside(dtype: torch.dtype, columns: int) -> None:
    """Products are those of rows in its dtype, whatever the layout; the gradient as well, in the input's own dtype."""
    torch._dynamo.reset()  # each case compiles anew, and a limit counts them all
    layer = nn.Sequential(nn.Linear(columns, 48))
    ptq.quantize_linears(layer, method="rtn", group_size=-1)
    other = copy.deepcopy(layer)
    other[0]._canonicalize_()
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    for module in (layer, other, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        v = torch.ones(5, 48, dtype=torch.bfloat16)
        want = torch.autograd.functional.vjp(lambda x, module=module: module(x.bfloat16()), x, v)
        with torch.autocast("cpu", torch.bfloat16):
            found = torch.autograd.functional.vjp(module, x, v)
        assert found[0].dtype == torch.bfloat16
        assert found[1].dtype == dtype
        assert all(torch.equal(a, b) for a, b in zip(want, found, strict=True))
        assert module(x).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_autocast_leaves_what_torch_leaves(dtype: torch.dtype) -> None:
    layer = quant_linear(48, 64, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(2, 64)).dtype == torch.bfloat16
        with pytest.raises(TypeError, match=str(dtype)):
            layer(torch.ones(2, 64, dtype=dtype))
        assert copy.deepcopy(layer).to("meta")(torch.ones(2, 64, device="meta")).dtype == torch.float32


def test_threads_that_quantize_do_not_change_each_others_products() -> None:
    """torch has one setting for all threads; bfloat16 inputs use bfloat16 units, which must not reach a float32 solver.

    Oracle: the same alone; and the setting of before afterwards.
    """

    def solve(dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        module = nn.Linear(256, 128, dtype=dtype)
        module.weight.data = torch.randn(128, 256, generator=generator).to(dtype)
        rows = torch.randn(512, 256, generator=generator).to(dtype)
        whole = nn.Sequential(module)
        ptq.quantize_linears(whole, [rows], method="gptq", group_size=64)
        return whole.state_dict()

    dtypes = [torch.float32, torch.bfloat16] * 4
    wanted = {dtype: solve(dtype) for dtype in dtypes[:2]}
    torch.set_float32_matmul_precision("high")
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(solve, dtypes))
        assert (torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision) == before
        torch._dynamo.reset()
        compiled: list[torch.fx.GraphModule] = []  # as ever, though nothing is while a thread quantizes
        torch.compile(lambda x: x + 1, backend=lambda graph, _: compiled.append(graph) or graph)(torch.ones(2))
        assert compiled
    finally:
        torch.set_float32_matmul_precision("highest")
    for dtype, state in zip(dtypes, found, strict=True):
        assert torch.equal(state["0.qweight"], wanted[dtype]["0.qweight"])


def test_a_transformer_layer_of_torch():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(K, 4, 64, batch_first=True)
    reference = copy.deepcopy(layer).eval()
    x = oracles.correlated_inputs(80, K).float().reshape(4, 20, K)
    losses = ptq.quantize_linears(layer, [x], group_size=16, exclude=["self_attn.out_proj"])
    assert list(losses) == ["linear1", "linear2"]
    assert layer.training
    assert output_error(layer.eval(), reference, x) < 0.01


def norm_and_mlp() -> nn.Sequential:
    torch.manual_seed(0)
    parts = {"norm": nn.LayerNorm(32), "up": nn.Linear(32, 64), "relu": nn.ReLU(), "down": nn.Linear(64, 32)}
    return nn.Sequential(OrderedDict(parts))


def rows() -> Tensor:
    return torch.randn(40, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (float("nan"), "the weight of down must be finite; 1 of 2048 values"),
        (-1e30, r"at most 8.35e\+06 in magnitude for a scale of 8-bit codes .*; down has one of 1e\+30"),
    ],
)
def test_weights_without_codes_are_found_before_anything_changes(method, number, message):
    module = norm_and_mlp()
    module.down.weight.data[1, 1] = number
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(NumericsError, match=message):
        ptq.quantize_linears(module, [rows()], method=method, bits=8, group_size=16)
    for key, value in module.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[key].nan_to_num())


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_raised_to_the_smallest_are_on_record(method, symmetric):
    """The largest magnitude of a group is below 7.5 times (symmetric) or 15 times (not) the smallest scale."""
    module = norm_and_mlp()
    module.down.weight.data[:3, 16:32] = 0.0  # 3 groups of nothing: nothing is lost there
    module.down.weight.data[3:10, 16:32] *= 1e-5
    found = ptq.quantize_linears(module, [rows()], method=method, group_size=16, symmetric=symmetric)
    assert found["down"]["rescues"] == ["scales of 7 of 128 groups raised to 2**-17"]
    assert not found["up"].get("rescues")
    module = norm_and_mlp()
    module.down.weight.data *= 1e-5
    with pytest.raises(NumericsError, match="strict: .* down would have the scales of 128 of 128 groups raised"):
        quantize_block(module, [lambda: module(rows())], strict_task(method, symmetric))


def strict_task(method, symmetric):
    config = build(RunConfig, {"model": "m", "output": "o", "method": method, "group_size": 16, "strict": True})
    return BlockTask("", {"down": Scheme(4, 16, symmetric)}, config, torch.float32)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_default_dtype_changes_nothing(method):
    """Scripts set it for the models that they make."""
    results = []
    for default in (torch.float32, torch.bfloat16):
        module, given = seeded(MLP), inputs()
        torch.set_default_dtype(default)
        try:
            ptq.quantize_linears(module, given, method=method, group_size=16)
        finally:
            torch.set_default_dtype(torch.float32)
        results.append(module.state_dict())
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_an_empty_first_batch_says_nothing():
    results = []
    for first in ([], [torch.randn(0, K)]):
        module = seeded(MLP)
        ptq.quantize_linears(module, [*first, *inputs()], method="awq", group_size=16)
        results.append(module.state_dict())
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def mapped(path: Path, mode: str) -> Tensor:
    np.random.default_rng(0).standard_normal((16, 32), dtype=np.float32).tofile(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "not writable"
        return torch.from_numpy(np.memmap(path, np.float32, mode, shape=(16, 32)))


SHARED: dict[str, Callable[[Path], Tensor]] = {
    "a part": lambda _: torch.randn(3, 16, 32)[1],
    "expanded": lambda _: torch.randn(16, 1).expand(16, 32),
    "between processes": lambda _: torch.randn(16, 32).share_memory_(),
    "an array's": lambda _: torch.from_numpy(np.random.default_rng(0).standard_normal((16, 32), dtype=np.float32)),
    "a file's": lambda path: mapped(path / "weight", "r+"),
    "a read-only file's": lambda path: mapped(path / "weight", "r"),
}


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
@pytest.mark.parametrize("case", SHARED)
def test_memory_that_is_not_the_parameters_own_is_left_as_it_is(case: str, method: str, tmp_path: Path) -> None:
    """Oracle: the same module with weights of its own."""
    torch.manual_seed(0)
    memory = SHARED[case](tmp_path)
    before, module = memory.clone(), nn.Sequential(nn.Linear(32, 16, bias=False), nn.Linear(16, 16))
    module[0].weight = nn.Parameter(memory, requires_grad=False)
    own = copy.deepcopy(module)
    own[0].weight = nn.Parameter(before.clone(), requires_grad=False)
    ptq.quantize_linears(own, [torch.randn(40, 32, generator=torch.Generator().manual_seed(1))], method=method,
                         bits=2, group_size=16)  # fmt: skip
    ptq.quantize_linears(module, [torch.randn(40, 32, generator=torch.Generator().manual_seed(1))], method=method,
                         bits=2, group_size=16)  # fmt: skip
    assert torch.equal(memory, before)
    assert torch.equal(module[0].dequantize(), own[0].dequantize())


def test_parameters_of_one_memory() -> None:
    """As an embedding and a head that were tied by their data: two parameters, of which one is quantized."""
    torch.manual_seed(0)
    module = nn.ModuleDict({"embed": nn.Embedding(16, 32), "head": nn.Linear(32, 16, bias=False)})
    module["head"].weight.data = module["embed"].weight.data
    before = module["embed"].weight.detach().clone()
    ptq.quantize_linears(module, (), method="rtn", bits=2, group_size=16)
    assert torch.equal(module["embed"].weight, before)


class Wrapped(Tensor):
    """A tensor without memory of its own, as quantized and distributed ones are."""

    @staticmethod
    def __new__(cls) -> "Wrapped":
        return Tensor._make_wrapper_subclass(cls, (4, 4))  # type: ignore[attr-defined,no-any-return]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls()

    def __deepcopy__(self, memo: Any) -> "Wrapped":
        return self


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
def test_what_is_not_written_into_stays_where_it_is(method: str) -> None:
    """Parameters beside the quantized ones, whatever they are: shared, tied by data, parts of one memory."""
    torch.manual_seed(0)
    flat = torch.randn(2, 16, 32)

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 16), nn.Linear(16, 16)
            self.embed = nn.Embedding(16, 32).share_memory()
            self.table = nn.Parameter(flat[0])
            self.lazy = nn.LazyConv2d(3, 1) if method != "awq" else None  # AWQ copies all parameters
            self.register_buffer("wrapped", Wrapped())

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))  # type: ignore[no-any-return]

    module = Beside()
    places = [module.embed.weight.data_ptr(), module.table.data_ptr()]
    ptq.quantize_linears(module, [torch.randn(40, 32)], method=method, bits=4, group_size=16)
    assert [module.embed.weight.data_ptr(), module.table.data_ptr()] == places
    assert module.embed.weight.is_shared()


def test_an_excluded_layer_stays_tied_by_its_data() -> None:
    module = nn.ModuleDict({"embed": nn.Embedding(16, 32), "head": nn.Linear(32, 16), "other": nn.Linear(32, 32)})
    module["head"].weight.data = module["embed"].weight.data
    ptq.quantize_linears(module, (), method="rtn", group_size=16, exclude=["head"])
    assert module["head"].weight.data_ptr() == module["embed"].weight.data_ptr()


@pytest.mark.parametrize("kind", ["attribute", "buffer"])
def test_a_bias_that_is_a_tensor_but_no_parameter(kind: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 16)
    bias = layer.bias.detach().clone()
    del layer.bias
    if kind == "buffer":
        layer.register_buffer("bias", bias)
    else:
        layer.bias = bias
    module = nn.Sequential(layer)
    ptq.quantize_linears(module, (), method="rtn", group_size=16)
    assert torch.equal(module[0].bias, bias)


def test_a_weight_that_is_a_buffer_is_refused() -> None:
    layer = nn.Linear(32, 16)
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)
    with pytest.raises(ConfigError, match="the weight of a Linear must be a parameter of its own; 0"):
        ptq.quantize_linears(nn.Sequential(layer), (), method="rtn", group_size=16)


@pytest.mark.parametrize("permitted", ["high", "medium"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_solver_computes_in_float32_whatever_models_may(method: str, permitted: str) -> None:
    """`torch.set_float32_matmul_precision` is for the model; with "medium" some processors multiply in bfloat16.

    Oracle: the same without it. The one Linear stands behind a norm, so that no product of the model is its input.
    """
    torch.manual_seed(0)
    module = nn.Sequential(nn.LayerNorm(512), nn.Linear(512, 512))
    x = torch.randn(1024, 512) * (3 * torch.rand(512)).exp()
    found = []
    for precision in ("highest", permitted):
        each = copy.deepcopy(module)
        torch.set_float32_matmul_precision(precision)
        try:
            ptq.quantize_linears(each, [x], method=method, bits=4, group_size=128)
            assert torch.get_float32_matmul_precision() == precision
        finally:
            torch.set_float32_matmul_precision("highest")
        found.append(each.state_dict())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
