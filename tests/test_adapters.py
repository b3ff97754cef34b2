"""LoRA on packed models. Oracles: the dense model of the dequantized weights, the packed bytes before and after
training, and plain transformers on the merged copy.
"""

import json
import shutil
import sys

import peft
import pytest
import tiny_experts
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    ARCHITECTURES,
    BFLOAT16_ERROR,
    FLOAT32_ERROR,
    build,
    distance,
    logits,
    run,
    save,
    sensitivity,
    settings,
    tokens,
)

import ptq
from ptq import adapters, cli
from ptq.adapter_merge import PREFIX
from ptq.errors import ConfigError, PtqError
from ptq.nn import QuantLinear
from ptq.plan import make_plan

BATCH = tokens(4, 24, 3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    place = tmp_path_factory.mktemp("llama")
    parent = save(build("llama", torch.bfloat16), place / "parent")
    run(settings(parent, place / "packed", "rtn"))
    return place / "packed"


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    """A trained adapter, and the logits of the model that it was trained on."""
    model = adapted(checkpoint)
    train(model, 6)
    place = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(place)
    return place, logits(model.eval(), BATCH)


def adapted(checkpoint, dtype="auto", **options):
    torch.manual_seed(0)
    model = ptq.load(checkpoint, device="cpu", dtype=dtype)
    return peft.get_peft_model(model, adapters.lora_config(model, **{"r": 4, "lora_alpha": 16, **options}))


def train(model, steps):
    """Losses of a few steps of Adam on one batch."""
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=BATCH, labels=BATCH, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def gradients(model):
    model(input_ids=BATCH, labels=BATCH, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def frozen(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_lowers_the_loss_and_leaves_the_base_alone(checkpoint, dtype):
    model = adapted(checkpoint, dtype)
    before = frozen(model)
    assert {type(m).__name__ for n, m in model.named_modules() if n.endswith("_proj")} == {"LoraQuantLinear"}
    losses = train(model, 6)
    assert losses[-1] < 0.9 * losses[0]
    after = frozen(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)


def test_checkpointed_blocks_give_the_same_gradients(checkpoint):
    """Recomputation runs the same operations on the same numbers, so nothing may differ."""
    found = []
    for checkpointed in (False, True):
        model = adapted(checkpoint, "float32", init_lora_weights=False)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        found.append(gradients(model))
    assert len(found[0]) == 28  # A and B of 14 Linears
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


def test_a_model_with_an_adapter_has_the_gradients_of_its_dense_copy(checkpoint):
    """Every adapter's gradient, in float32, against the model with Linears of the dequantized weights, in float64.
    Tolerance: four times the error that the dense model itself has in float32."""
    model, dense, exact = (adapted(checkpoint, "float32", init_lora_weights=False) for _ in range(3))
    for layer in [*dense.modules(), *exact.modules()]:
        if isinstance(getattr(layer, "base_layer", None), QuantLinear):
            linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            linear.weight = torch.nn.Parameter(layer.base_layer.dequantize(torch.float32), requires_grad=False)
            layer.base_layer = linear
    found, near, want = (gradients(each) for each in (model, dense, exact.double()))
    for name, grad in want.items():
        assert float((found[name] - grad).norm()) <= 4 * float((near[name] - grad).norm())


def test_an_adapter_is_saved_and_loaded(checkpoint, adapter):
    place, expected = adapter
    again = adapters.load_adapter(ptq.load(checkpoint, device="cpu"), place)
    assert torch.equal(logits(again, BATCH), expected)
    fresh = next(m.layout for m in ptq.load(checkpoint, device="cpu").modules() if isinstance(m, QuantLinear))
    assert {m.layout for m in again.modules() if isinstance(m, QuantLinear)} == {fresh}
    assert not any(p.requires_grad for p in again.parameters())
    assert set(json.loads((place / "adapter_config.json").read_text())["target_modules"]) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    further = adapters.load_adapter(ptq.load(checkpoint, device="cpu"), place, trainable=True)
    losses = train(further, 3)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("dtype", "error"), [("float32", FLOAT32_ERROR), ("bfloat16", BFLOAT16_ERROR)])
def test_the_merged_copy_is_the_adapted_model(checkpoint, adapter, tmp_path, dtype, error):
    """In plain transformers. Every Linear errs by its dtype's rounding in both models."""
    from transformers import AutoModelForCausalLM

    model = adapters.load_adapter(ptq.load(checkpoint, device="cpu", dtype=dtype), adapter[0])
    out = adapters.merge(checkpoint, adapter[0], tmp_path / "merged", dtype=dtype)
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert merged.dtype == getattr(torch, dtype)
    assert not any(isinstance(module, QuantLinear) for module in merged.modules())
    found, want = logits(merged, BATCH), logits(model, BATCH)
    base = logits(model.unload(), BATCH)
    assert distance(found, want) < sensitivity(merged, BATCH, error)
    assert distance(base, want) > 4 * sensitivity(merged, BATCH, error)  # the adapter does something
    assert not (out / "quantize_config.json").exists()
    assert (out / "tokenizer.json").is_file()


@pytest.mark.parametrize(("name", "method_options"), [
    ("gpt2", {"format": "gptq"}),  # Conv1D, biases, tied head
    ("qwen2", {"format": "awq", "symmetric": False, "exclude": ["lm_head", "down_proj"]}),  # biases, float Linears
    ("llama", {"format": "compressed-tensors", "exclude": []}),  # a packed head
    ("mixtral", {"format": "gptq"}),  # experts, which transformers gathers into one parameter
    ("qwen3_moe", {"format": "gptq"}),  # and PEFT takes for it
    ("gpt_oss", {"format": "gptq"}),  # experts with biases, which transformers does not gather
    ("gpt_oss", None),  # a float checkpoint with stacks
])  # fmt: skip
def test_what_a_merge_writes_for_other_models(name, method_options, tmp_path):
    """An adapter with arbitrary numbers on every Linear but the head, float ones included."""
    base = save((build if name in ARCHITECTURES else tiny_experts.build)(name), tmp_path / "parent")
    if method_options is not None:
        run(settings(base, tmp_path / "packed", "rtn", **method_options))
        base = tmp_path / "packed"
    model = adapted(base, init_lora_weights=False, lora_alpha=1)
    layers = (
        path for path, m in model.get_base_model().named_modules() if isinstance(m, QuantLinear | torch.nn.Linear)
    )
    assert {path for path in layers if not path.endswith("base_layer") and "lora_" not in path} <= {"lm_head"}
    assert_merged(base, model, tmp_path)


def assert_merged(base, model, place):
    """The merged copy in plain transformers, of which it fills every tensor, is the model with its adapter."""
    from transformers import AutoModelForCausalLM

    model.save_pretrained(place / "adapter")
    out = adapters.merge(base, place / "adapter", place / "merged")
    merged, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    found, want = logits(merged, BATCH), logits(model.eval(), BATCH)
    assert distance(found, want) < sensitivity(merged, BATCH, FLOAT32_ERROR)


def test_trained_biases_are_merged(tmp_path):
    """Those of norms and of packed Linears without an adapter as well."""
    parent = save(build("gpt2"), tmp_path / "parent")
    run(settings(parent, tmp_path / "packed", "rtn", format="gptq"))
    model = adapted(tmp_path / "packed", init_lora_weights=False, lora_alpha=1, target_modules=["c_attn"], bias="all")
    with torch.no_grad():
        for index, (name, value) in enumerate(model.named_parameters()):
            if name.endswith("bias"):
                value += torch.randn(value.shape, generator=torch.Generator().manual_seed(index))
    assert_merged(tmp_path / "packed", model, tmp_path)


def test_a_router_is_no_linear():
    """Llama 4's is one by its class, and puts out two tensors."""
    targets = adapters.lora_config(tiny_experts.build("llama4")).target_modules
    assert any(path.endswith("q_proj") for path in targets)
    assert not any("router" in path for path in targets)


def test_an_adapter_is_switched_off_and_generates(checkpoint, adapter):
    plain = ptq.load(checkpoint, device="cpu")
    model = adapters.load_adapter(ptq.load(checkpoint, device="cpu"), adapter[0])
    with model.disable_adapter():
        assert torch.equal(logits(model, BATCH), logits(plain, BATCH))
    start = BATCH[:1, :4]
    first = model.generate(input_ids=start, max_new_tokens=1, do_sample=False)
    assert int(first[0, -1]) == int(logits(model, start)[0, -1].argmax())


@pytest.mark.parametrize("way", ["ptq", "transformers"])
def test_a_trainer_trains_it(checkpoint, tmp_path, way):
    """transformers' own loop, with blocks computed again in the backward pass; first loss: a plain forward pass."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    model = ptq.load(checkpoint, device="cpu") if way == "ptq" else AutoModelForCausalLM.from_pretrained(checkpoint)
    model = peft.get_peft_model(model, adapters.lora_config(model))
    with torch.no_grad():
        loss = float(model(input_ids=BATCH, labels=BATCH).loss)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, learning_rate=0.01, gradient_checkpointing=True, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, per_device_train_batch_size=4, logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in BATCH])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert float(losses[0]) == pytest.approx(loss, rel=2.0**-7)  # in bfloat16, and printed with four digits
    assert float(losses[-1]) < 0.95 * float(losses[0])


def test_a_configuration_of_pefts_own_is_refused_by_peft(checkpoint):
    """As the page says."""
    with pytest.raises(ValueError, match="Target module QuantLinear.* is not supported"):
        peft.get_peft_model(ptq.load(checkpoint, device="cpu"), peft.LoraConfig(target_modules=["q_proj"]))


def test_merging_in_place_is_refused(checkpoint):
    with pytest.raises(ConfigError, match="4 bits.*ptq merge"):
        adapted(checkpoint).merge_and_unload()


@pytest.mark.parametrize(("options", "message"), [
    ({"use_dora": True}, "plain LoRA: leave use_dora out, found True"),
    ({"use_qalora": True}, "plain LoRA: leave use_qalora out"),  # PEFT takes it for granted and ignores it
    ({"alora_invocation_tokens": [1]}, r"leave alora_invocation_tokens out, found \[1\]"),
    ({"monteclora_config": True}, "leave monteclora_config out"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights must be True or False or 'gaussian', found 'pissa'"),
])  # fmt: skip
def test_variants_of_lora_are_refused(checkpoint, options, message):
    with pytest.raises(ConfigError, match=message):
        adapters.lora_config(ptq.load(checkpoint, device="cpu"), **options)


def test_a_fused_model_is_refused(checkpoint):
    with pytest.raises(ConfigError, match="fuse=True: load it without"):
        adapters.lora_config(ptq.load(checkpoint, device="cpu", fuse=True))


def test_an_adapter_of_another_type_is_refused(checkpoint, tmp_path):
    peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="must be of type LORA; found IA3"):
        adapters.load_adapter(ptq.load(checkpoint, device="cpu"), tmp_path)


def test_no_adapter_there(checkpoint, tmp_path):
    with pytest.raises(ConfigError, match=r"with adapter_config\.json.*nowhere is not"):
        adapters.merge(checkpoint, tmp_path / "nowhere", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_merge_onto_the_checkpoint_is_refused(checkpoint, adapter):
    with pytest.raises(ConfigError, match="another directory than the checkpoint's"):
        adapters.merge(checkpoint, adapter[0], checkpoint, overwrite=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, r"has modules_to_save: \['lm_head'\]"),
        ({"lora_bias": True}, "has lora_bias: True"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "is over model.embed_tokens, of class Embedding"),
    ],
)
def test_an_adapter_with_more_than_products_is_not_merged(checkpoint, tmp_path, options, message):
    adapted(checkpoint, **options).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=message):
        adapters.merge(checkpoint, tmp_path / "adapter", tmp_path / "out")


def changed(settings=None, **tensors):
    """What writes a saved adapter anew with other settings or tensors, None for none."""

    def write(place):
        path = place / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **(settings or {})}))
        every = {**load_file(place / "adapter_model.safetensors"), **{f"{PREFIX}{n}": v for n, v in tensors.items()}}
        save_file({n: v for n, v in every.items() if v is not None}, place / "adapter_model.safetensors")

    return write


A_WEIGHT = "model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(("damage", "message"), [
    (lambda place: (place / "adapter_model.safetensors").unlink(), "adapter_model.bin; .* has neither"),
    (lambda place: (place / "adapter_model.safetensors").write_bytes(b"{"), "must be readable; .*SafetensorError"),
    (lambda place: (place / "adapter_config.json").write_text("{,"), "adapter_config.json must be JSON"),
    (changed({"peft_type": "X"}), "PEFT cannot read the one of .*'X'"),
    (changed({"alora_invocation_tokens": [1]}), "leave alora_invocation_tokens out"),
    (changed({"target_modules": "(a+"}), "must fit the model .*unterminated subpattern"),
    (changed({"lora_alpha": float("nan")}), "finite in the copy's bfloat16; .*proj.weight has 4096 of 4096 values"),
    (changed({"lora_alpha": 1e9}, **{A_WEIGHT: torch.full((4, 64), 1e38)}), "finite in .* model.layers.1.self_attn.q"),
    (changed(**{A_WEIGHT: torch.full((4, 64), torch.nan)}), f"finite floats; {PREFIX}{A_WEIGHT} of .* has NaN"),
    (changed(**{A_WEIGHT: torch.ones(4, 64, dtype=torch.int32)}), f"finite floats; {PREFIX}{A_WEIGHT} of .* is int32"),
    (changed(**{A_WEIGHT: torch.ones(4, 128)}), f"must fit the model.*size mismatch.*{A_WEIGHT[:-7]}"),
    (changed(**{A_WEIGHT: None}), f"it lacks 1 such as {PREFIX}{A_WEIGHT}: take"),
    (changed(**{A_WEIGHT.replace(".1.", ".2."): torch.ones(4, 64)}), "1 of its tensors have no place .*layers.2.self"),
    (changed(**{"model.embed_tokens.weight": torch.ones(288, 64)}), "brings another model.embed_tokens.weight: keep"),
])  # fmt: skip
def test_an_adapter_that_is_damaged_or_of_another_model(checkpoint, adapter, tmp_path, damage, message):
    shutil.copytree(adapter[0], tmp_path / "adapter")
    damage(tmp_path / "adapter")
    with pytest.raises(PtqError, match=message):
        adapters.merge(checkpoint, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_place_for_the_copy_is_looked_for_first(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for overwrite, message in ((False, "out exists"), (True, "no config.json")):
        with pytest.raises(ConfigError, match=message):
            adapters.merge("no/checkpoint", "no/adapter", tmp_path / "out", overwrite=overwrite)


def test_an_adapter_on_a_shared_weight_is_not_merged(tmp_path):
    parent = save(build("qwen2", torch.float32), tmp_path / "parent")
    run(settings(parent, tmp_path / "packed", "rtn"))
    adapted(tmp_path / "packed", target_modules=["lm_head"]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"lm_head\.weight is shared with another"):
        adapters.merge(tmp_path / "packed", tmp_path / "adapter", tmp_path / "out")


def test_without_peft_there_is_a_sentence(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert cli.main(["merge", str(checkpoint), "adapter", "--out", str(tmp_path / "out")]) == 2
    assert "pip install peft" in capsys.readouterr().err


def test_the_verb(checkpoint, adapter, tmp_path, capsys, recwarn):
    out = tmp_path / "merged"
    arguments = ["merge", str(checkpoint), str(adapter[0]), "--out", str(out)]
    assert cli.main([*arguments, "--dtype", "float32"]) == 0
    assert str(out) in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    assert cli.main(arguments) == 2
    assert "exists; choose another --out or pass --overwrite" in capsys.readouterr().err
    assert cli.main([*arguments, "--overwrite"]) == 0
    assert len(make_plan(settings(out, tmp_path / "again", "rtn")).targets) == 14  # a parent like any other
    assert [str(each.message) for each in recwarn if "is_gradient_checkpointing" in str(each.message)] == []


def test_a_plain_module_and_a_second_adapter():
    module = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
    ptq.quantize_linears(module, method="rtn", group_size=32)
    model = peft.get_peft_model(module, adapters.lora_config(module, r=4))
    model.add_adapter("second", adapters.lora_config(model, r=2))
    for layer in (model.base_model.model[0], model.base_model.model[2]):
        assert set(layer.lora_A) == {"default", "second"}


def test_an_adapter_with_the_names_of_transformers_4(tmp_path):
    """PEFT renames them as it reads; oracle: the adapter that was saved."""
    from test_vision_language import build as build_pair

    targets = r".*language_model.*(q_proj|v_proj)"
    made = peft.get_peft_model(build_pair("gemma3"), peft.LoraConfig(target_modules=targets, init_lora_weights=False))
    made.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    old = {name.replace(".model.language_model.", ".language_model.model."): t for name, t in load_file(file).items()}
    save_file(old, file, metadata={"format": "pt"})
    found = adapters.load_adapter(build_pair("gemma3"), tmp_path).state_dict()
    assert old
    for name, value in made.state_dict().items():
        assert "lora_" not in name or torch.equal(found[name], value)
