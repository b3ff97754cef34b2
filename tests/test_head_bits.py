"""A float output head that is packed when a model is loaded, and the warm-up of what is loaded.

Oracle: the logits in float64, from the hidden states that reach the head and the head's codes, scales and zeros.
"""

import pytest
import torch
from tiny_models import build, logits, run, save, settings, tokens
from torch import nn

import ptq
from ptq.errors import ConfigError, PtqError
from ptq.grid import min_max_grid, nearest_codes, values
from ptq.nn import QuantLinear
from ptq.nn.head import pack_head
from ptq.runtime import warm_up

BATCH = tokens(2, 12, 5)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def parent(request, tmp_path_factory):
    model = build("llama", torch.float32, tie_word_embeddings=request.param)
    return save(model, tmp_path_factory.mktemp("parent"))


@pytest.mark.parametrize("bits", [4, 8])
def test_logits_are_those_of_the_dequantized_head(bits: int, parent) -> None:
    model, plain = ptq.load(parent, device="cpu", head_bits=bits), ptq.load(parent, device="cpu")
    head = model.get_output_embeddings()
    assert isinstance(head, QuantLinear)
    assert (head.bits, head.group_size, head.symmetric) == (bits, 64, True)  # 64 inputs, which 128 does not divide
    embedding = model.get_input_embeddings().weight
    assert torch.equal(embedding, plain.get_input_embeddings().weight)
    read = []
    head.register_forward_hook(lambda module, inputs, output: read.append(inputs[0]))
    found = logits(model, BATCH)
    groups = head.quantized()
    grouped = groups.codes.view(len(groups.codes), -1, groups.group_size).double() - groups.zeros[..., None].double()
    dense = (grouped * groups.scales[..., None].double()).view(groups.codes.shape)
    want = read[0].double() @ dense.T
    # 64 float32 products and sums: 64 * 2**-24 of the sum of magnitudes
    allowed = 70 * 2.0**-24 * (read[0].double().abs() @ dense.abs().T)
    assert ((found.double().view(want.shape) - want).abs() <= allowed).all()
    # nearer to the float head with more bits; the error of a weight is at most half a step where nothing is clipped
    step = head.scales.abs().repeat_interleave(groups.group_size, 1).double()
    error = (dense - plain.get_output_embeddings().weight.double()).abs()
    assert (error <= step / 2).double().mean() > 0.98


def test_the_searched_scales_lose_less_than_the_range(parent) -> None:
    """Oracle: plain rounding on the grid that spans each group, whose grid is among those that are searched."""
    weight = ptq.load(parent, device="cpu").get_output_embeddings().weight.detach()
    head = nn.Linear(64, weight.shape[0], bias=True)
    head.weight, head.bias = nn.Parameter(weight), nn.Parameter(torch.linspace(-1, 1, weight.shape[0]))
    packed = pack_head(head, 4)
    assert torch.equal(packed.bias, head.bias)
    grid = min_max_grid(weight, packed_scheme(packed))
    rounded = values(nearest_codes(weight, grid), grid)
    searched = (packed.dequantize(torch.float32) - weight).square().view(len(weight), -1, 64).sum(-1)
    assert (searched <= (rounded - weight).square().view(len(weight), -1, 64).sum(-1) * (1 + 1e-5)).all()


def packed_scheme(layer: QuantLinear):
    from ptq.formats.codec import Scheme

    return Scheme(layer.bits, layer.group_size, layer.symmetric)


@pytest.mark.parametrize(("columns", "group"), [(256, 128), (192, 64), (96, 32), (40, 40)])
def test_group_is_the_largest_that_divides(columns: int, group: int) -> None:
    assert pack_head(nn.Linear(columns, 8, bias=False), 4).group_size == group


def test_many_rows_are_rounded_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    head = nn.Linear(64, 50, bias=False)
    whole = pack_head(head, 4)
    monkeypatch.setattr("ptq.nn.head._ROWS", 16)
    parts = pack_head(head, 4)
    assert torch.equal(parts.qweight, whole.qweight)
    assert torch.equal(parts.scales, whole.scales)


def test_beside_packed_and_fused_linears(parent, tmp_path) -> None:
    run(settings(parent, tmp_path / "out", "rtn"))
    alone = ptq.load(tmp_path / "out", device="cpu", head_bits=4)
    fused = ptq.load(tmp_path / "out", device="cpu", head_bits=4, fuse=True)
    assert torch.equal(logits(alone, BATCH), logits(fused, BATCH))
    head = fused.get_output_embeddings()
    assert isinstance(head, QuantLinear)
    assert head.layout != "canonical"  # prepared as the others are
    assert fused.generate(BATCH, max_new_tokens=2, do_sample=False).shape == (2, 14)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "float"])
@pytest.mark.parametrize("fuse", [False, True], ids=["", "fused"])
def test_a_copy_that_would_lose_the_head_is_refused(packed: bool, fuse: bool, parent, tmp_path) -> None:
    """Oracle: without head_bits the same checkpoint is saved, and its copy has the same logits."""
    source = parent
    if packed:
        source = tmp_path / "out"
        run(settings(parent, source, "rtn"))
    model = ptq.load(source, device="cpu", head_bits=8, fuse=fuse)
    with pytest.raises(PtqError, match="can be saved as it was loaded; .*: load the checkpoint again without"):
        model.save_pretrained(tmp_path / "refused")
    assert not list((tmp_path / "refused").glob("*.safetensors"))
    plain = ptq.load(source, device="cpu")
    plain.save_pretrained(tmp_path / "copy")
    assert torch.equal(logits(ptq.load(tmp_path / "copy", device="cpu"), BATCH), logits(plain, BATCH))


def test_a_float_model_whose_head_is_float_again_is_saved(parent, tmp_path) -> None:
    model, plain = ptq.load(parent, device="cpu", head_bits=8), ptq.load(parent, device="cpu")
    model.set_output_embeddings(plain.get_output_embeddings())
    model.save_pretrained(tmp_path / "copy")
    assert torch.equal(logits(ptq.load(tmp_path / "copy", device="cpu"), BATCH), logits(plain, BATCH))


def test_what_head_bits_cannot_be_for_is_refused(parent, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="head_bits must be 4, 8 or None, found 3; leave it out"):
        ptq.load(parent, device="cpu", head_bits=3)
    run(settings(parent, tmp_path / "out", "rtn"))
    packed = pack_head(nn.Linear(64, 8), 8)
    with monkeypatch.context() as changed:
        changed.setattr("ptq.runtime.output_head", lambda model: packed)
        with pytest.raises(ConfigError, match="this checkpoint holds its head in 8 bits: leave head_bits out"):
            ptq.load(tmp_path / "out", device="cpu", head_bits=4)
    monkeypatch.setattr("ptq.runtime.output_head", lambda model: None)
    with pytest.raises(ConfigError, match="needs an output head that is a Linear; the model has NoneType"):
        ptq.load(parent, device="cpu", head_bits=4)


def test_loading_warms_up_each_kind_of_layer_once(parent, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(settings(parent, tmp_path / "out", "rtn"))
    calls = []
    monkeypatch.setattr(QuantLinear, "warmup", lambda layer, dtype: calls.append((layer, dtype)))
    model = ptq.load(tmp_path / "out", device="cpu", head_bits=4, warmup=False)
    assert calls == []
    model = ptq.load(tmp_path / "out", device="cpu", head_bits=4)
    shapes = [(layer.out_features, layer.in_features, layer.layout) for layer, _ in calls]
    # q and o; k and v; gate and up; down; the head
    assert len(shapes) == len(set(shapes)) == 5
    assert all(layout != "canonical" for *_, layout in shapes)
    assert {dtype for _, dtype in calls} == {model.dtype}


def test_warming_up_a_cpu_does_nothing(parent) -> None:
    model = ptq.load(parent, device="cpu", head_bits=8)
    before = logits(model, BATCH)
    warm_up(model, torch.bfloat16)
    assert torch.equal(logits(model, BATCH), before)
