"""Products of 16-bit floats where a processor has no units for them.

Oracle: the same products in float64, rounded once to the dtype, and autograd's gradients of float32 products.
"""

import importlib
import io
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ptq_kernels.cpu import units
from tiny_models import build, run, save, settings, tokens
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

import ptq
from ptq import half_products
from ptq.evaluate import in_memory, streamed
from ptq.export import export_gguf
from ptq.half_products import fast_half_products, plain_products
from ptq.predict_time import computing_rates
from ptq.progress import Progress
from ptq.runtime import open_checkpoint, open_stream

CPU, HAS_UNITS = torch.device("cpu"), units.has_units
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def without_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that has units for float32 alone; pieces so small that every product takes several."""
    monkeypatch.setattr(units, "has_units", lambda _: False)
    monkeypatch.setattr(half_products, "CHUNK", 1 << 10)
    monkeypatch.setattr(half_products, "LEAST_ROWS", 16)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the products that were taken over."""
    taken: list[str] = []

    def counted(name: str, product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: (taken.append(name), product(*args, **kwargs))[1]

    found = {op: counted(op.name(), product) for op, product in half_products._PRODUCTS.items()}
    monkeypatch.setattr(half_products, "_PRODUCTS", found)
    return taken


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


A, B = (5, 60, 40), (5, 40, 70)
CASES: dict[str, tuple[str, Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "linear": ("aten::mm", linear, ((60, 40), (70, 40))),
    "linear of three dimensions": ("aten::mm", linear, ((3, 20, 40), (70, 40))),
    "linear with bias": ("aten::addmm", linear, ((3, 20, 40), (70, 40), (70,))),
    "conv1d": ("aten::addmm", lambda x, w, b: torch.addmm(b, x, w), ((60, 40), (40, 70), (70,))),
    "beta, alpha": (
        "aten::addmm", lambda a, b, c: torch.addmm(c, a, b, beta=0.5, alpha=-2), ((60, 40), (40, 70), (1, 70)),
    ),
    "matmul": ("aten::bmm", torch.matmul, ((5, 2, 60, 40), (5, 2, 40, 70))),
    "bmm, a transposed": ("aten::bmm", lambda a, b: torch.bmm(a.mT, b), ((5, 40, 60), (5, 40, 70))),
    "einsum": ("aten::bmm", lambda a, b: torch.einsum("bmk,bkn->bmn", a, b), (A, B)),
    "baddbmm": (
        "aten::baddbmm", lambda a, b, c: torch.baddbmm(c, a, b, beta=0.5, alpha=-2), (A, B, (5, 60, 70)),
    ),
    "baddbmm, bias broadcast": ("aten::baddbmm", lambda a, b, c: torch.baddbmm(c, a, b), (A, B, (1, 70))),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_a_product_is_rounded_once(products: list[str], case: str, dtype: torch.dtype) -> None:
    name, function, shapes = CASES[case]
    factors = [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    with torch.no_grad(), fast_half_products(CPU):
        y = function(*factors)
    exact = function(*(each.double() for each in factors))
    assert products == [name]
    assert (y.dtype, y.shape, y.stride()) == (dtype, exact.shape, exact.contiguous().stride())
    # float32 sums are a hair from the exact ones, so some values round to the other neighbour
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)
    assert float((y == exact.to(dtype)).double().mean()) > 0.99


def test_a_bias_that_counts_nothing_may_hold_anything() -> None:
    a, b, bias = random(*A).half(), random(*B).half(), torch.full((5, 60, 70), torch.nan).half()
    with fast_half_products(CPU):
        assert torch.isfinite(torch.baddbmm(bias, a, b, beta=0)).all()
        assert torch.isfinite(torch.addmm(bias[0], a[0], b[0], beta=0)).all()


@pytest.mark.parametrize("shapes", [((60, 0), (70, 0)), ((0, 40), (70, 40)), ((60, 40), (0, 40))])
def test_empty_products(shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    x, weight = (torch.ones(shape, dtype=torch.bfloat16) for shape in shapes)
    with fast_half_products(CPU):
        assert torch.equal(linear(x, weight), torch.zeros(shapes[0][0], shapes[1][0], dtype=torch.bfloat16))
        assert torch.equal(torch.bmm(x[None], weight.T[None])[0], linear(x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_go_through(products: list[str], dtype: torch.dtype) -> None:
    x, weight, grad = random(60, 40, dtype=dtype), random(70, 40, dtype=dtype, seed=1), random(60, 70, dtype=dtype)
    leaves = x.requires_grad_(), weight.requires_grad_()
    with fast_half_products(CPU):
        found = torch.autograd.grad(linear(*leaves), leaves, grad)
    assert products == ["aten::mm"] * 3
    exact = torch.autograd.grad(linear(x.double(), weight.double()), leaves, grad.double())
    for each, want in zip(found, exact, strict=True):
        assert each.dtype == dtype
        torch.testing.assert_close(each, want, rtol=torch.finfo(dtype).eps, atol=1e-3)


def test_what_is_left_to_torch(products: list[str]) -> None:
    half, weight = random(60, 40).bfloat16(), random(70, 40, seed=1)
    linear(half, weight.bfloat16())
    with fast_half_products(CPU):
        linear(half.float(), weight)
        linear(half[:7], weight.bfloat16())
        linear(half.to("meta"), weight.bfloat16().to("meta"))
        scaled_dot_product_attention(*[half.view(1, 3, 20, 40)] * 3)
        with pytest.raises(RuntimeError, match="same dtype"):
            linear(half.float(), weight.bfloat16())
        with pytest.raises(RuntimeError, match="60x40 and 39x70"):
            linear(half, weight.bfloat16()[:, 1:])
        with pytest.raises(RuntimeError, match="dtype"):
            torch.addmm(half.new_zeros(70).half(), half, weight.bfloat16().T)
        with pytest.raises(RuntimeError, match="batch"):
            torch.bmm(half.view(3, 20, 40), half.view(2, 30, 40).mT)
    with fast_half_products(torch.device("cuda")):
        linear(half, weight.bfloat16())
    assert not products
    linear(half, weight.bfloat16())
    assert not products


def test_what_is_compiled_stays_compiled() -> None:
    twice = torch.compile(lambda x: linear(x, x) * 2, backend="aot_eager", fullgraph=True)
    half = random(60, 40).bfloat16()
    with fast_half_products(CPU):
        y = twice(half)
    torch.testing.assert_close(y, linear(half, half) * 2, rtol=0.01, atol=0.1)


def test_plain_products_are_torchs_own(products: list[str]) -> None:
    half = random(60, 40).bfloat16()
    with plain_products():  # outside of the other it does nothing
        linear(half, half)
    with fast_half_products(CPU):
        with plain_products():
            assert torch._C._len_torch_dispatch_stack() == 0
            linear(half, half)
        with pytest.raises(RuntimeError, match="same dtype"), plain_products():
            linear(half, half.float())
        assert products == []
        linear(half, half)
        assert products == ["aten::mm"]
        with FlopCounterMode(display=False) as count, plain_products():  # another mode is not taken away
            linear(half, half)
        assert count.get_total_flops() == 2 * 60 * 60 * 40
        linear(half, half)
    assert products == ["aten::mm"] * 3
    assert torch._C._len_torch_dispatch_stack() == 0


def test_units_are_used_where_they_are(products: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "has_units", lambda dtype: dtype == torch.bfloat16)
    x, weight = random(60, 40), random(70, 40, seed=1)
    with fast_half_products(CPU):
        linear(x.bfloat16(), weight.bfloat16())
        assert not products
        linear(x.half(), weight.half())
    assert products == ["aten::mm"]


@pytest.mark.parametrize(("has_mkldnn", "answer"), [(True, True), (True, False), (False, True)])
def test_which_units_there_are(monkeypatch: pytest.MonkeyPatch, has_mkldnn: bool, answer: bool) -> None:
    """A torch without oneDNN has no operators to ask."""
    operators = SimpleNamespace()
    if has_mkldnn:
        operators._is_mkldnn_bf16_supported, operators._is_mkldnn_fp16_supported = lambda: answer, lambda: not answer
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_mkldnn)
    monkeypatch.setattr(torch.ops, "mkldnn", operators)
    found = {dtype: HAS_UNITS.__wrapped__(dtype) for dtype in (*DTYPES, torch.float32, torch.float64)}
    assert found == {
        torch.bfloat16: has_mkldnn and answer,
        torch.float16: has_mkldnn and not answer,
        torch.float32: True,
        torch.float64: False,
    }


def quantize_module(folder: Path) -> None:
    ptq.quantize_linears(
        nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16(), [random(16, 64).bfloat16()], group_size=32
    )


def export(folder: Path) -> None:
    solving = settings(Path(), Path())
    export_gguf(str(folder / "parent"), "Q4_0", str(folder / "a.gguf"), solving, progress=Progress(io.StringIO()))


USERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a run": ("ptq.walk", lambda folder: run(settings(folder / "parent", folder / "out"))),
    "a streamed model": (
        "ptq.evaluate",
        lambda folder: next(streamed(open_stream(open_checkpoint(folder / "parent"), CPU))([tokens(2, 32)])),
    ),
    "a model in memory": (
        "ptq.evaluate", lambda _: next(in_memory(build("llama", torch.bfloat16))([tokens(2, 32)])),
    ),
    "a module": ("ptq.plain", quantize_module),
    "a GGUF file": ("ptq.export", export),
    "the prediction": ("ptq.predict_time", lambda _: computing_rates.__wrapped__(CPU, torch.bfloat16, 1)),
}  # fmt: skip


@pytest.mark.parametrize("user", USERS)
def test_who_takes_products_this_way(
    products: list[str], user: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each by itself: what the others do is switched off."""
    where, use = USERS[user]
    for other in {name for name, _ in USERS.values()} - {where}:
        monkeypatch.setattr(importlib.import_module(other), "fast_half_products", lambda _: nullcontext())
    save(build("llama", torch.bfloat16), tmp_path / "parent")
    use(tmp_path)
    assert "aten::mm" in products
    assert torch._C._len_torch_dispatch_stack() == 0  # a scorer that waits to go on leaves nothing behind


SOLVERS = {  # what does the small operations of each, and what uses it
    "gptq": ("ptq.gptq.block.choose_codes", lambda folder: run(settings(folder / "parent", folder / "out"))),
    "awq, scales": (
        "ptq.awq.block.search_scales",
        lambda folder: run(settings(folder / "parent", folder / "o", "awq")),
    ),
    "awq, codes": ("ptq.awq.block.search_clip", lambda folder: run(settings(folder / "parent", folder / "out", "awq"))),
    "rtn": ("ptq.block.rtn_solve", lambda folder: run(settings(folder / "parent", folder / "out", "rtn"))),
    "gguf": ("ptq.gguf.block.solve_blocks", export),
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_pay_nothing_for_it(solver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AWQ took three times as long on two small blocks where every operation went through the mode."""
    name, use = SOLVERS[solver]
    module, _, function = name.rpartition(".")
    solve, modes = getattr(importlib.import_module(module), function), []

    def watched(*args: Any, **kwargs: Any) -> Any:
        modes.append(torch._C._len_torch_dispatch_stack())
        return solve(*args, **kwargs)

    monkeypatch.setattr(name, watched)
    save(build("llama", torch.bfloat16), tmp_path / "parent")
    use(tmp_path)
    assert len(modes) >= 8
    assert set(modes) == {0}
