"""GGUF files of packed checkpoints that other tools wrote.

Oracle: the dense weights that the words of such a file mean (`foreign_files`).
"""

import foreign_files
import pytest
import torch
from foreign_files import Kind
from gguf_files import export, read, solving_on
from tiny_models import build, save, tokenizer

from ptq.config import RunConfig
from ptq.errors import ConfigError
from ptq.export import show


@pytest.fixture(scope="module")
def solving(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return solving_on(tmp_path_factory.mktemp("text") / "text.txt")


KINDS = [Kind("gptq", 8), Kind("gptq", 4, ordered=True), Kind("compressed-tensors", 3, symmetric=False, ordered=True)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_float_file_holds_the_values_of_any_codes(tmp_path, kind):
    """Oracle: the dense weights that the words of a file of another tool mean, and the float rest."""
    model = foreign_files.write(tmp_path / "theirs", kind)
    tokenizer().save_pretrained(tmp_path / "theirs")
    done = export(tmp_path / "theirs", "F16", tmp_path)
    held = read(done.path)
    for name, parameter in model.named_parameters():
        expected = parameter.half().float() if parameter.dim() == 2 else parameter
        assert torch.equal(held.get_parameter(name), expected), name
    assert "14 packed tensors hold the values of the checkpoint's codes, rounded to F16" in show(done)
    assert not done.carried


def test_act_order_fits_no_blocks(tmp_path, solving):
    """Nor is it noticed while the file is written: with text and a parent that is known, that is solved."""
    parent, made = save(build("llama", torch.bfloat16), tmp_path / "parent"), tmp_path / "made"
    foreign_files.write(made, Kind("gptq", 4, ordered=True), build("llama", torch.bfloat16).float())
    tokenizer().save_pretrained(made)
    with pytest.raises(ConfigError, match=r"act-order\) has scales of columns that lie apart, .* not fit Q4_0: export"):
        export(made, "Q4_0", tmp_path)
    (made / "ptq_config.yaml").write_text(f"model: {parent}\n")
    assert f"solved from {parent}" in show(export(made, "Q4_0", tmp_path, solving))
