"""Mixtures of experts: taken apart, read, calibrated, packed, loaded.

Oracles: the fused module of transformers; the model's own logits; a dense copy with the dequantized weights.
"""

import json
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from tiny_models import (
    FLOAT32_ERROR,
    GROUPED,
    distance,
    divergence,
    held_out,
    logits,
    randomize,
    run,
    save,
    sensitivity,
    settings,
    tokens,
)
from torch import nn

import ptq
from ptq.calibration.capture import InputGroup, collect, trace_groups
from ptq.config import AWQConfig, SchemeOverride
from ptq.errors import ConfigError, FormatError, UnsupportedModelError
from ptq.evaluate import streamed
from ptq.formats.checkpoint import CheckpointReader
from ptq.gptq.block import stages
from ptq.models.conversion import Conversions, put_together
from ptq.models.experts import UnfusedExperts, experts_of, routers, unfuse_experts
from ptq.models.structure import linears, set_weight
from ptq.nn import QuantLinear
from ptq.plan import estimate_size, make_plan
from ptq.runtime import open_checkpoint, open_stream

CPU = torch.device("cpu")
BATCH = tokens(4, 48, 9)
EXPERTS = 4
USUAL = {**GROUPED, "intermediate_size": 64, "num_experts_per_tok": 2}
MLA = {
    **USUAL,
    "num_key_value_heads": 4,
    "n_routed_experts": EXPERTS,
    "moe_intermediate_size": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
}
CONFIGS = {
    "mixtral": ("MixtralConfig", {**USUAL, "num_local_experts": EXPERTS}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**USUAL, "num_experts": EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {**USUAL, "num_experts": EXPERTS, "moe_intermediate_size": 32, "head_dim": 16}),
    "deepseek_v2": ("DeepseekV2Config", MLA),
    "deepseek_v3": ("DeepseekV3Config", {**MLA, "n_group": 2, "topk_group": 1}),
    "gpt_oss": ("GptOssConfig", {**USUAL, "num_local_experts": EXPERTS, "head_dim": 16}),
    "llama4": (
        "Llama4TextConfig",
        {**USUAL, "num_local_experts": EXPERTS, "intermediate_size_mlp": 64, "head_dim": 16},
    ),
}  # fmt: skip
NAMED = {  # the tensor of an expert's up projection as a checkpoint spells it
    "mixtral": "model.layers.1.block_sparse_moe.experts.3.w3",
    "qwen3_moe": "model.layers.1.mlp.experts.3.up_proj",
    "deepseek_v3": "model.layers.1.mlp.experts.3.up_proj",
    "gpt_oss": "model.layers.1.mlp.experts.3.up_proj",
}


def build(name, **changes):
    import transformers

    config, options = CONFIGS[name]
    made = getattr(transformers, config)(**{**options, **changes}, dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        flat = {}
        for key, parameter in model.named_parameters():
            if parameter.dim() == 3 or key.endswith("proj_bias"):  # not what `randomize` knows
                scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 3 else 0.1
                flat[key] = torch.randn(parameter.shape, generator=generator) * scale
        randomize(without(model, flat))
        model.load_state_dict(flat, strict=False)
    return model


def without(model, names):
    """The same parameters but some, as something that has named_parameters and get_submodule."""
    rest = [(key, p) for key, p in model.named_parameters() if key not in names]
    return SimpleNamespace(named_parameters=lambda: rest, get_submodule=model.get_submodule)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("moe")

    @cache
    def directory(name, method=None):
        output = root / f"{name}-{method}"
        if method is None:
            return save(build(name), output)
        run(settings(directory(name), output, method, awq=AWQConfig(grid=4)))
        return output

    return directory


def rows(directory):
    return json.loads((directory / "report.json").read_text())["modules"]


@pytest.mark.parametrize("name", CONFIGS)
def test_taken_apart_it_computes_the_same(name):
    model = build(name)
    model.set_experts_implementation("eager") if name != "llama4" else None
    before, allowed = logits(model, BATCH), sensitivity(model, BATCH, FLOAT32_ERROR)
    unfuse_experts(model)
    assert len(experts_of(model)) == (1 if name.startswith("deepseek") else 2)
    assert distance(logits(model, BATCH), before) <= allowed


@pytest.mark.parametrize("name", CONFIGS)
def test_streamed_and_loaded_logits_are_the_models_own(name, made):
    model = build(name)
    allowed = sensitivity(model, BATCH, FLOAT32_ERROR)
    (found,) = streamed(open_stream(open_checkpoint(made(name)), CPU))([BATCH])
    assert distance(found, logits(model, BATCH)) <= allowed
    assert distance(logits(ptq.load(made(name), device="cpu"), BATCH), logits(model, BATCH)) <= allowed


def dense(loaded, parent):
    """The parent with the weights of a loaded quantized model."""
    model = ptq.load(parent, device="cpu")
    packed = {path: module for path, module in loaded.named_modules() if isinstance(module, QuantLinear)}
    for path, module in linears(model):
        if path in packed:
            set_weight(module, packed.pop(path).dequantize(torch.float32))
    assert not packed
    model.load_state_dict(loaded.state_dict(), strict=False)
    return model


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_computes_the_dequantized_weights_and_loses_less_than_rounding(name, method, made):
    loaded = ptq.load(made(name, method), device="cpu")
    parent = ptq.load(made(name), device="cpu")
    want = dense(loaded, made(name))
    assert distance(logits(loaded, BATCH), logits(want, BATCH)) <= sensitivity(want, BATCH, FLOAT32_ERROR)
    # every Linear of every expert is packed, and no router is
    for experts in experts_of(loaded).values():
        assert all(
            isinstance(linear, QuantLinear) for index in range(EXPERTS) for linear in experts.expert(index).children()
        )
    assert not [module for module in routers(loaded).values() if isinstance(module, QuantLinear)]
    report = rows(made(name, method))
    assert sum(".experts." in path for path in report) == 3 * EXPERTS * len(experts_of(loaded))
    # a mean over Linears: single experts of few tokens may be no better than rounded ones
    assert sum(row["loss_to_rounding"] for row in report.values()) < 0.8 * len(report)
    text = held_out(4, 48)
    kl = {
        m: divergence(logits(parent, text), logits(ptq.load(made(name, m), device="cpu"), text))
        for m in ("rtn", method)
    }
    assert kl[method] < 0.9 * kl["rtn"]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_loaded_model_generates(name, made):
    loaded = ptq.load(made(name, "rtn"), device="cpu")
    prompt = tokens(1, 6)
    found = loaded.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert found.shape == (1, 10)


@pytest.mark.parametrize("name", CONFIGS)
def test_gptq_leaves_the_bytes_of_everything_else(name, made):
    parent, result = CheckpointReader(made(name)), CheckpointReader(made(name, "gptq"))
    for key in set(parent.names()) & set(result.names()):
        assert torch.equal(parent.tensor(key), result.tensor(key))
    gone = set(parent.names()) - set(result.names())
    assert not [key for key in gone if "norm" in key or "router" in key or "gate." in key or "embed" in key]
    assert gone


@pytest.mark.parametrize("name", NAMED)
def test_experts_are_named_one_by_one_as_engines_read_them(name, made):
    names = CheckpointReader(made(name, "gptq")).names()
    assert {f"{NAMED[name]}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")} <= set(names)
    assert not [key for key in names if key.endswith("gate_up_proj")]
    # GPT-OSS has biases, which are then one by one as well
    assert (f"{NAMED[name]}.bias" in names) == (name == "gpt_oss")


def test_routers_are_excluded_in_the_configuration(made):
    quantization = json.loads((made("qwen2_moe", "gptq") / "config.json").read_text())["quantization_config"]
    skipped = [rule for rule in quantization["dynamic"] if rule.startswith("-:")]
    assert any("mlp\\.gate" in rule for rule in skipped)
    assert any("shared_expert_gate" in rule for rule in skipped)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_awq_scales_the_router_with_the_experts(name, made):
    """One norm feeds router, shared expert and experts; each down projection is fed by its own up projection."""
    found = {path.partition("layers.1.")[2]: row["fold"] for path, row in rows(made(name, "awq")).items()}
    folds = {path: fold for path, fold in found.items() if path.startswith("mlp")}
    for path, fold in folds.items():
        if path.endswith("down_proj"):
            assert fold == path.replace("down_proj", "up_proj")
        else:
            assert fold == "post_attention_layernorm"
    loaded, parent = ptq.load(made(name, "awq"), device="cpu"), ptq.load(made(name), device="cpu")
    for path, router in routers(loaded).items():
        scales = router.weight / routers(parent)[path].weight
        assert not torch.allclose(scales[0], torch.ones(()))
        # one factor a column, exact but for the rounding of the products to float32
        torch.testing.assert_close(scales, scales[:1].expand_as(scales), rtol=1e-5, atol=0)


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
    groups = trace_groups(linear, runs[0])
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


def test_starved_experts_are_counted_in_the_report(tmp_path):
    """A router that looks at nothing sends every token to the first two experts."""
    model = build("mixtral", num_hidden_layers=1)
    with torch.no_grad():
        for router in routers_of(model):
            router.weight.zero_()
    run(settings(save(model, tmp_path / "parent"), tmp_path / "out", "gptq"))
    report = {path: row for path, row in rows(tmp_path / "out").items() if ".experts." in path}
    total = 8 * 48
    assert all(row["tokens"] == total for row in report.values())
    assert sorted(row["routed"] for row in report.values()) == [0] * 6 + [total] * 6
    assert all(row["loss_to_rounding"] < 1 for row in report.values())


def routers_of(model):
    return [layer.mlp.gate for layer in model.model.layers]


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


def test_a_convolution_is_no_stack_of_experts():
    model = nn.Sequential(nn.Conv1d(16, 16, 16))
    unfuse_experts(model)
    assert not isinstance(model[0], UnfusedExperts)


def test_overrides_cannot_reach_a_router(made, tmp_path):
    config = settings(made("qwen2_moe"), tmp_path / "out", overrides={"*shared_expert_gate": SchemeOverride(bits=8)})
    with pytest.raises(ConfigError, match=r"and no routers; .*shared_expert_gate is none of these: take it out of"):
        make_plan(config)


def test_an_experts_tensor_that_is_missing(made, tmp_path):
    from safetensors.torch import load_file, save_file

    parent = save(build("mixtral"), tmp_path / "parent")
    file = parent / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.block_sparse_moe.experts.2.w1.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"model.layers.0.mlp.experts.2.gate_proj.weight is missing"):
        make_plan(settings(parent, tmp_path / "out"))


def test_experts_left_in_float_keep_their_tensors(made, tmp_path):
    for name in ("mixtral", "gpt_oss"):
        run(settings(made(name), tmp_path / name, "rtn", exclude=("lm_head", "*.experts.*")))
        parent, result = CheckpointReader(made(name)), CheckpointReader(tmp_path / name)
        for key in (key for key in parent.names() if ".experts." in key):
            assert torch.equal(parent.tensor(key), result.tensor(key))
        assert distance(logits(ptq.load(tmp_path / name, device="cpu"), BATCH), logits(build(name), BATCH)) < torch.inf


def test_one_expert_left_in_float_where_the_parent_has_a_stack(made, tmp_path):
    run(settings(made("gpt_oss"), tmp_path / "out", "rtn", exclude=("lm_head", "model.layers.0.mlp.experts.1.*")))
    names = CheckpointReader(tmp_path / "out").names()
    assert "model.layers.0.mlp.experts.1.up_proj.weight" in names
    assert "model.layers.0.mlp.experts.0.up_proj.qweight" in names
    loaded, parent = ptq.load(tmp_path / "out", device="cpu"), ptq.load(made("gpt_oss"), device="cpu")
    path = "model.layers.0.mlp.experts.1.gate_proj.weight"
    assert torch.equal(loaded.get_parameter(path), parent.get_parameter(path))
    # gate and up alternate in the stack
    stack = CheckpointReader(made("gpt_oss")).tensor("model.layers.0.mlp.experts.gate_up_proj")
    assert torch.equal(loaded.get_parameter(path), stack[1].T[::2])


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_the_size_is_known_before(name, made, tmp_path):
    """Oracle: the tensors of the result, without the headers of its files."""
    size = estimate_size(make_plan(settings(made(name), tmp_path / "out", "rtn"))).after
    reader = CheckpointReader(made(name, "rtn"))
    assert size == sum(reader.tensor(key).nbytes for key in reader.names())


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


@pytest.mark.parametrize("transposed", [False, True])
def test_a_stack_that_is_stored_either_way_round(transposed, tmp_path):
    """Qwen3-VL-MoE's files hold ``[E, K, N]`` where transformers has ``[E, N, K]``; its conversion says which it is."""
    from safetensors.torch import load_file, save_file
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    text = {**USUAL, "moe_intermediate_size": 32, "num_experts": EXPERTS, "head_dim": 16}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
    vision |= {"patch_size": 4, "deepstack_visual_indexes": [0]}
    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision)).eval()
    file = save(model, tmp_path) / "model.safetensors"
    tensors = load_file(file)
    if transposed:
        tensors = {k: v.transpose(1, 2).contiguous() if ".experts.down_proj" in k else v for k, v in tensors.items()}
        save_file(tensors, file, metadata={"format": "pt"})
    loaded = ptq.load(tmp_path, device="cpu")
    want = model.model.language_model.layers[0].mlp.experts.down_proj[1]
    assert torch.equal(loaded.model.language_model.layers[0].mlp.experts.expert(1).down_proj.weight, want)
