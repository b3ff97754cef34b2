"""What `ptq.quantize_linears` leaves in float is said. Oracle: the warnings, and shares counted by hand."""

import warnings

import pytest
import tiny_experts
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import ptq
from ptq.nn import QuantLinear


class Doubled(nn.Linear):
    """More than a product."""

    def forward(self, input):
        return 2 * super().forward(input)


class Named(nn.Linear):
    """A product under another name."""


def module(**layers):
    return nn.ModuleDict({"plain": nn.Linear(32, 32), **layers})


def quantize(root, **options):
    ptq.quantize_linears(root, method="rtn", group_size=32, **options)


def test_experts_in_stacks():
    model = tiny_experts.build("mixtral")
    experts = model.model.layers[0].mlp.experts
    stacked = 2 * sum(parameter.numel() for parameter in experts.parameters())
    share = 100 * stacked / sum(parameter.numel() for parameter in model.parameters())
    with pytest.warns(UserWarning, match="quantize_linears") as caught:
        quantize(model, exclude=["lm_head"])
    [said] = [str(each.message) for each in caught]
    assert said.startswith(
        "ptq.quantize_linears packs nn.Linear layers alone; model.layers.0.mlp.experts.gate_up_proj (a stack of 4 "
        "matrices), model.layers.0.mlp.experts.down_proj (a stack of 4 matrices), "
        "model.layers.1.mlp.experts.gate_up_proj (a stack of 4 matrices) and 1 more stay in float, "
        f"{share:.1f} % of the module's weights: `ptq quantize` on a checkpoint takes experts apart and packs"
    )
    assert caught[0].filename == __file__
    # packed weights count in a later pass, too
    with pytest.warns(UserWarning, match=f"1 more stay in float, {share:.1f} % of"):
        quantize(model)


DOUBLED = (
    r"other \(Doubled, whose forward is not that of nn.Linear\) stay in float, 66.0 % of the module's weights: put an "
    "nn.Linear in its place; or name in exclude what is to stay"
)


def test_layers_with_a_forward_of_their_own():
    root = module(other=Doubled(64, 32, bias=False))
    with pytest.warns(UserWarning, match=DOUBLED):
        quantize(root)  # 2048 of 2048 + 1024 + 32
    assert type(root["other"]) is Doubled
    assert isinstance(root["plain"], QuantLinear)


@pytest.mark.parametrize(
    ("make", "exclude"),
    [
        (lambda: module(other=Doubled(64, 32)), ["other"]),
        (lambda: module(other=Doubled(64, 32)), ["o*r"]),
        (lambda: tiny_experts.build("mixtral"), ["mlp.experts"]),
        (lambda: tiny_experts.build("mixtral"), ["*.experts"]),
        (lambda: tiny_experts.build("mixtral"), ["*.experts.gate_up_proj", "*.experts.down_proj"]),
    ],
    ids=["name", "pattern", "holder", "pattern of holders", "parameters"],
)
def test_what_is_excluded_is_meant_to_stay(make, exclude):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(make(), exclude=exclude)


def test_nothing_is_said_of_what_does_not_multiply_or_is_packed(tmp_path):
    root = module(
        named=Named(32, 32), table=nn.Embedding(64, 32), line=nn.Conv1d(16, 16, 16), norm=nn.LayerNorm(32),
        attention=nn.MultiheadAttention(32, 2), positions=weight_norm(nn.Conv1d(32, 32, 16), dim=2),
    )  # fmt: skip
    tiny_experts.build("llama4").save_pretrained(tmp_path)  # its router is a Linear with a forward of its own
    apart = ptq.load(tmp_path, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(root, exclude=["attention"])
        quantize(apart, exclude=["lm_head"])
        quantize(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32, dtype=torch.bfloat16)))
    assert isinstance(root["named"], QuantLinear)
