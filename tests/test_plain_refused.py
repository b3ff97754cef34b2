"""What `ptq.quantize_linears` and `ptq.load` are asked for that cannot be had. Oracle: the sentences, and the module
as it was.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import ptq
from ptq.block import quantize_block
from ptq.config import RunConfig
from ptq.errors import ConfigError, NumericsError, PtqError, UnsupportedModelError
from ptq.formats.codec import Scheme
from ptq.schema import build
from ptq.task import BlockTask, share

K = 32
X = torch.randn(16, K, generator=torch.Generator().manual_seed(0))


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def pruned() -> nn.Module:
    linear = nn.Linear(K, K)
    prune.l1_unstructured(linear, "bias", 0.5)
    return nn.Sequential(linear)


def parametrized() -> nn.Module:
    linear = nn.Linear(K, K)
    parametrize.register_parametrization(linear, "bias", Double())
    return nn.Sequential(linear)


def shared() -> nn.Module:
    linear = nn.Linear(K, K)
    return nn.Sequential(linear, nn.Sequential(linear))


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(self.up)(x)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(K, K))


CALLED = "must be called with a plain dense tensor to be calibrated; one is called with"
REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], type[PtqError], str]] = {
    "pruned bias": (pruned, {}, ConfigError, "the bias of a Linear must be a parameter of its own; 0 computes it"),
    "parametrized bias": (parametrized, {}, ConfigError, "the bias of a Linear must be a parameter of its own; 0 comp"),
    "another name": (shared, {"exclude": ["1.0"]}, ConfigError, "'1.0' matches another name of 0: write that"),
    "numpy": (plain, {"calibration_batches": [X.numpy()]}, UnsupportedModelError, f"{CALLED} a ndarray: make the"),
    "text": (plain, {"calibration_batches": ["abc"]}, UnsupportedModelError, f"{CALLED} a str"),
    "nothing": (plain, {"calibration_batches": [None]}, UnsupportedModelError, f"{CALLED} a NoneType"),
    "a number": (plain, {"calibration_batches": [5]}, UnsupportedModelError, f"{CALLED} a int"),
    "sparse": (
        plain,
        {"calibration_batches": [X.to_sparse()]},
        UnsupportedModelError,
        f"{CALLED} one of layout torch.sparse_coo",
    ),
    "mapped": (Mapped, {}, UnsupportedModelError, f"{CALLED} one inside torch.vmap .*or exclude the layer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    make, options, error, message = REFUSED[case]
    module = make()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(error, match=message):
        ptq.quantize_linears(module, **{"calibration_batches": [X], "group_size": 16, **options})
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("call", [lambda: ptq.quantize_linears(plain(), method="rtn"), lambda: ptq.load("nowhere")])
def test_tensors_must_be_made_in_memory(call: Callable[[], object]) -> None:
    with (
        torch.device("meta"),
        pytest.raises(ConfigError, match="torch's default device is meta here: call ptq.*outside"),
    ):
        call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": 0}, "device must be auto, cpu, cuda or cuda:N; found 0"),
        ({"device": ""}, "device must be auto, cpu, cuda or cuda:N; found ''"),
        ({"fuse": "no"}, "fuse must be True or False, found 'no'"),
        ({"compile": 1}, "compile must be True or False, found 1"),
        ({"warmup": None}, "warmup must be True or False, found None"),
    ],
)
def test_load_refuses_before_it_looks(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ptq.load("nowhere", **options)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(ConfigError, match="module must be a torch.nn.Module, found a NoneType; for a checkpoint"):
        ptq.quantize_linears(None, [X])


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("wrong", [X[:, 1:], X.double()], ids=["width", "dtype"])
def test_an_error_of_torch_names_the_batch(method: str, wrong: Tensor) -> None:
    with pytest.raises(RuntimeError) as raised:
        ptq.quantize_linears(plain(), [X, wrong], method=method, group_size=K)
    assert raised.value.__notes__ == [
        f"Sequential was run on calibration batch 1, a tensor of {wrong.dtype} {list(wrong.shape)}"
    ]


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        raise TypeError("a reason of its own")


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize(
    ("batch", "found"),
    [((X, torch.zeros(16)), "too many positional arguments"), ({"y": X}, "missing a required argument: '.*'")],
    ids=["labels", "names"],
)
def test_batches_that_are_not_the_modules_arguments(method: str, batch: Any, found: str) -> None:
    """As a DataLoader gives them. A TypeError of the module itself is not called a matter of its arguments."""
    module = plain()
    message = f"a batch must be the arguments of the module, found one that does not fit its forward: {found}; leave"
    with pytest.raises(ConfigError, match=message):
        ptq.quantize_linears(module, [batch], method=method, group_size=K)
    assert type(module[0]) is nn.Linear
    with pytest.raises(TypeError, match="a reason of its own"):
        ptq.quantize_linears(Failing(), [X], method=method, group_size=K)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_weights_that_become_zero_are_lost_whole(method: str) -> None:
    """Too small for any scale: the error is the weight itself, so the relative loss is 1 by its definition."""
    module = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K))
    module[0].weight.data.mul_(1e-30)
    module[1].weight.data.zero_()
    rows = ptq.quantize_linears(module, [X], method=method, group_size=16)
    assert not module[0].dequantize().any()
    assert (rows["0"]["relative_loss"], rows["0"]["loss_to_rounding"]) == (1.0, 1.0)
    assert rows["1"]["relative_loss"] == 0.0  # nothing was there to be lost


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_range_of_an_asymmetric_grid_holds_0(method: str, sign: int) -> None:
    """Weights far from 0 and near each other: codes from 0 to 15 reach 15 scales of at most 65504 to one side of 0."""
    module = plain()
    module[0].weight.data.uniform_(9.7e5, 9.8e5).mul_(sign)
    before, options = module[0].weight.detach().clone(), {"method": method, "symmetric": False, "group_size": 16}
    far = copy.deepcopy(module)
    far[0].weight.data[3, 20] = sign * 1.2e6
    ptq.quantize_linears(module, [X], **options)
    error = float((module[0].dequantize(torch.float32) - before).abs().max())
    assert error <= 65504 * (0.5 if method == "rtn" else 2)  # the others make up for one error by another
    with pytest.raises(NumericsError, match=r"within 9.83e\+05 of each other and 0 for a .*; 0 has one of 1.2e\+06"):
        ptq.quantize_linears(far, [X], **options)


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
def test_groups_of_one_small_number_are_on_record(method: str) -> None:
    """The grid is as wide as that number is far from 0: 15 codes of 2**-17 are 1.1e-4, so all of 1e-8 become 0."""
    module = plain()
    module[0].weight.data.fill_(1e-8)
    row = ptq.quantize_linears(module, [X], method=method, symmetric=False, group_size=16)["0"]
    assert row["rescues"] == [f"scales of {2 * K} of {2 * K} groups raised to 2**-17"]
    assert not module[0].dequantize().any()
    assert row.get("relative_loss", 1.0) == 1.0


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize(("size", "rescues"), [(1e-25, ["inputs too small to be squared"]), (1e-13, []), (0.0, [])])
def test_small_inputs(method: str, size: float, rescues: list[str]) -> None:
    """Squares of 1e-25 are 0 in float32: the loss is the weight's own then, and of normal inputs it is about the same.

    Oracle: the error in float64 of what comes out, on the inputs before they were made small.
    """
    module, x = plain(), torch.randn(4096, K, generator=torch.Generator().manual_seed(1))
    before = module[0].weight.detach().double()
    row = ptq.quantize_linears(module, [size * x], method=method, group_size=16)["0"]
    error = before - module[0].dequantize(torch.float32).double()
    outputs = [(x.double() @ each.t()).square().sum() for each in (error, before)]
    assert row["rescues"] == rescues
    assert row["relative_loss"] == pytest.approx(float(outputs[0] / outputs[1]) if size else 0.0, rel=0.05)


def test_small_inputs_whose_sum_is_0() -> None:
    module = plain()
    x = 1e-25 * torch.randn(512, K // 2, generator=torch.Generator().manual_seed(1))
    row = ptq.quantize_linears(module, [torch.cat([x, -x], 1)], group_size=16)["0"]
    assert row["rescues"] == ["inputs too small to be squared"]


def test_one_channel_that_can_be_squared_is_enough() -> None:
    """All other inputs are 0, so only the weights of this one count: where all did, the loss would be a hundredth."""
    for size in (1.0, 5e-15):
        module, x = plain(), torch.zeros(512, K)
        x[:, 3] = size * torch.randn(512, generator=torch.Generator().manual_seed(1))
        row = ptq.quantize_linears(module, [x], group_size=16)["0"]
        assert row["rescues"] == []
        assert row["relative_loss"] < 1e-3


@pytest.mark.parametrize(("loss", "energy", "found"), [(1.0, 4.0, 0.25), (0.0, 0.0, 0.0), (1e-30, 0.0, 1.0)])
def test_a_share_of_nothing(loss: float, energy: float, found: float) -> None:
    assert share(loss, energy) == found
    assert math.isnan(share(loss, math.nan))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_small_inputs_are_an_error_under_strict(method: str) -> None:
    config = build(RunConfig, {"model": "m", "output": "o", "method": method, "group_size": 16, "strict": True})
    module = plain()
    task = BlockTask("block", {"0": Scheme(4, 16, True)}, config, torch.float32)
    with pytest.raises(NumericsError, match="strict: the inputs of block.0 must be .* mean squares below 1e-30"):
        quantize_block(module, [lambda: module(1e-25 * X)], task)
