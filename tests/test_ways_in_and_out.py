"""Model types that transformers loads or names in its own way, through `ptq.load`, ``from_pretrained`` and both saved.

Oracle: the logits of `ptq.load` and the names in the file that was read.
"""

import sys
from pathlib import Path

import foreign_files
import pytest
import tiny_models
import torch
from foreign_files import Kind
from transformers import AutoModel, AutoModelForCausalLM

import ptq
from ptq.formats.checkpoint import CheckpointReader
from ptq.nn import QuantLinear

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import architectures  # noqa: E402

# Their modules initialize the weights of their children by name; falcon has a Linear of its own.
BY_NAME = (
    "gpt2",
    "gpt_bigcode",
    "mamba",
    "falcon_mamba",
    "modernbert-decoder",
    "nanochat",
    "recurrent_gemma",
    "falcon",
)
RENAMED = ("got_ocr2", "fuyu")  # transformers' modules have other names than its files


@pytest.mark.parametrize("kind", [*BY_NAME, *RENAMED])
def test_every_way_in_and_out(kind, tmp_path):
    """`ptq.load` and ``from_pretrained``, and what either writes: the same logits and the names of the file."""
    config = architectures.tiny_config(kind)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    architectures.randomize(model)
    tiny_models.save(model, tmp_path / "parent")
    (tmp_path / "parent" / architectures.TEXT_FILE).write_text(tiny_models.TEXT.read_text()[:2000])
    exclude = ("lm_head", "*.dt_proj") if "mamba" in kind else ("lm_head",)
    tiny_models.run(architectures.settings(tmp_path / "parent", tmp_path / "ours", "rtn", exclude))
    loaded = ptq.load(tmp_path / "ours", device="cpu")
    other, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    packed = [[n for n, m in model.named_modules() if isinstance(m, QuantLinear)] for model in (loaded, other)]
    assert packed[0] == packed[1] != []
    batch = tiny_models.tokens(2, 24)
    expected = tiny_models.logits(loaded, batch)
    assert torch.equal(tiny_models.logits(other, batch), expected)
    for name, each in (("loaded", loaded), ("other", other)):
        each.save_pretrained(tmp_path / name)
        assert set(CheckpointReader(tmp_path / name).names()) == set(CheckpointReader(tmp_path / "ours").names())
        assert torch.equal(tiny_models.logits(ptq.load(tmp_path / name, device="cpu"), batch), expected)


def test_a_model_without_its_head_keeps_the_names_of_the_file(tmp_path):
    foreign_files.write(tmp_path / "ours", Kind("gptq", writer="ptq:0.1.0"))
    AutoModel.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "copy")
    left = set(CheckpointReader(tmp_path / "ours").names()) - set(CheckpointReader(tmp_path / "copy").names())
    assert left == {"lm_head.weight"}
