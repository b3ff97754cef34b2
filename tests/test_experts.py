"""Experts as modules: how they are calibrated, put together from stored tensors, and refused.

Oracles: second moments in float64; what transformers' own converters are described to do.
"""

import copy
import pickle

import pytest
import torch
from tiny_experts import build
from tiny_models import logits, tokens
from torch import nn

from ptq.calibration.capture import InputGroup, collect, trace_groups
from ptq.errors import FormatError, UnsupportedModelError
from ptq.gptq.block import stages
from ptq.models.conversion import Conversions, put_together
from ptq.models.experts import UnfusedExperts, experts_of, routers, unfuse_experts
from ptq.models.structure import linears

IDS = tokens(2, 12)


def mixture():
    """The experts of a Mixtral of 8 and who gets what: expert 0 half of the tokens, 1 three, 2 none, the others one."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    module = MixtralExperts(MixtralConfig(hidden_size=32, intermediate_size=16, num_local_experts=4))
    module.config._experts_implementation = "eager"
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(generator=generator)
    x = torch.randn(40, 32, generator=generator)
    index = torch.tensor([0] * 20 + [1] * 3 + [3] * 17)[:, None]
    return module, x, index, torch.ones(40, 1)


def test_starved_experts_learn_from_all_tokens():
    """Oracle: second moments in float64, blended as ``(n H + K/4 H_all) / (n + K/4)``."""
    module, *given = mixture()
    x = given[0].double()
    unfuse_experts(module)
    linear = dict(linears(module))
    runs = [lambda: module(*given)]
    groups = trace_groups(linear, runs[:1])
    assert [group.members for group in groups] == [
        members for e in range(4) for members in ((f"{e}.up_proj", f"{e}.gate_proj"), (f"{e}.down_proj",))
    ]
    assert {group.pool for group in groups} == {0}
    assert [len(stage) for stage in stages(groups)] == [4, 4]
    stats = {group.members[0]: each for group, each in zip(groups, collect(linear, groups, runs), strict=True)}
    assert [stats[f"{e}.up_proj"].routed for e in range(4)] == [20, 3, 0, 17]
    assert [stats[f"{e}.up_proj"].tokens for e in range(4)] == [20, 40, 40, 17]
    moment = {"all": x.T @ x / 40, 0: x[:20].T @ x[:20] / 20, 1: x[20:23].T @ x[20:23] / 3}
    expected = {0: moment[0], 1: (3 * moment[1] + 8 * moment["all"]) / 11, 2: moment["all"]}
    for index, want in expected.items():
        # float32 sums of 40 products
        torch.testing.assert_close(stats[f"{index}.up_proj"].hessian.double(), want, rtol=1e-4, atol=1e-5)
    # the inner size is 16: three tokens are enough for a Linear of 16 inputs, none are not
    assert [stats[f"{e}.down_proj"].routed for e in range(4)] == [20, 3, 0, 17]
    assert [stats[f"{e}.down_proj"].tokens for e in range(4)] == [20, 3, 40, 17]
    inner = module.act_fn(linear["2.gate_proj"](given[0])) * linear["2.up_proj"](given[0])
    want = inner.double().T @ inner.double() / 40
    torch.testing.assert_close(stats["2.down_proj"].hessian.double(), want, rtol=1e-4, atol=1e-4)


def test_other_linears_are_calibrated_one_group_at_a_time():
    groups = [
        InputGroup(("a",)),
        InputGroup(("0.up", "0.gate"), 1, 0),
        InputGroup(("1.up", "1.gate"), 1, 0),
        InputGroup(("b",)),
    ]
    assert stages(groups) == [[groups[0]], groups[1:3], [groups[3]]]


class Odd(nn.Module):
    """Stacks of weights that nobody knows how to use."""

    def __init__(self, gate_up=(4, 32, 16), down=(4, 16, 16)):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.ones(gate_up)), nn.Parameter(torch.ones(down))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return hidden_states


class Failing(Odd):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise RuntimeError


class Two(Odd):
    def forward(self, hidden_states, top_k_index):
        return hidden_states


class Nameless(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 16, 16))


@pytest.mark.parametrize(
    "module", [Odd(), Failing(), Two(), Nameless(), Odd((4, 20, 16))], ids=lambda m: type(m).__name__
)
def test_an_unknown_layout_is_an_error(module):
    model = nn.ModuleDict({"experts": module})
    with pytest.raises(UnsupportedModelError, match=f"{type(module).__name__} at experts holds .* in another one"):
        unfuse_experts(model)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4"])
def test_the_layout_is_proven_whatever_tensors_a_program_makes_by_default(name):
    """Oracle: what is found when nothing was set."""
    plain, models = build(name), (build(name), build(name))
    unfuse_experts(plain)
    layouts = [module.layout for module in experts_of(plain).values()]
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        unfuse_experts(models[0])
    finally:
        torch.set_default_dtype(before)
    with torch.device("meta"):
        unfuse_experts(models[1])
    for model in models:
        assert [module.layout for module in experts_of(model).values()] == layouts


@pytest.mark.parametrize("name", ["mixtral", "llama4"])
@pytest.mark.parametrize("again", [lambda model: pickle.loads(pickle.dumps(model)), copy.deepcopy])
def test_a_pickle_of_experts_is_the_same_model(name, again):
    """Oracle: the logits of the model that was pickled; the class is the one made for all such modules."""
    model = build(name)
    unfuse_experts(model)
    found = again(model)
    assert torch.equal(logits(found, IDS), logits(model, IDS))
    assert [type(module) for module in experts_of(found).values()] == [
        type(module) for module in experts_of(model).values()
    ]


@pytest.mark.parametrize("beyond", [0, 3])
def test_experts_that_hold_nothing_pass_rows_on(beyond):
    """LongCat-Flash's. Oracle: the model as it was, whose router sends about half of the choices to them."""
    from transformers import AutoModelForCausalLM, LongcatFlashConfig

    config = LongcatFlashConfig(
        vocab_size=288, hidden_size=32, num_layers=2, num_attention_heads=4, q_lora_rank=16, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=8, head_dim=8, v_head_dim=8, qk_head_dim=16, ffn_hidden_size=32,
        expert_ffn_hidden_size=16, n_routed_experts=4, zero_expert_num=beyond, moe_topk=2, max_position_embeddings=64,
        bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "experts" in name or "classifier" in name:
            parameter.data.normal_()
    expected = logits(model, IDS)
    found = copy.deepcopy(model)
    unfuse_experts(found)
    assert [pool.layout.passes for pool in experts_of(found).values()] == [beyond > 0] * 2
    torch.testing.assert_close(logits(found, IDS), expected, rtol=1e-5, atol=1e-6)
    beside = routers(found)
    assert {path.rpartition(".")[2] for path in beside} == {"classifier"}


def test_a_convolution_is_no_stack_of_experts():
    model = nn.Sequential(nn.Conv1d(16, 16, 16))
    unfuse_experts(model)
    assert not isinstance(model[0], UnfusedExperts)


def stacking():
    """Two tensors an expert, stacked and put one after the other: the pieces of ``layer.z``, as transformers says."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    converter = WeightConverter(
        ["layer.*.x", "layer.*.y"], "layer.z", operations=[MergeModulelist(dim=0), Concatenate(dim=1)]
    )
    conversions = Conversions(nn.Module())
    conversions._converters = [converter]
    stored = [f"layer.{e}.{leaf}" for e in range(11) for leaf in "yx"]
    return [conversions.piece(name, name) for name in stored]


def test_parameters_are_put_together_as_transformers_does():
    pieces = stacking()
    assert {(piece.targets, piece.part, piece.expert) for piece in pieces} == {
        (("layer.z",), part, expert) for part in (0, 1) for expert in range(11)
    }
    tensors = {piece.stored: torch.randn(2, 3) for piece in pieces}
    found = put_together(nn.Module(), "model.layer.z", pieces, tensors.__getitem__)
    x, y = (torch.stack([tensors[f"layer.{e}.{leaf}"] for e in range(11)]) for leaf in "xy")
    assert torch.equal(found, torch.cat((x, y), 1))


def test_tensors_that_cannot_be_put_together():
    pieces = stacking()
    sizes = {piece.stored: index for index, piece in enumerate(pieces)}
    with pytest.raises(
        FormatError, match=r"layer.z must be made of 22 tensors such as layer.0.y; transformers could not"
    ):
        put_together(nn.Module(), "layer.z", pieces, lambda name: torch.ones(2, 1 + sizes[name]))
    with pytest.raises(FormatError, match=r"other must come out of layer.0.y; transformers made layer.z of it"):
        put_together(nn.Module(), "other", pieces, lambda name: torch.ones(2, 3))
