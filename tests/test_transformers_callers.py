"""``from_pretrained`` as other libraries call it: evaluation harnesses, tensor parallelism, inference mode.

Oracle: logits of `ptq.load`, and what transformers makes of the same call for a float model.
"""

from types import SimpleNamespace

import foreign_files
import pytest
import torch
from foreign_files import Kind, logits
from transformers import AutoModelForCausalLM, GPTQConfig
from transformers.distributed import DistributedConfig
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

import ptq
from ptq.errors import FormatError
from ptq.integration.quantizer import PtqConfig, PtqQuantizer
from ptq.nn.linear import QuantLinear


@pytest.fixture
def foreign(tmp_path):
    foreign_files.write(tmp_path, Kind("gptq"))
    return tmp_path


@pytest.fixture
def ours(tmp_path):
    foreign_files.write(tmp_path, Kind("gptq", writer="ptq:0.1.0"))
    return tmp_path


def handed_back(directory):
    """As lm-evaluation-harness makes it, of what config.json says."""
    from transformers import AutoConfig

    return AutoQuantizationConfig.from_dict(AutoConfig.from_pretrained(directory).quantization_config)


def test_a_configuration_that_was_handed_back_asks_for_nothing(ours):
    model = AutoModelForCausalLM.from_pretrained(ours, quantization_config=handed_back(ours))
    assert any(isinstance(module, QuantLinear) for module in model.modules())
    assert torch.equal(logits(model), logits(ptq.load(ours, device="cpu")))


@pytest.mark.parametrize("override", [True, False])
def test_of_foreign_checkpoints_it_counts_once_registered(foreign, override):
    given = handed_back(foreign)
    ptq.register(override=override)
    try:
        chosen = AutoHfQuantizer.merge_quantization_configs(given.to_dict(), given)
    finally:
        ptq.register(override=False)
    assert isinstance(chosen, PtqConfig) == override


def test_the_configuration_of_a_loaded_model_loads_another(ours):
    first = AutoModelForCausalLM.from_pretrained(ours)
    again = AutoModelForCausalLM.from_pretrained(ours, config=first.config)
    assert torch.equal(logits(again), logits(first))


def test_another_configuration_still_asks_for_the_reader_of_transformers(ours):
    given = handed_back(ours)
    chosen = AutoHfQuantizer.merge_quantization_configs(given.to_dict(), GPTQConfig(bits=4, desc_act=True))
    assert not isinstance(chosen, PtqConfig)


@pytest.mark.parametrize(
    ("plan", "found"),
    [
        (DistributedConfig(tp_size=2), "found tp_size=2"),
        (DistributedConfig(tp_size=2, ep_size=2), "found tp_size=2"),
        (DistributedConfig(tp_plan="auto"), "found a tp_plan"),
        (DistributedConfig(fsdp_size=2), None),
    ],
)
def test_packed_weights_are_not_split(plan, found):
    """A plan for Linears would pass packed ones over, and add up experts that every process computed whole."""
    model = torch.nn.Linear(4, 4)
    model.config = SimpleNamespace(distributed_config=plan)
    # Without files, which is what is said where the plan is none that matters.
    message = (
        f"packed weights must be whole on each device, {found}: load without it" if found else "given a state_dict"
    )
    with pytest.raises(FormatError, match=message):
        PtqQuantizer(PtqConfig())._process_model_before_weight_loading(model)


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, ptq.load], ids=["transformers", "ptq"])
def test_a_model_loaded_in_inference_mode_runs_and_trains_outside_of_it(ours, load):
    with torch.inference_mode():
        model = load(ours)
    rows = model.get_input_embeddings()(torch.tensor([[1, 2, 3]])).detach().requires_grad_()
    model(inputs_embeds=rows).logits.sum().backward()
    assert rows.grad is not None
    assert float(rows.grad.abs().max()) > 0
