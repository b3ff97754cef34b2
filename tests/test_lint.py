"""Linting. Oracle: checkpoints written here and damaged in one place."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_files
import pytest
import torch
from foreign_files import Kind
from safetensors.torch import load_file, save_file
from test_moe import build as build_experts
from tiny_models import build, run, save, settings
from torch import Tensor

from ptq import cli
from ptq.errors import ConfigError, UnsupportedModelError
from ptq.formats import CODECS
from ptq.lint import describe, lint
from ptq.readers import REFUSES, SLOWER, UNKNOWN

Tensors = dict[str, Tensor]
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("llama", torch.bfloat16), tmp_path_factory.mktemp("lint") / "parent")


@pytest.fixture(scope="module")
def made(parent: Path) -> Callable[..., Path]:
    """Checkpoints of the parent, each made once."""
    known: dict[str, Path] = {}

    def make(codec: str = "gptq", **changes: Any) -> Path:
        key = f"{codec}{changes}"
        if key not in known:
            known[key] = parent.parent / str(len(known))
            run(settings(parent, known[key], "rtn", format=codec, **changes))
        return known[key]

    return make


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_ptq_writes_is_sound(made: Callable[..., Path], codec: str, symmetric: bool) -> None:
    if codec == "gptq" and not symmetric:
        return  # it cannot be written
    result = lint(made(codec, symmetric=symmetric))
    assert (result.problems, result.notes) == ([], [])
    assert result.failure is None
    # Groups of 32: o_proj's 64 columns make two shares, down_proj's 128 four; there are four heads.
    assert [parts for parts, problems in result.parallel.items() if not problems] == [2]
    assert any("4 attention heads" in problem for problem in result.parallel[8])


FOREIGN = [Kind("gptq", 4, ordered=True), Kind("gptq", 4, symmetric=False), Kind("awq", 4, symmetric=False),
           Kind("compressed-tensors", 4, ordered=True), Kind("gptq", 4, auto_round=True),
           Kind("compressed-tensors", 8, -1, symmetric=False)]  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN, ids=str)
def test_what_others_write_is_sound(tmp_path: Path, kind: Kind) -> None:
    foreign_files.write(tmp_path, kind)
    result = lint(tmp_path)
    assert result.problems == []
    assert ["auto-round" in note for note in result.notes] == [True] * kind.auto_round
    assert any("act-order" in problem for problem in result.parallel[2]) == kind.ordered
    statuses = [verdict.status for verdict in result.readers]
    assert (statuses == [REFUSES, UNKNOWN, UNKNOWN]) == (kind.ordered and kind.layout == "compressed-tensors")


def damaged(source: Path, target: Path, change: Callable[[Tensors], None]) -> Path:
    shutil.copytree(source, target)
    shard = target / "model.safetensors"
    tensors = load_file(shard)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, shard, metadata={"format": "pt"})
    return target


def put(name: str, make: Callable[[Tensor], Tensor], target: str | None = None) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[target or name] = make(tensors[name])

    return change


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def first_zero(scales: Tensor) -> Tensor:
    scales[0, 0] = 0
    return scales


DAMAGE: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "missing packed": (drop(f"{Q}.qweight"), f"{Q}.qweight is missing"),
    "missing zeros": (drop(f"{DOWN}.qzeros"), f"{DOWN}.qzeros is missing"),
    "missing float": (drop("model.norm.weight"), "model.norm.weight is missing"),
    "extra packed": (put(f"{Q}.qweight", Tensor.clone, "model.norm.qweight"), "model.norm.qweight is extra"),
    "extra packed layer": (
        put(f"{Q}.scales", Tensor.clone, "model.layers.7.mlp.up_proj.scales"),
        "model.layers.7.mlp.up_proj.scales is extra",
    ),
    "codes of another dtype": (put(f"{Q}.qweight", Tensor.long), f"{Q}.qweight must be int32, found int64"),
    "integer scales": (put(f"{Q}.scales", Tensor.int), f"{Q}.scales must be float16 or bfloat16 or float32"),
    "float of another dtype": (put("model.norm.weight", Tensor.int), "model.norm.weight must be float16"),
    "codes of another shape": (put(f"{Q}.qweight", lambda t: t[:4]), f"{Q}.qweight must have shape [8, 64], found [4,"),
    "scales of another shape": (put(f"{Q}.scales", lambda t: t[:1]), f"{Q}.scales must have shape [2, 64]"),
    "float of another shape": (put("lm_head.weight", lambda t: t[:9]), "lm_head.weight must have shape [288, 64]"),
    "zero scale": (put(f"{Q}.scales", first_zero), f"{Q}: 1 of 128 scales are zero or not finite"),
    "not a number": (put(f"{Q}.scales", lambda t: t * torch.nan), f"{Q}: 128 of 128 scales are zero or not finite"),
    "groups beyond the scales": (put(f"{Q}.g_idx", lambda t: t + 99), f"{Q}.g_idx: groups must be 0..1, as there are"),
    "zeros of asymmetric weights": (put(f"{Q}.qzeros", lambda t: t + 1), f"{Q}.qzeros: gptq stores 7 for every zero"),
    "float not a number": (
        put("model.norm.weight", lambda t: t.index_fill(0, torch.tensor([3]), torch.nan)),
        "model.norm.weight: 1 of 64 values are not finite",
    ),
    "embedding beyond its dtype": (
        put("model.embed_tokens.weight", lambda t: t.index_fill(0, torch.tensor([3]), torch.inf)),
        "model.embed_tokens.weight: 64 of 18432 values are not finite",
    ),
    "packed and float": (
        put("lm_head.weight", lambda t: t[:64].clone(), f"{Q}.weight"),
        f"{Q} must be packed or in float",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(made: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    change, message = DAMAGE[kind]
    result = lint(damaged(made(), tmp_path / "x", change))
    assert len(result.problems) == 1
    assert message in result.problems[0]
    assert message in (result.failure or "")
    assert message in describe(result)


@pytest.mark.parametrize("stated", [[128, 64], [-1, 64], [0, 0], [64, 2**40]])
def test_a_shape_that_is_stated_wrongly_is_named(made: Callable[..., Path], tmp_path: Path, stated: list[int]) -> None:
    change = put(f"{DOWN}.weight_shape", lambda _: torch.tensor(stated))
    result = lint(damaged(made("compressed-tensors"), tmp_path / "x", change))
    assert result.problems == [
        f"{DOWN}.weight_shape must say [64, 128], the shape of the weight in the model, found {stated}"
    ]


def test_experts_are_checked_one_by_one(tmp_path: Path) -> None:
    """Their Linears have the names of the file; the roles come from the plan's stacked parameters."""
    run(settings(save(build_experts("mixtral"), tmp_path / "parent"), tmp_path / "whole", "rtn"))
    whole = lint(tmp_path / "whole")
    assert whole.failure is None
    assert any(".experts.0.down_proj: 64 / 4 = 16 columns" in problem for problem in whole.parallel[4])
    names = load_file(tmp_path / "whole/model.safetensors")
    lost = next(name for name in names if ".experts.1." in name and name.endswith(".qweight"))
    broken = lint(damaged(tmp_path / "whole", tmp_path / "broken", drop(lost)))
    assert broken.problems == [f"{lost} is missing"]


def test_a_bias_without_a_place_is_no_damage(made: Callable[..., Path], tmp_path: Path) -> None:
    result = lint(damaged(made(), tmp_path / "x", put(f"{Q}.scales", lambda t: t[0].clone(), f"{Q}.bias")))
    assert result.failure is None
    assert result.notes == [f"{Q}.bias is a bias that the model has no place for; readers leave it out"]


@pytest.mark.parametrize("name", ["model.norm.w2", "model.layers.7.input_layernorm.weight", "mtp.fc.weight"])
def test_a_float_tensor_without_a_place_is_a_note(made: Callable[..., Path], tmp_path: Path, name: str) -> None:
    """Parents come with such, and transformers reads past them. Oracle: the logits that it computes without it."""
    from transformers import AutoModelForCausalLM

    other = damaged(made(), tmp_path / "x", put("model.norm.weight", Tensor.clone, name))
    result = lint(other)
    assert result.failure is None
    assert result.notes == [f"{name} is extra: the model has no place for it; transformers leaves it out"]
    found, expected = (AutoModelForCausalLM.from_pretrained(path) for path in (other, made()))
    ids = torch.arange(8)[None]
    assert torch.equal(found(ids).logits, expected(ids).logits)


def test_columns_out_of_order_cannot_be_split_by_rows(made: Callable[..., Path], tmp_path: Path) -> None:
    result = lint(damaged(made(), tmp_path / "x", put(f"{DOWN}.g_idx", lambda t: t.flip(0))))
    assert result.failure is None
    assert [problem.split(":")[0] for problem in result.parallel[2] if "act-order" in problem] == [DOWN]


def edited(source: Path, target: Path, file: str = "config.json", **changes: Any) -> Path:
    """A copy with other quantization settings."""
    shutil.copytree(source, target)
    document = json.loads((target / file).read_text())
    (document["quantization_config"] if file == "config.json" else document).update(changes)
    (target / file).write_text(json.dumps(document))
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "fp8"}, "cannot be honoured: quant_method must name a format"),
        ({"bits": 5}, "cannot be honoured: this format holds 2, 3, 4, 8 bits, the config says 5"),
        ({"checkpoint_format": "marlin"}, "cannot be honoured: the layout"),
        ({"dynamic": {"-:.*": {}}}, "packs no Linear"),
        ({"bits": 8}, ".qweight must have shape [16, 64], found [8, 64]"),
        ({"group_size": 48}, "groups of 48 do not divide its 64 columns"),
        ({"desc_act": True}, "desc_act is True in config.json and False in quantize_config.json"),
    ],
)
def test_a_configuration_of_other_weights_is_damage(
    made: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    assert message in (lint(edited(made(), tmp_path / "x", **changes)).failure or "")


def test_settings_of_other_tools_must_be_the_same(made: Callable[..., Path], tmp_path: Path) -> None:
    """AutoAWQ's file has names of its own; ModelOpt's describes a format that no checkpoint here has."""
    checkpoint = Path(shutil.copytree(made("awq", symmetric=False), tmp_path / "x"))
    settings = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    own = {"w_bit": settings["bits"], "q_group_size": settings["group_size"], "zero_point": True, "version": "GEMM"}
    (checkpoint / "quant_config.json").write_text(json.dumps(own))
    assert lint(checkpoint).problems == []
    (checkpoint / "quant_config.json").write_text(json.dumps({**own, "q_group_size": 77}))
    (problem,) = lint(checkpoint).problems
    assert f"group_size is {settings['group_size']} in config.json and 77 in quant_config.json" in problem
    (checkpoint / "quant_config.json").unlink()
    (checkpoint / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    (problem,) = lint(checkpoint).problems
    assert "quant_method is 'awq' in config.json, and hf_quant_config.json is another tool's (ModelOpt)" in problem


def test_a_checkpoint_that_nobody_loads_fails(made: Callable[..., Path], tmp_path: Path) -> None:
    """Asymmetric mixed widths: transformers takes one scheme, vLLM and SGLang want 4 or 8 bits."""
    mixed = made("compressed-tensors", symmetric=False, bits=3)
    result = lint(mixed)
    assert [verdict.status for verdict in result.readers] == [SLOWER, REFUSES, REFUSES]
    every = result._replace(readers=[verdict._replace(status=REFUSES) for verdict in result.readers])
    assert "loads in none of transformers, vLLM and SGLang" in (every.failure or "")


def test_what_is_no_quantized_checkpoint_is_a_sentence(parent: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a directory with config.json"):
        lint(tmp_path)
    with pytest.raises(ConfigError, match="only quantized checkpoints are checked"):
        lint(parent)
    strange = Path(shutil.copytree(made(), tmp_path / "x"))
    (strange / "config.json").write_text(json.dumps({"model_type": "nobody-knows"}))
    with pytest.raises(UnsupportedModelError):
        lint(strange)


def test_the_command_says_it_and_exits(
    made: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["lint", str(made())]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1] == "files         sound"
    assert [line.split()[0] for line in out[3:6]] == ["transformers", "vLLM", "SGLang"]
    assert out[7] == "2 GPUs        yes"
    assert out[8].startswith("4 GPUs        no: model.layers.0.self_attn.o_proj: 64 / 4 = 16 columns")
    assert cli.main(["lint", str(damaged(made(), tmp_path / "x", drop("model.norm.weight")))]) == 1
    assert "damaged       model.norm.weight is missing" in capsys.readouterr().out


def test_a_class_without_a_plan_is_not_guessed(tmp_path: Path) -> None:
    run(settings(save(build("opt", torch.float16), tmp_path / "parent"), tmp_path / "x", "rtn"))
    result = lint(tmp_path / "x")
    assert result.failure is None
    assert result.parallel == {}
    assert "is not said by the model's class: not checked" in result.notes[0]
