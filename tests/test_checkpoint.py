"""Shards. Oracle: the safetensors library reads what we write and writes what we read; damage is done byte by byte."""

import json
import math
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ptq.errors import FormatError, PtqError
from ptq.formats.checkpoint import DTYPES, CheckpointReader, ShardWriter
from ptq.models.loading import read_config

TINY = Path(__file__).resolve().parent.parent / "examples/tiny-llama"

needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk is simulated by /dev/full")


def tensor_of(dtype, *shape, seed=0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values > 0 if dtype == torch.bool else (values * 8).to(dtype)


def example():
    """Every dtype, and sizes that would misalign a wider tensor written after a narrower one."""
    tensors = {f"t.{name}": tensor_of(dtype, 3, 5) for name, dtype in DTYPES.items()}
    tensors |= {f"late.{name}": tensor_of(dtype, 7) for name, dtype in DTYPES.items()}
    return tensors | {
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
        "ünïcode": torch.ones(1),
    }


def equal(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.view(-1).cpu(), other.view(-1))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(equal(found[name].float(), expected[name].float()) for name in expected)
    assert [found[name].dtype for name in expected] == [tensor.dtype for tensor in expected.values()]


def write(directory, tensors, **limits):
    directory.mkdir(exist_ok=True)
    writer = ShardWriter(directory, **limits)
    for name, tensor in tensors.items():
        writer.add({name: tensor})
    return writer.finish()


def test_a_single_shard_is_read_by_safetensors(tmp_path):
    index = write(tmp_path, example())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert_same(load_file(tmp_path / "model.safetensors"), example())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in example().values())
    assert index["weight_map"] == dict.fromkeys(sorted(example()), "model.safetensors")


def test_every_tensor_is_aligned_to_its_elements(tmp_path):
    write(tmp_path, example())
    raw = (tmp_path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    for name, tensor in example().items():
        assert header[name]["data_offsets"][0] % tensor.dtype.itemsize == 0


def test_shards_fill_up_to_the_limit_and_carry_an_index(tmp_path):
    tensors = {f"w{i}": tensor_of(torch.float32, 4, 4, seed=i) for i in range(5)} | {"big": torch.ones(100)}
    index = write(tmp_path, tensors, max_shard_bytes=128)  # two 64-byte tensors each; `big` has one to itself
    files = [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*files, "model.safetensors.index.json"]
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text()) == index
    assert index["metadata"]["total_size"] == 5 * 64 + 400
    assert [list(load_file(tmp_path / file)) for file in files] == [["w0", "w1"], ["w2", "w3"], ["w4"], ["big"]]
    assert index["weight_map"] == {name: file for file in files for name in load_file(tmp_path / file)}
    reader = CheckpointReader(tmp_path)
    assert_same(reader.tensors(tensors), tensors)
    assert reader.files() == {file: (tmp_path / file).stat().st_size for file in files}


def test_views_are_written_by_value(tmp_path):
    base = torch.arange(12).view(3, 4)
    write(tmp_path, {"t": base.t(), "row": base[1], "grad": torch.nn.Parameter(torch.ones(2))})
    found = load_file(tmp_path / "model.safetensors")
    assert_same(found, {"t": base.t().contiguous(), "row": base[1].clone(), "grad": torch.ones(2)})


def test_bytes_depend_on_the_input_alone(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, example(), max_shard_bytes=100)
    first = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}


def test_the_open_shard_is_on_disk_not_in_memory(tmp_path):
    writer = ShardWriter(tmp_path)
    writer.add({"a": torch.zeros(1000)})
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 4000


def test_writer_errors(tmp_path):
    writer = ShardWriter(tmp_path)
    with pytest.raises(FormatError, match="must hold at least one tensor, none was added"):
        writer.finish()
    writer.add({"a": torch.zeros(1)})
    with pytest.raises(FormatError, match="tensor a was written already"):
        writer.add({"a": torch.zeros(1)})
    with pytest.raises(FormatError, match=r"tensor c: dtype must be one of F64, .* found torch.complex64"):
        writer.add({"c": torch.zeros(1, dtype=torch.complex64)})


@needs_dev_full
def test_a_full_disk_names_path_and_bytes(tmp_path):
    (tmp_path / ".spool-4").symlink_to("/dev/full")  # the kernel answers every write with "no space left"
    with pytest.raises(PtqError, match=r"write \S+\.spool-4: 400000 bytes are needed and \d+ bytes are free"):
        ShardWriter(tmp_path).add({"a": torch.zeros(100_000)})


@needs_dev_full
def test_a_disk_that_fills_while_a_shard_is_closed(tmp_path):
    (tmp_path / ".shard-00001").symlink_to("/dev/full")
    writer = ShardWriter(tmp_path)
    writer.add({"a": torch.zeros(100_000)})
    with pytest.raises(PtqError, match=r"write \S+\.shard-00001: 400\d\d\d bytes are needed and \d+ bytes are free"):
        writer.finish()


def test_reader_reads_what_safetensors_writes(tmp_path):
    save_file(example(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    reader = CheckpointReader(tmp_path)
    assert set(reader.names()) == set(example())
    assert {name: reader.spec(name) for name in example()} == {
        n: (t.dtype, tuple(t.shape)) for n, t in example().items()
    }
    assert_same(reader.tensors(example()), example())
    assert reader.tensors(["scalar", "absent"]).keys() == {"scalar"}


def test_one_file_of_another_name_is_found(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "weights.safetensors")
    assert CheckpointReader(tmp_path).tensor("a").tolist() == [1, 1]


def test_opening_maps_no_data(tmp_path, monkeypatch):
    write(tmp_path, example())
    monkeypatch.setattr("safetensors.safe_open", lambda *a, **k: pytest.fail("the file was opened"))
    reader = CheckpointReader(str(tmp_path))
    assert reader.spec("scalar") == (torch.int64, ())


def sharded(directory):
    tensors = {"model.layers.0.a": torch.ones(8), "model.layers.1.a": torch.ones(8)}
    write(directory, tensors, max_shard_bytes=32)
    return directory / "model.safetensors.index.json", directory / "model-00001-of-00002.safetensors"


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rename_in_index(content):
    content["weight_map"]["model.layers.9.a"] = "model-00001-of-00002.safetensors"


def swap_in_index(content):
    content["weight_map"]["model.layers.0.a"] = "model-00002-of-00002.safetensors"


def leave_directory(content):
    content["weight_map"]["model.layers.0.a"] = "../model-00001-of-00002.safetensors"


def store_twice(index, shard):
    """One that the index does not name lies in both files."""
    for each, name in ((shard, "model.layers.0.a"), (other_shard(shard), "model.layers.1.a")):
        save_file({name: torch.ones(8), "b": torch.ones(8)}, each)


def other_shard(shard):
    return shard.with_name("model-00002-of-00002.safetensors")


def put_into_a_folder(index, shard):
    (shard.parent / "sub").mkdir()
    shard.rename(shard.parent / "sub" / shard.name)
    index.write_text(index.read_text().replace(shard.name, f"sub/{shard.name}"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (put_into_a_folder, "shards must lie in .* itself; .* names sub/model-00001-of-00002.safetensors: move it"),
        (lambda index, shard: shard.unlink(), "names 2 shards, 1 of them are not in .*: model-00001-of-00002"),
        (lambda index, shard: edit(index, leave_directory), "1 of them are not in .*: ../model-00001"),
        (lambda index, shard: edit(index, rename_in_index), "says that model.layers.9.a is in model-00001"),
        (lambda index, shard: edit(index, swap_in_index), "says that model.layers.0.a is in model-00002"),
        (lambda index, shard: index.write_text("{}"), "must have a weight_map from tensor to file, found none"),
        (lambda index, shard: index.write_text('{"weight_map": {"a": 3}}'), "weight_map from tensor to file, found 3"),
        (lambda index, shard: index.write_text('{"weight_map": {"a": ""}}'), "from tensor to file, found ''"),
        (
            store_twice,
            "stored once, .*; b is in model-00001-of-00002.safetensors and in model-00002-of-00002",
        ),
        (lambda index, shard: index.write_text("{"), "must be JSON"),
        (lambda index, shard: index.unlink(), "holds 2 safetensors files but no model.safetensors.index.json"),
    ],
)
def test_index_damage(tmp_path, damage, message):
    damage(*sharded(tmp_path))
    with pytest.raises(FormatError, match=message):
        CheckpointReader(tmp_path)


def test_of_a_tensor_in_two_shards_the_index_says_which_counts(tmp_path):
    """As transformers reads it."""
    index, shard = sharded(tmp_path)
    for file, value, name in ((shard, 1.0, "model.layers.0.a"), (other_shard(shard), 2.0, "model.layers.1.a")):
        save_file({name: torch.ones(8), "b": torch.full((8,), value)}, file)
    for file, value in ((shard, 1.0), (other_shard(shard), 2.0)):
        edit(index, lambda content, file=file: content["weight_map"].update(b=file.name))
        assert torch.equal(CheckpointReader(tmp_path).tensor("b"), torch.full((8,), value))


def test_a_link_to_nothing_is_no_shard_of_an_index(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(FormatError, match=r"model.safetensors must be a file; it is a directory, a pipe or a link"):
        CheckpointReader(tmp_path)


def with_header(header, data=b""):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "truncated or no safetensors file: 0 bytes cannot hold its header"),
        (b"\x10\0\0\0\0\0\0\0{}", "10 bytes cannot hold its header"),
        (b"version https://git-lfs.github.com/spec/v1", "42 bytes cannot hold its header"),
        (b"\x02\0\0\0\0\0\0\0{x", "its header is not a safetensors header"),
        (with_header([1]), "its header is not a safetensors header"),
        (with_header({"a": {"dtype": "F32"}}), "its header is not a safetensors header"),
        (with_header({"__metadata__": {"format": 1}}), "__metadata__ must map text to text, found {'format': 1}"),
        (with_header({"a\ud800": entry()}, bytes(8)), "not a safetensors header .* surrogates not allowed"),
        (struct.pack("<Q", 99999) + b"[" * 99999, "not a safetensors header .*recursion"),
        (with_header({"a": entry("F4")}, bytes(8)), "dtypes must be among F64, .* found F4"),
        (with_header({"a": entry()}, bytes(7)), r"header describes \d+ bytes, the file has \d+; fetch it again"),
        (with_header({"a": entry()}, bytes(9)), r"header describes \d+ bytes, the file has \d+"),
        (
            with_header({"a": entry(offsets=(4, 12))}, bytes(12)),
            "a must take the 8 bytes from 0, its header says 4..12",
        ),
        (with_header({"a": entry(shape=(3,))}, bytes(8)), "a must take the 12 bytes from 0, its header says 0..8"),
    ],
)
def test_shard_damage(tmp_path, raw, message):
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(FormatError, match=message):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("changes", [
    {"data_offsets": [0, 8, 8]}, {"data_offsets": []}, {"data_offsets": [0, math.inf]}, {"data_offsets": ["0", "8"]},
    {"data_offsets": [False, 8]}, {"data_offsets": [0.0, 8.0]}, {"data_offsets": [-8, 0]}, {"data_offsets": 8},
    {"shape": ["2"]}, {"shape": [2.0]}, {"shape": [True, 2]}, {"shape": [-2, -1]}, {"shape": None},
    {"dtype": ["F32"]}, {"dtype": None},
], ids=str)  # fmt: skip
def test_descriptions_that_the_library_refuses(tmp_path, changes):
    """Oracle: the library."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header({"a": {**entry(), **changes}}, bytes(8)))
    with pytest.raises(SafetensorError), safe_open(path, "pt"):
        pass
    with pytest.raises(FormatError, match="a needs a dtype, a shape and two data_offsets, found {'dtype'"):
        CheckpointReader(tmp_path)


def test_a_pipe_is_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=r"model.safetensors must be a file; it is a directory, a pipe or a link"):
        CheckpointReader(tmp_path)
    shutil.copyfile(TINY / "config.json", tmp_path / "config.json")
    edit(tmp_path / "config.json", lambda content: content.update(tie_word_embeddings=True))
    read_config(tmp_path)  # which looks whether the head is stored by itself


def test_directories_without_weights(tmp_path):
    with pytest.raises(FormatError, match=r"must be a directory; there is none at \S+nowhere"):
        CheckpointReader(tmp_path / "nowhere")
    with pytest.raises(FormatError, match=r"must hold model.safetensors or .*; it holds no safetensors file"):
        CheckpointReader(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(
        FormatError, match=r"pickled weights only .* is never read. Convert it .*save_pretrained\(new\)"
    ):
        CheckpointReader(tmp_path)


def test_unknown_names_come_with_the_nearest(tmp_path):
    sharded(tmp_path)
    reader = CheckpointReader(tmp_path)
    for read in (reader.tensor, reader.spec):
        with pytest.raises(
            FormatError, match=r"model.layer.1.a is not among the 2 of .*nearest name is model.layers.1.a"
        ):
            read("model.layer.1.a")


@pytest.mark.parametrize("ends", [KeyboardInterrupt, ValueError])
def test_an_interruption_that_safetensors_made_an_error_of_is_one(ends, tmp_path, monkeypatch):
    """A call of Python from Rust that Ctrl-C ends fails as any other does; an error that comes again is one."""
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    tried = []

    class Opened:
        def __init__(self, *_, **__):
            pass

        def get_tensor(self, name):
            tried.append(name)
            if len(tried) == 1 or ends is ValueError:
                raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'")
            return torch.ones(2)

    monkeypatch.setattr("safetensors.safe_open", Opened)
    with pytest.raises(ends):
        CheckpointReader(tmp_path).tensor("w")
    assert tried == ["w", "w"]
