"""Mixtures of experts: taken apart, read, calibrated, packed, loaded.

Oracles: the fused module of transformers; the model's own logits; a dense copy with the dequantized weights.
"""

import json
from functools import cache

import pytest
import torch
from tiny_experts import CONFIGS, EXPERTS, USUAL, build
from tiny_models import (
    FLOAT32_ERROR,
    distance,
    divergence,
    held_out,
    logits,
    run,
    save,
    sensitivity,
    settings,
    tokens,
)

import ptq
from ptq.config import AWQConfig, SchemeOverride
from ptq.errors import ConfigError, FormatError
from ptq.evaluate import streamed
from ptq.formats.checkpoint import CheckpointReader
from ptq.models.experts import experts_of, routers, unfuse_experts
from ptq.models.structure import linears, set_weight
from ptq.nn import QuantLinear
from ptq.plan import make_plan
from ptq.plan_size import estimate_size
from ptq.runtime import open_checkpoint, open_stream

CPU = torch.device("cpu")
BATCH = tokens(4, 48, 9)
NAMED = {  # the tensor of an expert's up projection as a checkpoint spells it
    "mixtral": "model.layers.1.block_sparse_moe.experts.3.w3",
    "qwen3_moe": "model.layers.1.mlp.experts.3.up_proj",
    "deepseek_v3": "model.layers.1.mlp.experts.3.up_proj",
    "gpt_oss": "model.layers.1.mlp.experts.3.up_proj",
}


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
    found = torch.stack([*streamed(open_stream(open_checkpoint(made(name)), CPU))([BATCH])])
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
