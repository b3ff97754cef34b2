"""GGUF files as a whole: what another reader makes of them, and what is refused.

Oracles: transformers' own GGUF reader (it undoes the order of rows and dequantizes), the gguf package's reader, and the
values of the checkpoint that was exported. llama.cpp itself is in benchmarks/gguf.
"""

import errno
import json
import re
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_files import dense, export, fields, kinds, read
from safetensors.torch import load_file, save_file
from tiny_models import TEXT, build, divergence, held_out, logits, run, save, settings, tokens

from ptq import cli, runtime
from ptq.card import _llama_cpp
from ptq.config import CalibrationConfig, DatasetConfig, GPTQConfig, RunConfig
from ptq.errors import ConfigError, FormatError, PtqError, UnsupportedModelError
from ptq.export import show
from ptq.gguf.blocks import values
from ptq.gguf.file import gguf_file
from ptq.gguf.layout import Target
from ptq.gguf.rounding import round_blocks
from ptq.models.structure import linears, set_weight, weight_of

ROWS = 288  # of the tiny models' embeddings
WIDE = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The beginning of the calibration text: tokenizing all of it takes longer than solving."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT.read_text(encoding="utf-8")[:8000], encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def solving(text: str) -> RunConfig:
    """Eight short sequences, on the CPU."""
    source = DatasetConfig(files=(text,))
    calibration = CalibrationConfig(dataset=source, samples=8, sequence_length=64, batch_size=4)
    return RunConfig(model="", output="", method="gptq", device="cpu", calibration=calibration)


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models in bfloat16, whose weights float16 holds; Qwen2 has biases."""
    folder = tmp_path_factory.mktemp("parents")
    models: dict[str, dict[str, Any]] = {"llama": {}, "mistral": {"sliding_window": None}, "qwen2": {}, "qwen3": {}}
    found = {name: save(build(name, torch.bfloat16, **changes), folder / name) for name, changes in models.items()}
    # transformers takes a llama file whose name has "mistral" in it for another architecture, which it cannot read
    found["mistral"] = found["mistral"].rename(folder / "cold-wind")
    wide = build("llama", torch.bfloat16, **WIDE)
    return {**found, "wide": save(wide, folder / "wide")}


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_transformers_reads_the_parent_out_of_a_float_file(parents, tmp_path, name):
    done = export(parents[name], "F16", tmp_path)
    assert done.path == tmp_path / f"{parents[name].name}-F16.gguf"
    parent = runtime.load(parents[name], device="cpu", dtype="float32")
    batch = tokens(2, 24)
    # the same float32 weights in the same model: nothing may differ but the order of sums over permuted rows
    torch.testing.assert_close(logits(read(done.path), batch), logits(parent, batch), rtol=1e-4, atol=1e-4)


def test_rows_of_qwen_stay_where_they_are(parents, tmp_path):
    done = export(parents["qwen3"], "F16", tmp_path)
    parent = runtime.load(parents["qwen3"], device="cpu", dtype="float32")
    attention = parent.model.layers[1].self_attn
    assert torch.equal(dense(done.path, "blk.1.attn_q.weight"), attention.q_proj.weight)
    assert torch.equal(dense(done.path, "blk.1.attn_k_norm.weight"), attention.k_norm.weight)
    assert fields(done.path)["qwen3.attention.key_length"] == 32


def test_what_the_file_says_of_itself(parents, tmp_path, solving):
    done = export(parents["qwen2"], "Q8_0", tmp_path, solving)
    found = fields(done.path)
    assert found["general.architecture"] == "qwen2"
    assert found["general.name"] == "qwen2"
    assert (found["general.file_type"], found["general.quantization_version"]) == (7, 2)
    assert len(found["tokenizer.ggml.tokens"]) == len(found["tokenizer.ggml.token_type"]) == ROWS
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert "output.weight" not in kinds(done.path)  # tied
    assert done.size == done.path.stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["qwen2-Q8_0.gguf"]


@pytest.mark.parametrize(
    ("generation", "eos"), [(None, 7), ({"eos_token_id": [9, 7]}, 9), ({"eos_token_id": ROWS}, 7), ({}, 7)]
)
def test_configurations_say_what_ends_a_text_where_the_tokenizer_does_not(tmp_path, generation, eos):
    """Oracle: generation_config.json, then config.json, an id that the model has a row for."""
    model = save(build("llama", eos_token_id=7, pad_token_id=None), tmp_path / "model")
    settings_file = model / "tokenizer_config.json"
    kept = {key: value for key, value in json.loads(settings_file.read_text()).items() if key != "eos_token"}
    settings_file.write_text(json.dumps(kept))
    (model / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (model / "generation_config.json").write_text(json.dumps(generation))
    found = fields(export(model, "F16", tmp_path).path)
    assert found["tokenizer.ggml.eos_token_id"] == eos
    assert "tokenizer.ggml.padding_token_id" not in found


def test_what_llama_cpp_cuts_differently_is_printed(parents, tmp_path, monkeypatch):
    monkeypatch.setattr("ptq.export.tokenizer_notes", lambda _: ("a space more",))
    assert "a space more" in show(export(parents["llama"], "F16", tmp_path))


CARRIED = {
    "Q4_0": {},
    "Q4_1": {"symmetric": False, "format": "compressed-tensors"},
    "Q8_0": {"bits": 8, "group_size": 64},
}


@pytest.mark.parametrize("type_name", CARRIED)
def test_a_checkpoint_is_carried_over(parents, tmp_path, type_name):
    checkpoint = tmp_path / "made"
    run(settings(parents["llama"], checkpoint, method="rtn", **CARRIED[type_name]))
    done = export(checkpoint, type_name, tmp_path)
    assert Counter(kinds(done.path).values())[type_name] == done.carried == 14
    assert "2 tensors stay in F16: token_embd.weight, output.weight" in done.notes
    loaded, held = runtime.load(checkpoint, device="cpu"), read(done.path)
    for name, module in loaded.named_modules():
        if type(module).__name__ == "QuantLinear":
            quantized = module.quantized()
            step = quantized.scales.abs().repeat_interleave(quantized.group_size, 1)
            off = (held.get_submodule(name).weight - quantized.dequantize()).abs() / step
            # float32 sums of a minimum and a product round once
            assert off.max() <= done.deviation + (16 * 2.0**-23 if type_name == "Q4_1" else 0)
    assert (done.deviation > 0) == (type_name == "Q4_1")
    values = f"no value off by more than {done.deviation:.2g} of a step\n"
    exact = "every value exactly the checkpoint's\n"
    assert f"14 tensors carried over, every code unchanged, {values if done.deviation else exact}" in show(done)


def test_text_lets_the_float_rest_of_a_checkpoint_be_solved(parents, tmp_path, solving):
    checkpoint = tmp_path / "made"
    run(settings(parents["llama"], checkpoint, method="rtn"))
    asking = replace(solving, gptq=GPTQConfig(gradient_tokens=8))
    done = export(checkpoint, "Q4_0", tmp_path, asking)
    assert "gptq.gradient_tokens is left out: rows of block formats are solved by themselves" in done.notes
    found = kinds(done.path)
    # rows of 64 are no multiple of Q6_K's 256
    assert (found["output.weight"], found["token_embd.weight"]) == ("Q8_0", "Q4_0")
    assert done.carried == 14
    assert done.loss is not None
    assert done.loss < 1


def test_k_quants_are_solved_better_than_rounded(parents, tmp_path, solving):
    """The other file holds the same kinds, rounded with equal importance."""
    done = export(parents["wide"], "Q4_K_M", tmp_path, solving)
    found = kinds(done.path)
    assert found["blk.0.attn_q.weight"] == "Q4_K"
    assert found["output.weight"] == "Q6_K"
    # rows of 384
    assert (found["blk.0.ffn_down.weight"], found["blk.1.ffn_down.weight"]) == ("Q5_0", "Q8_0")
    assert "1 tensors are Q5_0 instead of Q4_K, whose blocks do not fill rows of 384" in done.notes
    assert done.loss is not None
    assert done.loss < 0.8
    assert f"on average {done.loss:.3f} of the loss of rounding" in show(done)
    parent = runtime.load(parents["wide"], device="cpu", dtype="float32")
    batch = held_out(4, 64)
    reference, solved = logits(parent, batch), logits(read(done.path), batch)
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
             "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}  # fmt: skip
    for path, module in linears(parent):
        parts = path.split(".")
        kind = found["output.weight"] if path == "lm_head" else found[f"blk.{parts[2]}.{names[parts[-1]]}.weight"]
        weight = weight_of(module).float()
        set_weight(module, values(round_blocks(kind, weight, torch.ones(weight.shape[1]))))
    assert divergence(reference, solved) < divergence(reference, logits(parent, batch))


def test_a_tied_embedding_is_rounded_for_its_work_as_a_head(parents, tmp_path, solving):
    done = export(parents["qwen2"], "Q6_K", tmp_path, solving)
    assert kinds(done.path)["token_embd.weight"] == "Q8_0"
    weight = runtime.load(parents["qwen2"], device="cpu", dtype="float32").model.embed_tokens.weight
    found = dense(done.path, "token_embd.weight")
    assert not torch.equal(found, values(round_blocks("Q8_0", weight, torch.ones(64))))
    # of the same order as rounding: within a step of the whole range
    assert (found - weight).square().mean().sqrt() < weight.abs().max() / 127


def test_llama3_scaling_is_a_tensor_and_biases_follow_their_rows(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    built = build("llama", torch.bfloat16, rope_parameters=rope, attention_bias=True)
    done = export(save(built, tmp_path / "model"), "F16", tmp_path / "file.gguf")
    factors = dense(done.path, "rope_freqs.weight")
    assert factors.shape == (8,)
    assert (factors[0], factors[-1]) == (1, 8)
    attention = built.model.layers[0].self_attn
    bias = attention.q_proj.bias.float().view(4, 2, 8)  # heads, halves of a head, pairs
    assert torch.equal(dense(done.path, "blk.0.attn_q.bias").view(4, 8, 2), bias.transpose(1, 2))
    assert torch.equal(dense(done.path, "blk.0.attn_v.bias"), attention.v_proj.bias.float())


def test_a_run_that_fails_leaves_nothing(parents, tmp_path, monkeypatch):
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ptq.export._content", fail)
    with pytest.raises(KeyboardInterrupt):
        export(parents["llama"], "F16", tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    """The writer fails once more when it is closed: what it holds has no room either."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("ptq.gguf.file._write_front", lambda _, partial: full(partial.touch()))
    monkeypatch.setattr(gguf.GGUFWriter, "close", full)
    path = tmp_path / "a.gguf"
    with pytest.raises(PtqError, match="no space left to write"), gguf_file(path, "llama", {}, [], overwrite=False):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept_or_replaced(parents, tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"a\.gguf exists; pass --overwrite, or choose another --out"):
        export(parents["llama"], "F16", path)
    assert path.read_bytes() == b"mine"
    export(parents["llama"], "F16", path, overwrite=True)
    assert path.read_bytes()[:4] == b"GGUF"
    with pytest.raises(ConfigError, match="cannot be created"):
        export(parents["llama"], "F16", path / "below.gguf")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"link\.gguf exists; pass --overwrite"):
        export(parents["llama"], "F16", tmp_path / "link.gguf")


def test_a_directory_is_no_file_to_replace(parents, tmp_path):
    (tmp_path / "llama-F16.gguf").mkdir()
    with pytest.raises(ConfigError, match="is a directory"):
        export(parents["llama"], "F16", tmp_path, overwrite=True)


def test_a_float_model_needs_text(parents, tmp_path):
    with pytest.raises(ConfigError, match="solved for Q4_0 on text: pass --text FILE"):
        export(parents["llama"], "Q4_0", tmp_path)


def test_sequences_longer_than_the_context_are_refused(parents, tmp_path, text):
    usual = CalibrationConfig(dataset=DatasetConfig(files=(text,)))
    long = RunConfig(model="", output="", method="gptq", calibration=usual)
    with pytest.raises(ConfigError, match="context of 128 tokens; found 2048: pass a shorter --length"):
        export(parents["llama"], "Q4_0", tmp_path, long)


@pytest.mark.parametrize(
    ("changes", "type_name", "message"),
    [
        ({}, "Q4_K_M", r"4-bit .* does not fit (Q4_K|Q6_K): choose --type Q4_0 or Q4_1 or Q8_0, which"),
        ({"bits": 8}, "Q4_0", r"does not fit Q4_0: choose --type Q8_0, .* or pass --text FILE, or --config .*/made/"),
        ({"group_size": 16}, "Q8_0", r"fit Q8_0: pass --text FILE, .* to solve the float model .*/wide, for Q8_0"),
        ({"group_size": 16}, "Q4_0", r"does not fit Q4_0: pass .*; --type F16 holds the values of its codes$"),
    ],
)
def test_codes_that_do_not_fit_are_refused(parents, tmp_path, changes, type_name, message):
    run(settings(parents["wide"], tmp_path / "made", method="rtn", **changes))
    with pytest.raises(ConfigError, match=message):
        export(tmp_path / "made", type_name, tmp_path)


@pytest.mark.parametrize("record", [None, "- no mapping", "model: [", "model: a-name-alone", "model: not/here"])
def test_a_checkpoint_without_a_known_parent_is_refused(parents, tmp_path, solving, record):
    run(settings(parents["llama"], tmp_path / "made", method="rtn", bits=8))
    config = tmp_path / "made/ptq_config.yaml"
    config.unlink() if record is None else config.write_text(record, encoding="utf-8")
    with pytest.raises(ConfigError, match="does not fit Q4_0: .* or export the float model it was made from"):
        export(tmp_path / "made", "Q4_0", tmp_path, solving)


def test_with_text_the_parent_is_solved_for_what_the_codes_do_not_fit(parents, tmp_path, solving):
    """Oracle: the export of the parent itself."""
    run(settings(parents["llama"], tmp_path / "made", method="rtn", bits=8))
    done = export(tmp_path / "made", "Q4_0", tmp_path, solving)
    assert done.path == tmp_path / "made-Q4_0.gguf"
    assert re.search(rf"solved from {parents['llama']}, because .*8-bit.*does not fit Q4_0", show(done))
    assert not done.carried
    direct = export(parents["llama"], "Q4_0", tmp_path, solving)
    assert done.path.read_bytes() == direct.path.read_bytes()


def test_another_model_in_the_place_of_the_parent_is_refused(parents, tmp_path, solving, monkeypatch):
    """A relative path in the configuration leads to another model from another directory."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "model").symlink_to(parents["llama"])
    other = shutil.copytree(parents["llama"], tmp_path / "there" / "model")
    tensors = {name: tensor * 1.5 for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    monkeypatch.chdir(tmp_path / "here")
    run(settings("model", tmp_path / "made", method="rtn", bits=8))
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(ConfigError, match="the float model in model must be the one .* their .* differ"):
        export(tmp_path / "made", "Q4_0", tmp_path, solving)
    monkeypatch.chdir(tmp_path / "here")
    assert export(tmp_path / "made", "Q4_0", tmp_path, solving).notes


def test_other_architectures_are_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="the model is gpt2"):
        export(save(build("gpt2"), tmp_path / "gpt2"), "F16", tmp_path)


def test_the_package_is_named_where_it_is_missing(parents, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match="pip install gguf"):
        export(parents["llama"], "F16", tmp_path)


def test_tensors_come_in_the_announced_order(tmp_path):
    targets = [Target(name, name, (4,), "F32", "F32", -1, 0) for name in "ab"]
    with (
        pytest.raises(FormatError, match="a of 16 bytes must be written next; found b of 16"),
        gguf_file(tmp_path / "x.gguf", "llama", {"general.name": "x"}, targets, overwrite=False) as file,
    ):
        file.add(targets[1], torch.zeros(4))
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(parents, tmp_path, capsys, text):
    arguments = ["export", str(parents["llama"]), "--format", "gguf", "--type", "Q4_0", "--out", str(tmp_path)]
    solve = ["--text", text, "--samples", "4", "--length", "64", "--device", "cpu"]
    assert cli.main([*arguments, *solve]) == 0
    printed = capsys.readouterr().out
    for word in ("llama-Q4_0.gguf", "tensors: ", "15 Q4_0", "solved with the Hessian"):
        assert word in printed
    assert cli.main([*arguments, *solve]) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    made, rows = tmp_path / "llama-Q4_0.gguf", tmp_path / "a.jsonl"
    kept = made.read_bytes()
    rows.write_text(json.dumps({"story": Path(text).read_text()}) + "\n")
    solve[1] = str(rows)
    assert cli.main([*arguments, *solve, "--column", "story", "--overwrite"]) == 0
    assert made.read_bytes() == kept, "it is the same text"


def test_text_may_come_from_a_configuration(parents, tmp_path, capsys, text):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {parents['llama']}\noutput: unused\nmethod: gptq\ndevice: cpu\n"
        f"calibration: {{samples: 4, sequence_length: 64, dataset: {{files: [{text}]}}}}\n"
    )
    arguments = ["export", str(parents["llama"]), "--type", "Q4_0", "--out", str(tmp_path), "--config", str(config)]
    assert cli.main(arguments) == 0
    assert (tmp_path / "llama-Q4_0.gguf").is_file()
    assert cli.main([*arguments, "--text", text]) == 2
    assert "from --text or from --config, found both" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [(["--type", "Q9"], "--type must be one of F16, Q4_0"),
     (["--type", "Q4_0", "--text", str(TEXT), "--samples", "0"], "--samples must be 1 or more"),
     (["--type", "Q4_0", "--text", "absent.txt", "--length", "32", "--device", "cpu"], "absent.txt")],
)  # fmt: skip
def test_wrong_arguments_are_sentences(parents, tmp_path, capsys, extra, message):
    assert cli.main(["export", str(parents["llama"]), "--out", str(tmp_path), *extra]) in (1, 2)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_packed_head_fits_the_type_that_the_card_names(symmetric, tmp_path, capsys):
    """Its kind is Q6_K under Q4_0 where its rows are blocks of 256, which groups of 32 do not fill."""
    parent = save(build("llama", torch.bfloat16, hidden_size=256, tie_word_embeddings=False), tmp_path / "parent")
    run(settings(parent, tmp_path / "made", "rtn", format="compressed-tensors", symmetric=symmetric, exclude=()))
    document = json.loads((tmp_path / "made" / "report.json").read_text())
    named = re.search(r"--type (\S+)", _llama_cpp("a/b", document))
    export = ["export", str(tmp_path / "made"), "--out", str(tmp_path / "x.gguf"), "--type"]
    assert cli.main([*export, "Q4_0"]) == 2
    assert re.search(r"does not fit Q\w+: choose --type .*Q8_0", capsys.readouterr().err)
    assert cli.main([*export, named[1]]) == 0
