"""What PEFT is refused beside packed layers, whichever way it comes to them: a first adapter or a later one.

Oracle: the sentences, and the module's own output where an adapter was refused.
"""

from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import ptq
from ptq import adapters
from ptq.errors import ConfigError

X = torch.linspace(-1, 1, 64).view(2, 32)


def packed() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    ptq.quantize_linears(module, method="rtn", group_size=32, exclude=["2"])
    return module


def adapted() -> peft.PeftModel:
    module = packed()
    return peft.get_peft_model(module, adapters.lora_config(module, r=4))


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize(("options", "message"), [
    ({"init_lora_weights": "pissa"}, "must be True or False or 'gaussian', found 'pissa'"),
    ({"init_lora_weights": "olora"}, "must be True or False or 'gaussian', found 'olora'"),
    ({"use_qalora": True, "qalora_group_size": 16}, "plain LoRA: leave use_qalora out"),
    ({"use_dora": True}, "plain LoRA: leave use_dora out"),
])  # fmt: skip
def test_a_variant_is_refused_as_a_second_adapter(tmp_path: Path, saved: bool, options, message: str) -> None:
    model, config = adapted(), peft.LoraConfig(r=2, target_modules=["0"], **options)
    want = model(X)
    if saved:
        config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        model.load_adapter(str(tmp_path), "second") if saved else model.add_adapter("second", config)
    assert set(model.peft_config) == {"default"}
    assert torch.equal(model(X), want)


def test_plain_lora_may_be_a_second_adapter_whoever_made_its_configuration() -> None:
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights="gaussian"))
    assert set(model.base_model.model[0].lora_A) == {"default", "second"}


@pytest.mark.parametrize("over", [packed, adapted])
def test_parameters_of_a_packed_layer_are_no_targets(over) -> None:
    with pytest.raises(
        ConfigError, match=r"target_parameters must name .* not packed; 0.weight is in .*0, .*: name .*0 in"
    ):
        adapters.lora_config(over(), target_modules=["2"], target_parameters=["0.weight"])
    with pytest.raises(ConfigError, match=r"target_parameters must name .* not packed; weight is in .*: name .*0 in"):
        adapters.lora_config(over(), target_modules=["2"], target_parameters=["weight"])
    found = adapters.lora_config(packed(), target_modules=["0"], target_parameters=["2.weight"])
    assert found.target_parameters == ["2.weight"]


@pytest.mark.parametrize("group_size", [-1, 128])
def test_the_matrices_of_an_adapter_over_packed_layers_are_not_quantized(group_size: int) -> None:
    module = packed()
    model = peft.get_peft_model(module, adapters.lora_config(module, r=4, target_modules=["0"]))
    before, want = {name: value.clone() for name, value in model.state_dict().items()}, model(X)
    said = r"base_model.model.0.lora_A.default is one of PEFT's, in base_model.model.0: quantize before there is an"
    with pytest.raises(ConfigError, match=said):
        ptq.quantize_linears(model, method="rtn", group_size=group_size)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(X), want)
    rows = ptq.quantize_linears(model, method="rtn", group_size=-1, exclude=["base_model.model.0.*"])
    assert list(rows) == ["base_model.model.2"]
