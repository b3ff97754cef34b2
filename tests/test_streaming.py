"""A model that runs block by block computes what the whole model does, bit for bit, and holds one block at a time.

Oracle: the model's own forward pass with all weights in memory; for quantization, the same solver fed by that pass.
"""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny_models
import torch
from tiny_models import (
    ARCHITECTURES,
    BFLOAT16_ERROR,
    FLOAT32_ERROR,
    build,
    distance,
    logits,
    save,
    sensitivity,
    settings,
    tokens,
)
from torch import nn

from ptq.block import quantize_block
from ptq.calibration.data import calibration_batches
from ptq.errors import FormatError, UnsupportedModelError
from ptq.evaluate import streamed
from ptq.formats.checkpoint import CheckpointReader
from ptq.formats.codec import Scheme
from ptq.half_products import fast_half_products
from ptq.models.loading import build_skeleton, load_module, load_tokenizer, model_dtype, unload_module
from ptq.models.names import SourceNames
from ptq.models.streamed import PROBE_TOKENS, StreamedModel
from ptq.models.structure import find_blocks, linears, weight_of
from ptq.plan import make_plan, parent_stream
from ptq.runtime import load, open_checkpoint, open_stream
from ptq.task import BlockTask, FloatTwin

CPU = torch.device("cpu")
# Lengths on both sides of the sliding windows of 16, and batches of different size.
BATCHES = [tokens(2, 40, 1), tokens(3, 12, 2), tokens(1, 40, 3)]


def stream_of(directory: Path, model: nn.Module) -> StreamedModel:
    """A skeleton of any module tree beside its saved weights."""
    reader = CheckpointReader(directory)
    names = SourceNames(model, reader.names())
    blocks = find_blocks(model)

    def load_path(skeleton: nn.Module, path: str) -> None:
        load_module(
            skeleton, path, reader, names, device=CPU, dtype=torch.float32,
            skip=lambda name: not path and name.startswith(f"{blocks}."),
        )  # fmt: skip

    return StreamedModel(model, blocks, load_path, unload_module, CPU)


def held(model: nn.Module) -> set[str]:
    """Parameters that have memory."""
    return {name for name, p in model.named_parameters(remove_duplicate=False) if not p.is_meta}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_the_whole_models_own(name, dtype, tmp_path):
    model = build(name, dtype)
    save(model, tmp_path)
    stream = open_stream(open_checkpoint(tmp_path), CPU)
    assert stream.blocks_path == ARCHITECTURES[name].blocks
    scored = streamed(stream)
    error = FLOAT32_ERROR if dtype == torch.float32 else BFLOAT16_ERROR
    for batch in BATCHES:
        found = [*scored([batch])]
        assert {one.dtype for one in found} == {dtype}
        with fast_half_products(CPU):  # as the scorer multiplies
            want, allowed = logits(model, batch), sensitivity(model, batch, error)
        if len(batch) == 1:
            assert torch.equal(found[0].float(), want[0])
        assert distance(torch.stack(found).float(), want) <= allowed  # the head takes one sequence at a time
    assert [*map(len, scored(BATCHES))] == [batch.shape[1] for batch in BATCHES for _ in batch]
    assert held(stream.model) == set()


def test_a_model_is_scored_beside_an_altered_one_that_shares_what_is_not_in_blocks(tmp_path):
    """Oracle: a stream of its own for each; in memory stays nothing, also of scores that are not taken to the end."""
    save(build("llama"), tmp_path)

    def opened():
        return open_stream(open_checkpoint(tmp_path), CPU)

    def halved(block, _path):
        for module in block.parameters():
            module.data.mul_(0.5)

    stream, batches = opened(), BATCHES[:2]
    expected = [*zip(streamed(opened())(batches), streamed(opened(), halved)(batches), strict=True)]
    scores = zip(streamed(stream)(batches), streamed(stream, halved)(batches), strict=True)
    for (plain, altered), (want, other) in zip(scores, expected, strict=True):
        assert torch.equal(plain, want)
        assert torch.equal(altered, other)
        assert not torch.equal(plain, altered)
    assert held(stream.model) == set()
    one, two = streamed(stream)(batches), streamed(stream, halved)(batches)
    next(one), next(two)
    one.close()
    assert "lm_head.weight" in held(stream.model)
    assert torch.equal(next(two), expected[1][1])
    two.close()
    assert held(stream.model) == set()


def test_layers_with_their_own_masks_keep_them(tmp_path):
    """Gemma 2 alternates windows of 16 tokens with full attention: with 40 tokens the two masks differ."""
    save(build("gemma2"), tmp_path)
    stream = open_stream(open_checkpoint(tmp_path), CPU)
    stream.enter(BATCHES)
    masks = [calls[0].kwargs["attention_mask"] for calls in stream.calls]
    # some releases of transformers leave the mask of full attention out
    assert any(mask is None for mask in masks) or not torch.equal(*masks)
    assert any(mask is not None for mask in masks)
    # Batches of one length share one copy of the rotary tables; another length has its own.
    tables = [call.kwargs["position_embeddings"][0] for call in stream.calls[0]]
    assert tables[0].shape != tables[1].shape


def test_equal_arguments_of_two_batches_are_kept_once(tmp_path):
    save(build("llama"), tmp_path)
    stream = open_stream(open_checkpoint(tmp_path), CPU)
    stream.enter([tokens(2, 16, 1), tokens(2, 16, 2)])
    tables = {id(call.kwargs["position_embeddings"][0]) for calls in stream.calls for call in calls}
    assert len(tables) == 1


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("shape", [(2, 400), (300, 8)])
def test_a_probe_is_the_start_of_what_the_block_puts_out(name, shape, tmp_path):
    """Of long sequences part of the first, of short ones several; with masks and rotary tables of that length."""
    save(build(name, max_position_embeddings=512), tmp_path)
    stream = open_stream(open_checkpoint(tmp_path), CPU)
    (hidden,) = stream.enter([tokens(*shape)], probed=True)
    with stream.block(1) as block:
        found = stream.run_probe(1, copy.deepcopy(block).float(), hidden)
        whole = stream.run_as_block(1, block.float(), 0, hidden.float())
    rows, length = PROBE_TOKENS // shape[1] or 1, min(PROBE_TOKENS, shape[1])
    torch.testing.assert_close(found, whole[:rows, :length], atol=1e-5, rtol=1e-5)


def whole_model_run(model, config):
    """Quantize with all weights in memory: each run of a block is a forward pass of a whole model from the tokens.

    The float model, to which inputs are compared, is a second copy of it.
    """
    untouched = copy.deepcopy(model)
    batches = calibration_batches(config.calibration, load_tokenizer(Path(config.model), False))
    plan = make_plan(config)
    results = {}
    for index, block in enumerate(model.get_submodule(plan.blocks)):
        path = f"{plan.blocks}.{index}"
        schemes = {n.removeprefix(f"{path}."): s for n, s in plan.targets.items() if n.startswith(f"{path}.")}
        runs, float_runs = ([partial(m, input_ids=batch, use_cache=False) for batch in batches]
                            for m in (model, untouched))  # fmt: skip
        twin = FloatTwin(untouched.get_submodule(path), float_runs)
        with torch.no_grad():
            found = quantize_block(block, runs, BlockTask(path, schemes, config, plan.dtype, twin=twin))
        results |= {f"{path}.{name}": result.quantized for name, result in found.items()}
    return results


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_quantizing_block_by_block_gives_the_codes_of_the_whole_model(name, tmp_path):
    model = build(name)
    config = settings(save(model, tmp_path / "parent"), tmp_path / "out")
    tiny_models.run(config)
    opened = open_checkpoint(tmp_path / "out")
    expected = whole_model_run(model, config)
    assert set(expected) == set(opened.schemes)
    for module, quantized in expected.items():
        stored = opened.names.of_module(module)
        tensors = opened.reader.tensors(opened.codec.tensor_names(stored, opened.schemes[module]))
        found = opened.codec.decode(stored, tensors, opened.schemes[module])
        assert torch.equal(found.codes, quantized.codes)
        assert torch.equal(found.scales, quantized.scales)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_two_runs_write_the_same_bytes(method, tmp_path):
    """Everything but the seconds and the memory in report.json, and its page."""
    import json

    parent = save(build("llama", torch.bfloat16), tmp_path / "parent")
    config = settings(parent, tmp_path / "out", method)
    written = []
    for _ in range(2):
        tiny_models.run(config, overwrite=True)
        files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        report = json.loads(files.pop("report.json"))
        files.pop("report.html")
        modules = {name: {k: v for k, v in row.items() if k != "seconds"} for name, row in report["modules"].items()}
        written.append((files, modules, report["calibration"], report["size"]))
    assert written[0] == written[1]


def test_one_block_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """Counts blocks with memory whenever weights were read, throughout a run that also quantizes the head."""
    parent = save(build("qwen2"), tmp_path / "parent")
    seen: list[set[str]] = []

    def counting(model, path, *args, **kwargs):
        load_module(model, path, *args, **kwargs)
        seen.append({name.split(".")[2] for name in held(model) if name.startswith("model.layers.")})

    monkeypatch.setattr("ptq.plan.load_module", counting)
    tiny_models.run(settings(parent, tmp_path / "out", exclude=()))
    assert max(map(len, seen)) == 1
    assert {index for blocks in seen for index in blocks} == {"0", "1"}


@pytest.mark.parametrize("packed", [False, True])
def test_buffers_alone_stay(packed, tmp_path):
    directory = save(build("qwen2", tie_word_embeddings=packed), tmp_path / "parent")
    if packed:
        tiny_models.run(settings(directory, tmp_path / "out", "rtn", exclude=()))
        directory = tmp_path / "out"
    opened = open_checkpoint(directory)
    stream = open_stream(opened, CPU)
    with stream.outer():
        assert {"model.embed_tokens.weight", "model.norm.weight"} <= held(stream.model)
        assert not any(name.startswith("model.layers.") for name in held(stream.model))
    for index in range(2):
        with stream.block(index):
            pass
    assert held(stream.model) == set()
    alive = {name for name, buffer in stream.model.named_buffers() if not buffer.is_meta}
    assert {name.rpartition(".")[2] for name in alive} <= {"inv_freq", "original_inv_freq"}


def test_tied_parameters_share_memory_while_they_are_loaded(tmp_path):
    save(build("qwen2"), tmp_path)
    stream = open_stream(open_checkpoint(tmp_path), CPU)
    for _ in range(2):
        with stream.outer():
            assert stream.model.lm_head.weight is stream.model.model.embed_tokens.weight
    assert load(tmp_path, device="cpu").lm_head.weight.data_ptr() != 0


class Scaled(nn.Module):
    """Blocks inside a container that owns a parameter and a persistent buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.embed = nn.Embedding(16, 8)
        self.inner.gain = nn.Parameter(torch.rand(8))
        self.inner.register_buffer("shift", torch.rand(8))
        self.inner.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))])

    def forward(self, input_ids, use_cache):
        x = self.inner.embed(input_ids) * self.inner.gain + self.inner.shift
        for layer in self.inner.layers:
            x = layer(x)
        return type("Output", (), {"logits": x})


def saved(module: nn.Module, directory: Path) -> Path:
    from safetensors.torch import save_file

    save_file(module.state_dict(), directory / "model.safetensors")
    return directory


def test_parameters_of_a_container_are_loaded(tmp_path):
    """They belong to no child module: loading embeddings, norms and head one by one would leave them on meta."""
    torch.manual_seed(0)
    whole = Scaled()
    saved(whole, tmp_path)
    skeleton = Scaled()
    for module in skeleton.modules():
        unload_module(module)
    stream = stream_of(tmp_path, skeleton)
    found = torch.stack([*streamed(stream)([tokens(2, 5) % 16])])
    assert torch.equal(found, whole(tokens(2, 5) % 16, False).logits)
    assert held(skeleton) == set()


def test_a_buffer_that_the_checkpoint_lacks_keeps_the_models_value(tmp_path):
    whole = Scaled()
    state = whole.state_dict()
    del state["inner.shift"]
    from safetensors.torch import save_file

    save_file(state, tmp_path / "model.safetensors")
    skeleton = Scaled()
    kept = skeleton.inner.shift.clone()
    with stream_of(tmp_path, skeleton).outer():
        assert torch.equal(skeleton.inner.shift, kept)
        assert torch.equal(skeleton.inner.gain, whole.inner.gain)


@pytest.mark.parametrize(("dtype", "kept"), [(torch.bfloat16, {"strict"}), (torch.float16, {"strict", "usual"})])
def test_modules_kept_in_float32(dtype, kept, tmp_path, monkeypatch):
    """As transformers loads them: the strict ones in half precision of either kind, the others in float16 only."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["post_attention_layernorm"])
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules", [r"layers.*.input_layernorm"])
    model = build("llama")
    save(model, tmp_path / "parent")
    dtypes = AutoModelForCausalLM.from_pretrained(tmp_path / "parent", dtype=dtype).state_dict()
    name = str(dtype).removeprefix("torch.")
    found = load(tmp_path / "parent", device="cpu", dtype=name).state_dict()
    assert {key: tensor.dtype for key, tensor in found.items()} == {key: t.dtype for key, t in dtypes.items()}
    expected = {"strict": "post_attention_layernorm", "usual": "input_layernorm"}
    norms = {key.split(".")[-2] for key, tensor in found.items() if tensor.dtype == torch.float32}
    assert norms == {expected[kind] for kind in kept}
    tiny_models.run(settings(tmp_path / "parent", tmp_path / "out", "rtn", dtype=name))
    reader = CheckpointReader(tmp_path / "out")
    for key, tensor in found.items():
        if key in reader.names():
            assert reader.spec(key)[0] == tensor.dtype


def test_structure_errors():
    with pytest.raises(UnsupportedModelError, match="ModuleList with Linears; Sequential has none"):
        find_blocks(nn.Sequential(nn.Linear(2, 2)))
    odd = nn.Linear(2, 2)
    del odd.weight
    odd.weight = nn.Module()
    odd.weight.data = "gone"
    with pytest.raises(UnsupportedModelError, match="a Linear must have a weight tensor; Linear has 'gone'"):
        weight_of(odd)


def test_old_names_of_a_checkpoint_are_understood():
    """What transformers renames when it loads: here LayerNorm.gamma, and a base model's prefix left out."""
    model = build("gpt2")
    model.transformer.LayerNorm = nn.LayerNorm(4)
    stored = ["LayerNorm.gamma", "h.0.attn.c_attn.weight", "h.0.attn.c_attn.qweight", "wte.weight", "other"]
    names = SourceNames(model, stored)
    assert names.of_parameter("transformer.LayerNorm.weight") == "LayerNorm.gamma"
    assert names.of_module("transformer.h.0.attn.c_attn") == "h.0.attn.c_attn"
    assert names.of_parameter("lm_head.weight") == "wte.weight"
    with pytest.raises(FormatError, match=r"transformer.wpe.weight is missing; the nearest name in it is wte.weight"):
        names.of_parameter("transformer.wpe.weight")


def test_a_file_s_name_of_a_float_is_not_listed_where_it_would_cover_a_packed_linear():
    """Readers of AWQ take an entry wherever it is part of a name. Oracle: the names, by hand."""
    model = build("gpt2")
    model.tower = nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(4, 4)})])})
    model.transformer.h[0].fc = nn.Linear(4, 4)
    names = SourceNames(model, ["h.0.fc.weight", "tower.h.0.fc.weight", "h.0.attn.c_attn.weight"])
    packed = Scheme(4, 32, True)
    schemes = {"tower.h.0.fc": packed, "transformer.h.0.fc": None, "transformer.h.0.attn.c_attn": None}
    assert names.both_spellings(schemes, whole=False) == {**schemes, "h.0.attn.c_attn": None}
    assert names.both_spellings(schemes, whole=True) == {**schemes, "h.0.attn.c_attn": None, "h.0.fc": None}


def test_a_tied_weight_may_be_stored_under_either_name():
    model = build("qwen2")
    assert SourceNames(model, ["lm_head.weight"]).of_parameter("model.embed_tokens.weight") == "lm_head.weight"


def test_the_skeleton_has_no_weights_and_real_buffers():
    config = build("llama").config
    skeleton = build_skeleton(config, torch.bfloat16)
    assert held(skeleton) == set()
    assert skeleton.model.rotary_emb.inv_freq.dtype == torch.float32
    assert not skeleton.model.rotary_emb.inv_freq.is_meta


@pytest.mark.parametrize(("stored", "expected"), [("bfloat16", torch.bfloat16), (None, torch.float32)])
def test_the_dtype_is_the_checkpoints_unless_asked(stored, expected):
    config = build("llama").config
    config.dtype = stored
    assert model_dtype(config, "auto") == expected
    assert model_dtype(config, "float16") == torch.float16


def test_the_parent_is_read_only(tmp_path):
    """A solver overwrites the weights of a loaded block; the mapped file must not notice."""
    parent = save(build("llama"), tmp_path / "parent")
    before = (parent / "model.safetensors").read_bytes()
    plan = make_plan(replace(settings(parent, tmp_path / "out"), method="rtn"))
    stream = parent_stream(plan)
    with stream.block(0) as block:
        for _, module in linears(block):
            weight_of(module).fill_(7.0)
    with stream.block(0) as block:
        assert not any(bool((weight_of(module) == 7.0).any()) for _, module in linears(block))
    assert (parent / "model.safetensors").read_bytes() == before
