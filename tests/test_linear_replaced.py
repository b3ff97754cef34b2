"""Where an nn.Linear stood. Oracles: the module with its Linears, and the dense weight of its QuantLinears."""

import copy
import threading

import pytest
import torch
from torch import Tensor, nn

import ptq
from ptq.errors import ConfigError, FormatError, UnsupportedModelError
from ptq.nn import QuantLinear

WIDTH = 32


class Two(nn.Module):
    """Two Linears; the way through them depends on the arguments."""

    def __init__(self, way: str = "both") -> None:
        super().__init__()
        self.a, self.b, self.way = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), way

    def forward(self, x: Tensor, kind: str = "", cache: list[Tensor] | None = None) -> Tensor:
        if self.way == "changes x":
            x -= x.mean(-1, keepdim=True)
            x *= 0.5
        if self.way == "fills a cache" and cache is not None:
            cache.append(x)
            x = torch.cat(cache).mean(0, keepdim=True) + x
        if self.way == "branches":
            return self.a(x) if kind == "a" else self.b(x)
        if self.way == "shares at times":
            return self.a(x) + self.b(x if kind == "shared" else x.roll(1, -1) * torch.linspace(0, 3, WIDTH))
        return self.b(self.a(x).relu())


def seeded(way: str = "both") -> Two:
    torch.manual_seed(0)
    return Two(way)


def rows(seed: int, count: int = 48) -> Tensor:
    spread = torch.logspace(-1, 1, WIDTH)
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)) * spread


def quantized(module: nn.Module, batches: list, **options) -> dict:
    return ptq.quantize_linears(module, batches, **{"group_size": 16, **options})


@pytest.mark.parametrize("gradients", ["x", "bias", "none"])
@pytest.mark.parametrize("prepared", [True, False])
def test_results_may_be_changed_in_place(gradients: str, prepared: bool) -> None:
    module = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(inplace=True), nn.Linear(16, 8))
    quantized(module, [], method="rtn")
    if not prepared:
        module = copy.deepcopy(module)
        for layer in (module[0], module[2]):
            layer._canonicalize_()
    x = rows(0, 6).view(2, 3, WIDTH).requires_grad_(gradients == "x")
    module[0].bias.requires_grad_(gradients == "bias")
    module[2].bias.requires_grad_(gradients == "bias")
    for _ in range(3):  # the short way comes after the first
        y = module(x)
        y[0, 1] += 1
        want = functional(module, x)
        want[0, 1] += 1
        assert torch.allclose(y, want, atol=1e-4)  # float32 sums of products of up to about 10
        leaf = {"x": x, "bias": module[0].bias, "none": None}[gradients]
        if leaf is not None:
            got, expected = (torch.autograd.grad(each.square().sum(), leaf)[0] for each in (y, want))
            assert torch.allclose(got, expected, rtol=1e-4, atol=1e-3)


def functional(module: nn.Sequential, x: Tensor) -> Tensor:
    for layer in module:
        x = (
            nn.functional.linear(x, layer.dequantize(torch.float32), layer.bias)
            if isinstance(layer, QuantLinear)
            else x.relu()
        )
    return x.clone()


def test_hooks_and_biases_go_over() -> None:
    module = seeded()
    tripled = module.a.register_forward_hook(lambda _, __, y: y * 3)
    scaled = module.b.register_forward_pre_hook(lambda _, x, kw: ((x[0] * 10,), kw), with_kwargs=True)
    seen = []
    module.b.register_full_backward_hook(lambda *_: seen.append(1))
    biases, reference, x = (module.a.bias, module.b.bias), copy.deepcopy(module), rows(1)
    quantized(module, [x], bits=8)
    assert isinstance(module.a, QuantLinear)
    assert (module(x) - reference(x)).norm() < 0.01 * reference(x).norm()
    module(x).sum().backward()
    assert seen == [1]
    assert (module.a.bias, module.b.bias) == biases
    tripled.remove()
    scaled.remove()
    x = rows(2)
    assert torch.allclose(module(x), module.b(module.a(x).relu()))
    assert (module.b(x) - nn.functional.linear(x, module.b.dequantize(torch.float32), module.b.bias)).abs().max() < 1e-3


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("way", ["changes x", "fills a cache"])
def test_every_pass_gets_the_arguments_as_they_were(way: str, method: str) -> None:
    """The same module, given a copy of its arguments by a hook, is the oracle."""
    module, batches = seeded(way), [(rows(seed), "", []) for seed in range(3)]
    wrapped, before = copy.deepcopy(module), copy.deepcopy(batches)
    wrapped.register_forward_pre_hook(lambda _, given: copy.deepcopy(given))
    quantized(module, batches, method=method, bits=3)
    quantized(wrapped, batches, method=method, bits=3)
    assert torch.equal(module.a.dequantize(), wrapped.a.dequantize())
    assert torch.equal(module.b.dequantize(), wrapped.b.dequantize())
    for (x, _, cache), (want, _, _) in zip(batches, before, strict=True):
        assert torch.equal(x, want)
        assert cache == []


def test_arguments_that_cannot_be_copied_are_given_as_they_are() -> None:
    class Locked(Two):
        def forward(self, x: Tensor, lock: object) -> Tensor:
            return super().forward(x) if lock is held else x

    held = threading.Lock()
    assert set(quantized(Locked(), [(rows(0), held)])) == {"a", "b"}


def test_arguments_that_are_one_tensor_stay_one() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(WIDTH, WIDTH)

        def forward(self, query: Tensor, key: Tensor) -> Tensor:
            assert query is key
            return self.a(query)

    x = rows(0).requires_grad_()
    quantized(Attention(), [(x, x), {"query": x, "key": x}])


def test_each_batch_may_take_another_way() -> None:
    module, batches = seeded("branches"), [(rows(0), "a"), (rows(1), "b"), (rows(2, 8), "b")]
    want = {}
    for name, own in (("a", batches[:1]), ("b", batches[1:])):
        alone = seeded("branches")
        quantized(alone, own, exclude=[{"a": "b", "b": "a"}[name]])
        want[name] = getattr(alone, name).dequantize()
    found = quantized(module, batches)
    assert {name: row["tokens"] for name, row in found.items()} == {"a": 48, "b": 56}
    for name, weight in want.items():
        assert torch.equal(getattr(module, name).dequantize(), weight)
    with pytest.raises(UnsupportedModelError, match="awq proves on the first batch .* b did not: .*, or use gptq"):
        quantized(seeded("branches"), batches, method="awq")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_inputs_are_shared_only_if_every_batch_shares_them(order: tuple[int, ...]) -> None:
    batches = [(rows(0), "shared"), (rows(1), ""), (rows(2), "")]
    module, alone = seeded("shares at times"), seeded("shares at times")
    quantized(module, [batches[i] for i in order])
    quantized(alone, [batches[i] for i in order], exclude=["a"])
    assert torch.equal(module.b.dequantize(), alone.b.dequantize())


def test_the_input_has_the_name_that_a_linear_gives_it() -> None:
    layer = seeded()
    quantized(layer, [], method="rtn")
    assert torch.equal(layer.a(input=rows(0)), layer.a(rows(0)))


def test_a_linear_under_an_adapter_is_refused() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(seeded(), peft.LoraConfig(r=2, target_modules=["a"]))
    with pytest.raises(ConfigError, match="a.base_layer has one of PEFT over it already: merge or unload"):
        quantized(model, [rows(0)], exclude=["*lora_*"])
    quantized(model, [rows(0)], exclude=["*lora_*", "*base_layer"])


def test_a_linear_without_a_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 has none yet: run the module once"):
        quantized(nn.Sequential(nn.LazyLinear(4)), [rows(0)])


@pytest.mark.parametrize("name", ["qweight", "zeros"])
def test_codes_that_were_cast_are_refused(name: str) -> None:
    module = nn.Sequential(nn.Linear(WIDTH, 16))
    quantized(module, [], method="rtn", symmetric=False)
    before = module.state_dict()
    cast = {key: value.bfloat16() if key.endswith(name) else value for key, value in before.items()}
    with pytest.raises(FormatError, match=rf"0.{name} must be torch.* found torch.bfloat16: codes do not survive"):
        module.load_state_dict(cast)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_a_bias_may_become_strided() -> None:
    module, x = nn.Sequential(nn.Linear(WIDTH, 16)), rows(0, 4)
    quantized(module, [], method="rtn")
    for _ in range(3):
        module(x)
    module[0].bias.data = torch.arange(32.0)[::2]
    for _ in range(3):
        assert torch.allclose(module(x), functional(module, x), atol=1e-4)
