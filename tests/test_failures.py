"""What goes wrong with a model's files and numbers ends in a sentence that names the place, and leaves no output."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TEXT, build, run, save, settings, tokens

import ptq
from ptq.config import EvaluationConfig, SchemeOverride
from ptq.errors import ConfigError, DataError, FormatError, NumericsError, PtqError, UnsupportedModelError
from ptq.evaluation import evaluate_checkpoint
from ptq.formats.checkpoint import CheckpointReader
from ptq.inspection import inspect
from ptq.journal_directory import run_directory
from ptq.models.loading import build_skeleton, load_module, load_tokenizer, locate, read_config
from ptq.models.names import SourceNames
from ptq.plan import check_context, make_plan, resolve_device
from ptq.runtime import open_checkpoint

WEIGHT = "model.layers.1.mlp.up_proj.weight"
METHODS = ["rtn", "gptq", "awq"]


@pytest.fixture
def parent(tmp_path):
    return save(build("llama"), tmp_path / "parent")


def change(directory, alter):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    alter(tensors)
    save_file(tensors, file, {"format": "pt"})


def refuse(error, pattern, config):
    """The run fails with this sentence and leaves nothing of its output."""
    with pytest.raises(error, match=pattern) as caught:
        run(config)
    assert isinstance(caught.value, PtqError)
    output = Path(config.output)
    assert not [path for path in output.parent.iterdir() if output.name in path.name]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [WEIGHT, "model.layers.0.input_layernorm.weight", "model.norm.weight"])
def test_nan_in_a_weight(name, method, parent, tmp_path):
    change(parent, lambda tensors: tensors[name].view(-1)[3:5].fill_(torch.nan))
    pattern = re.escape(f"{name} must be finite; 2 of") + ".* values are NaN or infinite"
    refuse(NumericsError, pattern, settings(parent, tmp_path / "out", method))


@pytest.mark.parametrize("method", METHODS)
def test_infinity_in_the_head(method, parent, tmp_path):
    change(parent, lambda tensors: tensors["lm_head.weight"][0, 0].fill_(torch.inf))
    refuse(NumericsError, "lm_head.weight must be finite", settings(parent, tmp_path / "out", method, exclude=()))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_activations_that_overflow_float16(method, parent, tmp_path):
    """Finite weights; the product of gate and up leaves float16's range."""
    for name in ("gate_proj", "up_proj"):
        change(parent, lambda tensors, name=name: tensors[f"model.layers.0.mlp.{name}.weight"].mul_(400))
    config = settings(parent, tmp_path / "out", method, dtype="float16")
    refuse(NumericsError, "input of model.layers.0.mlp.down_proj holds NaN or infinity.*bfloat16", config)


def test_a_truncated_shard(parent, tmp_path):
    file = parent / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refuse(FormatError, "model.safetensors is truncated or damaged", settings(parent, tmp_path / "out"))


def test_a_missing_shard(tmp_path):
    parent = save(build("llama"), tmp_path / "parent", max_shard_size="60KB")
    missing = sorted(parent.glob("*.safetensors"))[1]
    missing.unlink()
    refuse(FormatError, f"1 of them are not in .*{missing.name}", settings(parent, tmp_path / "out"))


def test_a_missing_tensor(parent, tmp_path):
    change(parent, lambda tensors: tensors.pop(WEIGHT))
    refuse(FormatError, f"{WEIGHT} is missing; the nearest name in it is model", settings(parent, tmp_path / "out"))


@pytest.mark.parametrize("name", [WEIGHT, "model.norm.weight"])
def test_a_wrong_shape(name, parent, tmp_path):
    change(parent, lambda tensors: tensors.update({name: torch.zeros(3, 5)}))
    pattern = rf"{name} must have the model's shape .*; the checkpoint has \(3, 5\)"
    refuse(FormatError, pattern, settings(parent, tmp_path / "out", "rtn"))


@pytest.mark.parametrize("form", ["gptq", "awq", "compressed-tensors"])
def test_packed_tensors_that_do_not_fit(form, parent, tmp_path):
    """Of another module, or absent: named when the model is loaded."""
    run(settings(parent, tmp_path / "out", "rtn", format=form))
    module, other = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"

    def swap(tensors):
        for name in [name for name in tensors if name.startswith(f"{module}.")]:
            tensors[name] = tensors[name.replace(module, other)].clone()

    change(tmp_path / "out", swap)
    with pytest.raises(FormatError, match=f"{module} must be a packed 64 x 128 weight; .*128, 64"):
        ptq.load(tmp_path / "out", device="cpu")
    change(tmp_path / "out", lambda tensors: [tensors.pop(name) for name in list(tensors) if f"{module}." in name])
    with pytest.raises(FormatError, match=re.escape(module)):
        ptq.load(tmp_path / "out", device="cpu")


@pytest.mark.parametrize("place", ["parent", "parent/deeper/out", "."])
@pytest.mark.parametrize("check", [run, make_plan])
def test_an_output_among_the_models_files(place, check, parent, tmp_path):
    """Overwriting would delete the parent."""
    before = sorted(path.name for path in parent.iterdir())
    config = settings(parent, tmp_path / place)
    with pytest.raises(ConfigError, match="output must be a directory apart from the model's"):
        check(config, overwrite=True) if check is run else check(config)
    assert sorted(path.name for path in parent.iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"exclude": ("up_prj",)}, "'up_prj' matches none: did you mean up_proj"),
        *(
            (
                {"exclude": (pattern,)},
                r"Patterns are no regular expressions: write names as they stand in the path \(mlp",
            )
            for pattern in ("re:.*mlp.*", ".*mlp.*", r"model\.layers\.0", "^model", "(q|k)_proj", "down_proj$", "mlp.+")
        ),
        ({"overrides": {"vision.*": SchemeOverride(bits=8)}}, "'vision.*' matches none"),
        ({"exclude": ("*",)}, "exclude rules out all 15"),
        ({"group_size": 48}, "group_size must be -1 or divide in_features 64, found 48"),
        ({"symmetric": False}, "gptq cannot hold 4-bit asymmetric"),
        ({"device": "cuda:99"}, "device cuda:99 must exist; this machine has"),
        ({"evaluation": EvaluationConfig(files=("x",), window=256)}, "evaluation.window must be at most .* 128 tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_that_does_not_fit_the_model(changes, sentence, parent, tmp_path):
    refuse(ConfigError, sentence.replace("*'", r"\*'"), settings(parent, tmp_path / "out", **changes))


def test_a_context_that_is_too_short(tmp_path):
    parent = save(build("llama", max_position_embeddings=32), tmp_path / "parent")
    refuse(ConfigError, "calibration.sequence_length must be at most .* 32 tokens", settings(parent, tmp_path / "out"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_window_beyond_the_context(name, tmp_path):
    parent = save(build(name), tmp_path / "parent")
    with pytest.raises(ConfigError, match="--window must be at most the model's context of 128 tokens; found 512"):
        evaluate_checkpoint(str(parent), None, EvaluationConfig(files=(str(TEXT),)), device="cpu")


def test_the_context_of_mpt():
    from transformers import MptConfig

    check_context(MptConfig(max_seq_len=64), "--window", 64)
    with pytest.raises(ConfigError, match="context of 64 tokens; found 65"):
        check_context(MptConfig(max_seq_len=64), "--window", 65)


def test_a_tokenizer_of_another_model(tmp_path):
    parent = save(build("llama", vocab_size=64, bos_token_id=1, eos_token_id=2), tmp_path / "parent")
    pattern = "token ids must be below the model's vocabulary size of 64, found"
    refuse(DataError, pattern, settings(parent, tmp_path / "out"))
    text = EvaluationConfig(files=(str(TEXT),), window=64, stride=64)
    with pytest.raises(DataError, match=pattern):
        evaluate_checkpoint(str(parent), None, text, device="cpu")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": "64"}, "Field 'hidden_size' expected int, got str"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, r"hidden size \(64\) is not a multiple"),
        ({"hidden_act": "nope"}, "there is no 'nope'"),
        ({"dtype": "nope"}, "module 'torch' has no attribute 'nope'"),
        ({"dtype": "int8"}, "the dtype in config.json must be one of bfloat16, .* found 'int8'"),
        ({"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}}, "there is no 'nope'"),
        ({"vocab_size": -3}, "negative dimension -3"),
        ({"pad_token_id": 288}, "Padding_idx must be within num_embeddings"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_values_in_config_json_that_make_no_model(changes, said, parent, tmp_path):
    file = parent / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    refuse(FormatError, f"config.json must .*{said}|{said}", settings(parent, tmp_path / "out"))


@pytest.mark.parametrize(("text", "said"), [
    ("[1]", "config.json must hold a JSON object, found list: fetch or write it again"),
    ("[" * 99999, "config.json must be JSON: maximum recursion depth"),
    ('{"model_type": "llama", "a": ' + "[" * 700 + "]" * 700 + "}", "config.json must .*maximum recursion depth"),
])  # fmt: skip
def test_a_config_json_that_holds_no_configuration(text, said, parent):
    (parent / "config.json").write_text(text)
    with pytest.raises(FormatError, match=said):
        read_config(parent)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["[]", "[" * 99999], ids=["list", "deep"])
def test_a_tokenizer_that_is_a_list(name, text, parent):
    (parent / name).write_text(text)
    with pytest.raises(FormatError, match="must be a tokenizer's; transformers found: .*: fetch both again"):
        load_tokenizer(parent, False)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((WEIGHT, dtype) for dtype in (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)),
        *(("model.embed_tokens.weight", torch.int8), ("model.norm.weight", torch.int32)),
    ],
)
def test_codes_where_the_model_has_floats(name, dtype, parent, tmp_path):
    change(parent, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    pattern = f"{name} must hold floating-point numbers of 16 bits or more; the checkpoint has {dtype}"
    refuse(FormatError, pattern, settings(parent, tmp_path / "out", "rtn"))
    with pytest.raises(FormatError, match=pattern):
        ptq.load(parent, device="cpu")


def test_integer_buffers_stay_integers(parent, tmp_path):
    """Such as BatchNorm's counter of batches."""
    checkpoint = open_checkpoint(parent)
    checkpoint.model.model.norm.register_buffer("counted", torch.tensor(0))
    change(parent, lambda tensors: tensors.update({"model.norm.counted": torch.tensor(7)}))
    reader = CheckpointReader(parent)
    names = SourceNames(checkpoint.model, reader.names())
    load_module(checkpoint.model, "model.norm", reader, names, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert checkpoint.model.model.norm.counted.item() == 7
    assert checkpoint.model.model.norm.counted.dtype == torch.int64


def test_dtypes_by_name_and_as_torch_has_them(parent):
    assert ptq.load(parent, device="cpu", dtype=torch.float16).dtype == torch.float16
    assert ptq.load(parent, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    for dtype in ("nope", torch.int8, "Tensor"):
        with pytest.raises(ConfigError, match="dtype must be auto, bfloat16, float16, float32, float64 or the torch"):
            ptq.load(parent, device="cpu", dtype=dtype)


def test_packed_layers_in_float64(tmp_path):
    """Refused before a weight is read. Oracle: the float model runs in float64, and the packed one in float32."""
    from transformers import AutoModelForCausalLM

    source = save(build("llama", torch.float64), tmp_path / "parent")
    assert ptq.load(source, device="cpu")(tokens(1, 4)).logits.dtype == torch.float64
    run(settings(source, tmp_path / "out", "rtn", dtype="float32"))
    config = tmp_path / "out" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float32"', '"dtype": "float64"'))
    text = EvaluationConfig(files=(str(TEXT),), tokens=64, window=32, stride=32)
    refused = [
        lambda: ptq.load(tmp_path / "out", device="cpu"),  # what config.json says
        lambda: ptq.load(tmp_path / "out", device="cpu", dtype=torch.float64),
        lambda: ptq.load(source, device="cpu", dtype="float64", head_bits=8),
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64),
        lambda: evaluate_checkpoint(str(tmp_path / "out"), None, text, device="cpu"),
        lambda: make_plan(settings(source, tmp_path / "other", "rtn")),
    ]
    for call in refused:
        with pytest.raises(ConfigError, match=r"compute in bfloat16, float16, float32; the dtype .* is float64: set"):
            call()
    assert ptq.load(tmp_path / "out", device="cpu", dtype="float32")(tokens(1, 4)).logits.dtype == torch.float32


@pytest.mark.parametrize("check", [run, make_plan])
def test_a_loop_of_links_as_output(check, parent, tmp_path):
    for one, other in (("a", "b"), ("b", "a")):
        (tmp_path / one).symlink_to(tmp_path / other)
    with pytest.raises(ConfigError, match="`output` must be a path that can be followed, found: Symlink loop"):
        check(settings(parent, tmp_path / "a"))
    with (
        pytest.raises(ConfigError, match="`output` must be a path"),
        run_directory(tmp_path / "a", overwrite=False, fresh=False),
    ):
        pass


def test_a_parent_that_is_quantized_already(parent, tmp_path):
    run(settings(parent, tmp_path / "once", "rtn"))
    refuse(ConfigError, "quantized already: name its parent", settings(tmp_path / "once", tmp_path / "twice", "rtn"))


def test_a_parent_with_an_adapter_beside_its_weights(parent, tmp_path):
    (parent / "adapter_config.json").write_text("{}")
    refuse(ConfigError, "holds adapter_config.json, so transformers loads another", settings(parent, tmp_path / "out"))


def test_nan_in_the_logits_of_a_checkpoint_without_its_parent(parent):
    change(parent, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
    text = EvaluationConfig(files=(str(TEXT),), tokens=64, window=32, stride=32)
    with pytest.raises(NumericsError, match="those of result are NaN"):
        evaluate_checkpoint(str(parent), None, text, device="cpu")


def test_linears_outside_the_blocks(parent, tmp_path, monkeypatch):
    """A projection beside the blocks cannot be calibrated: it stays in float, and no override may say otherwise."""

    def with_adapter(*args, **kwargs):
        model = build_skeleton(*args, **kwargs)
        model.model.adapter = torch.nn.Linear(32, 32, device="meta")
        return model

    monkeypatch.setattr("ptq.plan.build_skeleton", with_adapter)
    pattern = "only Linears of the decoder blocks .*model.adapter is none of these: take it out of `overrides`"
    overrides = {"model.adapter": SchemeOverride(bits=8)}
    refuse(ConfigError, pattern, settings(parent, tmp_path / "out", overrides=overrides))


def test_models_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="must hold config.json"):
        locate(str(tmp_path))
    with pytest.raises(ConfigError, match="there is no directory '/not/here'"):
        locate("/not/here")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="'some/model' is no directory and the hub answered"):
        locate("some/model")


def test_configurations_that_are_no_language_model(tmp_path):
    from transformers import T5Config, ViTConfig

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "not-a-model"}))
    with pytest.raises(UnsupportedModelError, match="must describe a model transformers knows"):
        read_config(tmp_path)
    with pytest.raises(UnsupportedModelError, match="causal language model of transformers; ViTConfig"):
        build_skeleton(ViTConfig(), torch.float32)
    with pytest.raises(UnsupportedModelError, match="T5Config: its decoder reads what an encoder makes of another"):
        build_skeleton(T5Config(architectures=[]), torch.float32)
    with pytest.raises(UnsupportedModelError, match="must hold its tokenizer"):
        load_tokenizer(tmp_path, False)


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    assert resolve_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(ConfigError, match="device cuda:99 must exist; this machine has"):
        resolve_device(torch.device("cuda:99"))


def test_a_parent_with_another_vocabulary(parent, tmp_path):
    other = save(build("llama", vocab_size=320), tmp_path / "other")
    text = EvaluationConfig(files=("unread",))
    with pytest.raises(ConfigError, match="must share a vocabulary; .* has 320 tokens and .* 288"):
        evaluate_checkpoint(str(parent), str(other), text, device="cpu")


def test_inspect_tells_what_is_there(parent, tmp_path):
    assert "quantized   no: a float checkpoint" in inspect(str(parent))
    run(settings(parent, tmp_path / "out", "rtn", overrides={"down_proj": SchemeOverride(bits=8, group_size=-1)}))
    lines = inspect(str(tmp_path / "out"), modules=True).splitlines()
    assert "format      gptq" in lines
    assert "              12 x 4 bits, groups of 32, symmetric" in lines
    assert "               2 x 8 bits, one group a row, symmetric" in lines
    assert "float       1 Linears: lm_head" in lines
    run(settings(parent, tmp_path / "less", "rtn", exclude=["lm_head", "model.layers.0"]))
    (said,) = [line for line in inspect(str(tmp_path / "less")).splitlines() if line.startswith("float")]
    assert said.startswith("float       8 Linears: model.layers.0.self_attn.q_proj, ")
    assert said.endswith("model.layers.0.self_attn.o_proj and 4 more")
    assert "  model.layers.0.mlp.down_proj  64 x 128, 8 bits, one group a row, symmetric" in lines
