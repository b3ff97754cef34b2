"""Plain PyTorch modules. Oracles: the module before, and its layers with the dequantized weight in float64."""

import copy

import oracles
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import ptq
from ptq.config import AWQConfig, GPTQConfig
from ptq.errors import ConfigError, NumericsError, UnsupportedModelError
from ptq.nn.linear import QuantLinear

K = 32


class MLP(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(K), nn.Linear(K, width), nn.Linear(width, K, bias=False)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


class Shared(nn.Module):
    """Two layers on one input, two kinds of input and output."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.scale = nn.Linear(K, 16), nn.Linear(K, 16), 1e-3

    def forward(self, x, mask, *, flag=None):
        y = self.q(x) * mask
        return {"big": (y, mask), "small": [self.k(x) * self.scale, flag], "length": x.shape[0]}


def seeded(make, *args):
    torch.manual_seed(0)
    return make(*args)


def inputs(count=3, dtype=torch.float32):
    return [oracles.correlated_inputs(40, K, seed).to(dtype) for seed in range(count)]


def output_error(module, reference, x):
    with torch.no_grad():
        return float((module(x) - reference(x)).square().mean() / reference(x).square().mean())


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_setting_of_every_method(method, bits, group_size, symmetric):
    module, given = seeded(MLP), inputs()
    reference = copy.deepcopy(module)
    given_out = [] if method == "rtn" else given
    losses = ptq.quantize_linears(
        module, given_out, method=method, bits=bits, group_size=group_size, symmetric=symmetric
    )
    assert sorted(losses) == ["down", "up"]
    for path, row in losses.items():
        layer = module.get_submodule(path)
        assert isinstance(layer, QuantLinear)
        expected = group_size if group_size > 0 else layer.in_features
        assert (layer.bits, layer.group_size, layer.symmetric) == (bits, expected, symmetric)
        assert (row["bits"], row["group_size"], row["symmetric"]) == (bits, expected, symmetric)
        assert row["solver"] in ("gptq", "rtn") if method == "gptq" else row["solver"] == method
        if method != "rtn":
            assert row["tokens"] == 120
            # AWQ's row of a layer whose own outputs were scaled weighs them as they are now
            assert 0 < row["loss_to_rounding"] < 1.01
    # each bit halves the steps; 2 bits lose most of some layers
    assert output_error(module, reference, inputs(4)[3]) < {2: 0.3, 3: 0.06, 4: 0.01, 8: 1e-4}[bits]


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
def test_the_forward_pass_is_that_of_the_dequantized_weights(method):
    module = seeded(MLP)
    ptq.quantize_linears(module, inputs(), method=method, group_size=16)
    seen = {}
    for path in ("up", "down"):
        module.get_submodule(path).register_forward_hook(
            lambda _m, args, output, path=path: seen.update({path: (args[0].double(), output.double())})
        )
    module(inputs(1)[0])
    for path, (x, y) in seen.items():
        layer = module.get_submodule(path)
        weight = layer.dequantize(torch.float32).double()
        bias = 0 if layer.bias is None else layer.bias.double()
        # float32: K products, their sums, the weight and the bias, 2**-24 each
        bound = (x.shape[1] + 4) * 2.0**-24 * (x.abs() @ weight.abs().T + abs(bias))
        assert bool(((y - (x @ weight.T + bias)).abs() <= bound).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_and_awq_beat_rounding_on_correlated_inputs(bits, symmetric):
    reference, errors = seeded(MLP), {}
    for method in ("rtn", "awq", "gptq"):
        module = copy.deepcopy(reference)
        ptq.quantize_linears(module, inputs(), method=method, bits=bits, group_size=16, symmetric=symmetric)
        errors[method] = output_error(module, reference, inputs(4)[3])
    assert errors["gptq"] < errors["rtn"]
    assert errors["awq"] < errors["rtn"]


def test_options_reach_the_solvers():
    reference, errors = seeded(MLP), []
    for options in ({"gptq": GPTQConfig(scales="hessian")}, {"gptq": GPTQConfig(scales="range", damping=0.02)}):
        module = copy.deepcopy(reference)
        losses = ptq.quantize_linears(module, inputs(), bits=3, group_size=16, **options)
        errors.append(losses["down"]["relative_loss"])
        assert losses["up"]["damping"] == options["gptq"].damping
    assert errors[0] < errors[1]
    plain = copy.deepcopy(reference)
    rounded = copy.deepcopy(reference)
    ptq.quantize_linears(rounded, method="rtn", group_size=16)
    ptq.quantize_linears(plain, inputs(), group_size=16, gptq=GPTQConfig(scales="range", candidates=1))
    assert torch.equal(plain.up.scales, rounded.up.scales)


def test_awq_folds_into_norms_and_linears():
    module, reference = seeded(MLP), seeded(MLP)
    module.norm.weight.data[0] = reference.norm.weight.data[0] = 10.0  # one strong channel, for the scales to act on
    losses = ptq.quantize_linears(module, inputs(), method="awq", bits=8, group_size=16, awq=AWQConfig(grid=5))
    assert {path: row["fold"] for path, row in losses.items()} == {"up": "norm", "down": "up"}
    assert not torch.equal(module.norm.weight, reference.norm.weight)
    assert output_error(module, reference, inputs(1)[0]) < 1e-4  # 8 bits


def test_folding_needs_all_outputs_to_stay():
    """The norm is read by two layers and by a small second output, which counts as much as the large one."""

    class Leaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.a = nn.LayerNorm(K), nn.Linear(K, 16)

        def forward(self, x):
            y = self.norm(x)
            return 1e4 * self.a(y), 1e-4 * y

    module = seeded(Leaky)
    assert ptq.quantize_linears(module, inputs(), method="awq", group_size=16)["a"]["fold"] is None
    assert torch.equal(module.norm.weight, torch.ones(K))


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_batches_may_be_arguments_of_any_kind(kind, method):
    module, reference = seeded(Shared), seeded(Shared)
    batches = [(x, torch.ones(40, 1)) for x in inputs()]
    if kind is dict:
        batches = [{"x": x, "mask": mask, "flag": torch.ones(1, dtype=torch.int64)} for x, mask in batches]
    elif kind is list:
        batches = [list(batch) for batch in batches]
    losses = ptq.quantize_linears(module, iter(batches), method=method, group_size=16)
    assert [row["tokens"] for row in losses.values()] == [120, 120]
    x, mask = inputs(1)[0], torch.ones(40, 1)
    assert output_error(lambda y: module(y, mask)["big"][0], lambda y: reference(y, mask)["big"][0], x) < 0.02


def test_excluded_layers_stay():
    module = seeded(MLP)
    down = module.down
    assert list(ptq.quantize_linears(module, inputs(), group_size=16, exclude=["down"])) == ["up"]
    assert module.down is down


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_training_flags_come_back_for_each_submodule(method):
    module = nn.ModuleDict({"frozen": seeded(MLP).eval(), "live": seeded(MLP).train(), "drop": nn.Dropout(0.9)})
    module["frozen"].down.train()
    module["drop"].eval()
    during = []

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = module

        def forward(self, x):
            during.append({child.training for child in self.modules()})
            return self.parts["drop"](self.parts["live"](self.parts["frozen"](x)))

    whole = Wrapped()
    before = {path: child.training for path, child in whole.named_modules()}
    ptq.quantize_linears(whole, inputs(), method=method, group_size=16)
    assert {path: child.training for path, child in whole.named_modules()} == before
    assert all(flags == {False} for flags in during)

    class Broken(Wrapped):
        def forward(self, x):
            raise KeyError("x")

    broken = Broken()
    broken.parts["live"] = seeded(MLP)
    before = {path: child.training for path, child in broken.named_modules()}
    with pytest.raises(KeyError):
        ptq.quantize_linears(broken, inputs(), method=method, group_size=16, exclude=[])
    assert {path: child.training for path, child in broken.named_modules()} == before


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
def test_gradients_still_reach_the_input(method):
    module = seeded(MLP)
    ptq.quantize_linears(module, inputs(), method=method, group_size=16)
    x = inputs(1)[0][:4].requires_grad_()
    module(x).square().sum().backward()
    dense = seeded(MLP).eval()
    dense.norm.load_state_dict(module.norm.state_dict())
    for path in ("up", "down"):
        layer = module.get_submodule(path)
        dense.get_submodule(path).weight.data.copy_(layer.dequantize(torch.float32))
    dense.up.bias.data.copy_(module.up.bias.data)
    y = x.detach().clone().requires_grad_()
    dense(y).square().sum().backward()
    # float32 sums of at most 64 terms in three layers, forwards and back
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-4 * float(y.grad.abs().max()))
    assert module.norm.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_half_precision_modules(method, dtype):
    module = seeded(MLP).to(dtype)
    reference = copy.deepcopy(module)
    ptq.quantize_linears(module, inputs(dtype=dtype), method=method, group_size=16)
    x = inputs(1, dtype)[0]
    assert module(x).dtype == dtype
    assert module.up.scales.dtype == dtype
    assert module.norm.weight.dtype == dtype
    assert output_error(module, reference, x) < 0.01


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_a_weight_shared_with_an_embedding_stays_float_there(method):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(50, K), nn.Linear(K, 50, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.embed(tokens))

    module = seeded(Tied)
    before = module.embed.weight.detach().clone()
    ptq.quantize_linears(module, [torch.arange(50)], method=method, bits=2, group_size=16)
    assert torch.equal(module.embed.weight, before)
    assert isinstance(module.head, QuantLinear)


def test_a_layer_that_stands_in_two_places_is_replaced_in_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(K, K)
            self.second = self.first

        def forward(self, x):
            return self.second(self.first(x).tanh())

    module = seeded(Twice)
    losses = ptq.quantize_linears(module, inputs(), group_size=16)
    assert list(losses) == ["first"]
    assert losses["first"]["tokens"] == 240
    assert module.first is module.second
    assert isinstance(module.first, QuantLinear)


def test_later_layers_are_calibrated_on_what_quantized_ones_put_out():
    """With 2 bits in front the second layer's inputs move far; its loss is that on the moved ones."""
    module, x = seeded(nn.Sequential, nn.Linear(K, K), nn.Tanh(), nn.Linear(K, 8)), inputs(1)[0]
    weight = module[2].weight.detach().double().clone()
    options = GPTQConfig(correct_inputs=0.0)  # with it the loss is that of another target
    losses = ptq.quantize_linears(module, [x], bits=2, group_size=16, gptq=options)
    moved = torch.tanh(module[0](x)).detach().double()
    error = weight - module[2].dequantize(torch.float32).double()
    expected = oracles.output_error(moved, error) / oracles.output_error(moved, weight)
    # float32 Hessian of 40 tokens; sum e^2 less the damping's share, both of the size of the loss
    assert losses["2"]["relative_loss"] == pytest.approx(expected, rel=1e-3)


def test_the_better_codes_are_kept():
    """Never worse than rounding on the calibration data: of single rows some come out better plainly rounded."""
    solvers = set()
    for seed in range(20, 30):
        torch.manual_seed(seed)
        module, x = nn.Sequential(nn.Linear(K, 1)), torch.randn(40, K)
        reference = copy.deepcopy(module)
        options = {"bits": 3, "group_size": 8, "symmetric": False}
        row = ptq.quantize_linears(module, [x], **options, gptq=GPTQConfig(scales="range", candidates=1))["0"]
        assert row["loss_to_rounding"] <= 1
        assert ("rounding was better" in row["rescues"]) == (row["solver"] == "rtn")
        rounded = copy.deepcopy(reference)
        ptq.quantize_linears(rounded, method="rtn", **options)
        assert torch.equal(module[0].qweight, rounded[0].qweight) == (row["solver"] == "rtn")
        solvers.add(row["solver"])
    assert solvers == {"gptq", "rtn"}


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
@pytest.mark.parametrize("group_size", [16, -1])
def test_a_layer_with_one_output(method, group_size):
    module = seeded(nn.Sequential, nn.Linear(K, 1))
    reference = copy.deepcopy(module)
    ptq.quantize_linears(module, inputs(), method=method, bits=8, group_size=group_size)
    assert output_error(module, reference, inputs(1)[0]) < 1e-3


OK = {"calibration_batches": inputs(1), "group_size": 16}


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (MLP, {"method": "obq"}, "method must be gptq, awq or rtn, found 'obq'"),
        (MLP, {"bits": 5}, "bits must be 2, 3, 4 or 8, found 5; a budget needs a language model: python -m ptq.gptq"),
        (MLP, {"bits": True}, "bits must be 2, 3, 4 or 8, found True"),
        (MLP, {"bits": {"budget": 3.5}}, "bits must be 2, 3, 4 or 8, found {'budget': 3.5}"),
        (MLP, {"group_size": 0}, "group_size must be -1 .* or 1 or more columns, found 0"),
        (MLP, {"group_size": 24}, "group_size must divide .*; up has 32, which 24 does not divide: use 32 or 16"),
        (MLP, {"gptq": GPTQConfig(damping=0.0)}, "gptq.damping must be above 0, at most 1, found 0.0"),
        (MLP, {"gptq": GPTQConfig(activation_order="dynamic")}, "gptq.activation_order must be static or none, found"),
        (MLP, {"awq": AWQConfig(grid=0)}, "awq.grid must be 1 or more, found 0"),
        (MLP, {"gptq": {"sweeps": 1}}, r"gptq must be a ptq.config.GPTQConfig, found a dict: write gptq=GPTQConfig\("),
        (MLP, {"calibration_batches": None}, "must be an iterable of batches, .* found one NoneType: put it into"),
        (MLP, {"exclude": ["dwon"]}, "a pattern in exclude must match a Linear; 'dwon' matches none of up, down"),
        (torch.inference_mode()(MLP), {}, "must be one that can be changed; that of up was made in torch.infe"),
        (MLP, {"exclude": "up"}, r"exclude must be a list of patterns, found 'up': write exclude=\['...'\]"),
        (MLP, {"exclude": None}, "exclude must be a list of patterns, found None"),
        (MLP, {"exclude": ["up", "down"]}, "must hold a Linear that is not excluded; MLP holds none"),
        (nn.Sequential, {}, "must hold a Linear that is not excluded; Sequential holds none"),
        (lambda: nn.Linear(K, K), {}, "must hold its Linears.*found a bare Linear: wrap it, as in nn.Sequential"),
        (MLP, {"calibration_batches": []}, "method gptq needs calibration batches; found none: pass them, or use"),
        (lambda: nn.Sequential(weight_norm(nn.Linear(K, K))), {}, "must be a parameter of its own; 0 computes it from"),
    ],
)  # fmt: skip
def test_what_is_asked_for_wrongly(make, options, message):
    module = make()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ConfigError, match=message):
        ptq.quantize_linears(module, **{**OK, **options})
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_awq_needs_an_output_to_prove_its_folds_by():
    class Mute(MLP):
        def forward(self, x):
            super().forward(x)
            return x.shape

    with pytest.raises(ConfigError, match="output of Mute holds no floating-point tensor: return one, or use method="):
        ptq.quantize_linears(Mute(), **OK, method="awq")
    assert ptq.quantize_linears(Mute(), **OK)["up"]["solver"] == "gptq"


def test_a_layer_that_does_not_run():
    class Idle(MLP):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(K, K)

    with pytest.raises(UnsupportedModelError, match="idle did not: add them to"):
        ptq.quantize_linears(Idle(), **OK)
    ptq.quantize_linears(Idle(), **OK, exclude=["idle"])


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_numbers_that_are_none(method):
    module, x = seeded(MLP), inputs(1)[0]
    x[3, 4] = float("inf")
    with pytest.raises(NumericsError, match="the input of up holds NaN or infinity"):
        ptq.quantize_linears(module, [x], method=method, group_size=16)


def test_awq_with_gptq_codes_loses_less_than_with_rounded_ones():
    """Both scale the same channels; mean squared output error of the module on its calibration batches."""
    errors = {}
    for codes in ("round", "gptq"):
        module, x = seeded(nn.Sequential, nn.LayerNorm(K), nn.Linear(K, K), nn.ReLU(), nn.Linear(K, 8)), inputs()
        expected = [module(each).detach() for each in x]
        rows = ptq.quantize_linears(module, x, method="awq", bits=3, group_size=16, awq=AWQConfig(codes=codes))
        assert {row["solver"] for row in rows.values()} == {"awq+gptq" if codes == "gptq" else "awq"}
        errors[codes] = sum(float((module(each) - y).square().sum()) for each, y in zip(x, expected, strict=True))
    assert errors["gptq"] < errors["round"]
