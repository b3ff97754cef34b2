"""GPTQ and AWQ from a parent on disk to a checkpoint that runs, for every architecture.

Oracle: the dense model of transformers with the dequantized weights put in.
"""

import copy
import json
from functools import cache

import pytest
import tiny_models
import torch
from tiny_models import (
    ARCHITECTURES,
    BFLOAT16_ERROR,
    FLOAT32_ERROR,
    INT4_ERROR,
    build,
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
from torch import nn

import ptq
from ptq.awq.fold import apply_fold, find_folds
from ptq.calibration.capture import trace_groups
from ptq.formats.checkpoint import CheckpointReader
from ptq.models.structure import linears, set_weight
from ptq.nn import QuantLinear
from ptq.runtime import quant_linears

BATCH = tokens(4, 48, 9)  # 192 rows: CPU kernels then multiply the weight rounded once to the dtype of the rows
ALL = list(ARCHITECTURES)

# Linear of a block -> where AWQ folds the scales of its input; None: nothing can take them.
LLAMA = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "self_attn.o_proj": "self_attn.v_proj",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp.up_proj",
}
FOLDS: dict[str, dict[str, str | None]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,  # the norms of q and k come after them and take nothing
    "gemma2": LLAMA | dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), "pre_feedforward_layernorm"),
    "phi3": {
        "self_attn.qkv_proj": "input_layernorm",
        "self_attn.o_proj": "self_attn.qkv_proj",  # the rows of v
        "mlp.gate_up_proj": "post_attention_layernorm",
        "mlp.down_proj": "mlp.gate_up_proj",  # the rows of up
    },
    "opt": {
        "self_attn.q_proj": "self_attn_layer_norm",
        "self_attn.k_proj": "self_attn_layer_norm",
        "self_attn.v_proj": "self_attn_layer_norm",
        "self_attn.out_proj": "self_attn.v_proj",
        "fc1": "final_layer_norm",
        "fc2": "fc1",  # ReLU passes a positive factor on
    },
    "gpt2": {
        "attn.c_attn": "ln_1",
        "attn.c_proj": "attn.c_attn",
        "mlp.c_fc": "ln_2",
        "mlp.c_proj": None,  # GELU does not
    },
    "gpt_neox": {
        "attention.query_key_value": "input_layernorm",
        "attention.dense": "attention.query_key_value",  # the rows of v, head by head
        "mlp.dense_h_to_4h": "post_attention_layernorm",
        "mlp.dense_4h_to_h": None,
    },
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Directory of a parent (method None) or of what a method makes of it, each once."""
    root = tmp_path_factory.mktemp("models")

    @cache
    def directory(name, method, dtype):
        output = root / f"{name}-{method}-{dtype}"
        if method is None:
            return save(build(name, dtype), output)
        run(settings(directory(name, None, dtype), output, method))
        return output

    return lambda name, method=None, dtype=torch.float32: directory(name, method, dtype)


def dense(name, loaded, parent, dtype=torch.float32):
    """The parent in transformers with the weights, norms and biases of a loaded quantized model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(parent, dtype=dtype).eval()
    packed = {path: module for path, module in loaded.named_modules() if isinstance(module, QuantLinear)}
    for path, module in linears(model):
        if path in packed:
            set_weight(module, packed.pop(path).dequantize(torch.float32))
    assert not packed
    floats = {key: value for key, value in loaded.state_dict().items() if key in dict(model.named_parameters())}
    model.load_state_dict(floats, strict=False)
    return model


def unpacked(loaded):
    """A loaded model with nn.Linear (or Conv1D's product) in place of every QuantLinear."""
    model = copy.deepcopy(loaded)
    for path, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight = nn.Parameter(module.dequantize(torch.float32).to(loaded.dtype), requires_grad=False)
            linear.bias = module.bias
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linear)
    return model


HALF = ["llama", "gemma2", "gpt2", "gpt_neox"]


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, torch.float32) for name in ALL] + [(name, torch.bfloat16) for name in HALF], ids=str
)
def test_gptq_gives_a_checkpoint_that_computes_the_dequantized_weights(name, dtype, made):
    loaded = ptq.load(made(name, "gptq", dtype), device="cpu")
    expected = dense(name, loaded, made(name, None, dtype), dtype)
    assert {path for path, _ in linears(loaded)} == {path for path, _ in linears(expected) if "." not in path}
    with_linears = logits(unpacked(loaded), BATCH)
    want = logits(expected, BATCH)
    allowed = sensitivity(expected, BATCH, FLOAT32_ERROR if dtype == torch.float32 else BFLOAT16_ERROR)
    if name == "gpt2":  # Conv1D adds its bias first, nn.Linear last
        assert distance(with_linears, want) <= allowed
    else:
        assert torch.equal(with_linears, want)
    assert distance(logits(loaded, BATCH), want) <= allowed


@pytest.mark.parametrize("name", ALL)
def test_what_is_not_quantized_keeps_its_bytes(name, made):
    parent, result = CheckpointReader(made(name)), CheckpointReader(made(name, "gptq"))
    kept = set(parent.names()) & set(result.names())
    replaced = {name.removesuffix(".weight") for name in set(parent.names()) - kept}
    assert {key.rpartition(".")[0] for key in set(result.names()) - kept} == replaced
    assert all(key.endswith(".weight") for key in set(parent.names()) - kept)
    for key in kept:
        assert parent.spec(key) == result.spec(key)
        assert torch.equal(parent.tensor(key).view(torch.uint8), result.tensor(key).view(torch.uint8))


@pytest.mark.parametrize("name", ALL)
def test_calibrated_codes_lose_less_than_rounding(name, made):
    """KL divergence to the parent on text not seen in calibration; the parents have strong outlier channels."""
    batch = held_out(8, 48)
    parent = logits(ptq.load(made(name), device="cpu"), batch)
    kl = {method: divergence(parent, logits(ptq.load(made(name, method), device="cpu"), batch))
          for method in ("rtn", "gptq", "awq")}  # fmt: skip
    assert kl["gptq"] < 0.9 * kl["rtn"]
    assert kl["awq"] < 0.9 * kl["rtn"]


@pytest.mark.parametrize("name", ALL)
def test_awq_folds_are_the_ones_expected(name, made):
    rows = json.loads((made(name, "awq") / "report.json").read_text())["modules"]
    blocks = ARCHITECTURES[name].blocks
    for index in range(2):
        prefix = f"{blocks}.{index}."
        found = {path.removeprefix(prefix): row["fold"] for path, row in rows.items() if path.startswith(prefix)}
        assert found == FOLDS[name]
    assert all(row["rescues"] == [] for row in rows.values())


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_folds_leave_the_logits_as_they_are(name):
    """Random scales go through every fold of every block; the whole float32 model must not notice."""
    model = build(name)
    before, noise = logits(model, BATCH), sensitivity(model, BATCH, FLOAT32_ERROR)
    generator = torch.Generator().manual_seed(0)
    for block in model.get_submodule(ARCHITECTURES[name].blocks):
        call = []
        handle = block.register_forward_pre_hook(lambda _m, a, k, call=call: call.append((a, k)), with_kwargs=True)
        logits(model, BATCH)
        handle.remove()
        args, kwargs = call[0]

        def probe(stand_in, args=args, kwargs=kwargs):
            output = stand_in(*args, **kwargs)
            return output[0] if isinstance(output, tuple) else output

        groups = trace_groups(dict(linears(block)), [lambda block=block, probe=probe: probe(block)])
        folds = find_folds(block, groups, probe)
        assert {member: fold.producer for fold in folds for member in fold.consumers} == {
            member: producer for member, producer in FOLDS[name].items() if producer is not None
        }
        for fold in folds:
            spread = torch.rand(int(fold.rows.max()) + 1, generator=generator).add_(0.5)
            apply_fold(block, fold, spread[fold.rows])
    assert distance(logits(model, BATCH), before) <= noise


@pytest.mark.parametrize("name", ALL)
def test_awq_gives_a_checkpoint_that_loads(name, made):
    loaded = ptq.load(made(name, "awq"), device="cpu")
    want = dense(name, loaded, made(name))
    assert distance(logits(loaded, BATCH), logits(want, BATCH)) <= sensitivity(want, BATCH, FLOAT32_ERROR)


@pytest.mark.parametrize("name", ALL)
def test_a_loaded_model_generates(name, made):
    loaded = ptq.load(made(name, "gptq"), device="cpu")
    prompt = tokens(1, 6)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    found = loaded.generate(prompt, **options)
    assert found.shape == (1, 14)
    # Greedy decoding by hand, without a cache.
    for _ in range(8):
        scores = logits(loaded, prompt)[:, -1]
        scores[:, 257] = -torch.inf
        prompt = torch.cat([prompt, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, prompt)


@pytest.mark.parametrize("name", ALL)
def test_a_float_checkpoint_loads_as_transformers_loads_it(name, made):
    from transformers import AutoModelForCausalLM

    found, expected = ptq.load(made(name), device="cpu"), AutoModelForCausalLM.from_pretrained(made(name)).eval()
    assert torch.equal(logits(found, BATCH), logits(expected, BATCH))
    assert found.config.to_dict() == {**expected.config.to_dict(), "_name_or_path": found.config._name_or_path}
    assert not found.training
    assert not any(p.requires_grad for p in found.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 4])
def test_implementations_agree(dtype, rows, made):
    """16 bfloat16 rows take torch's int4 operator, 64 do not; float32 rows never do."""
    batch = tokens(rows, 16, 3)
    outputs = {}
    for impl in ("reference", "cpu"):
        loaded = ptq.load(made("llama", "gptq", dtype), device="cpu", impl=impl)
        assert {module.impl for module in quant_linears(loaded)} == {impl}
        outputs[impl] = logits(loaded, batch)
    model = dense("llama", loaded, made("llama", None, dtype), dtype)
    allowed = sensitivity(model, batch, FLOAT32_ERROR if dtype == torch.float32 else INT4_ERROR)
    assert distance(outputs["reference"], outputs["cpu"]) <= allowed


def test_configurations_come_along(tmp_path):
    from transformers import GenerationConfig

    parent = save(build("llama"), tmp_path / "parent")
    GenerationConfig(temperature=0.25, do_sample=True, top_k=7, eos_token_id=257).save_pretrained(parent)
    run(settings(parent, tmp_path / "out", "rtn"))
    loaded = ptq.load(tmp_path / "out", device="cpu")
    assert (loaded.generation_config.temperature, loaded.generation_config.top_k) == (0.25, 7)
    assert loaded.config.hidden_size == 64
    assert loaded.config.dtype == torch.float32
    assert loaded.config.num_key_value_heads == 2
    assert loaded.config.vocab_size == tiny_models.VOCABULARY
    assert ptq.load(tmp_path / "out", device="cpu", dtype="bfloat16").dtype == torch.bfloat16
