"""What a run keeps on disk while it works: parts of a checkpoint, hidden states, the journal.

Oracles: the writer of whole checkpoints, and what was written.
"""

from collections.abc import Mapping

import pytest
import torch
from crashes import checksums

from ptq import hidden
from ptq.errors import ConfigError, FormatError
from ptq.formats.assembly import Part, assemble, damage, shards, write_part
from ptq.formats.checkpoint import ShardWriter
from ptq.formats.digest import CHUNK_BYTES, digest
from ptq.journal import Journal


def example_tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = [("a", torch.float32, (8, 4)), ("b", torch.int64, (3,)), ("c", torch.bfloat16, (5, 5)),
              ("d", torch.uint8, (7,)), ("e", torch.float32, (0, 4)), ("f", torch.float16, ())]  # fmt: skip
    return {name: torch.randint(0, 100, shape, generator=generator).to(dtype) for name, dtype, shape in shapes}


@pytest.mark.parametrize("limit", [1, 60, 170, 1e9])
def test_shards_hold_what_a_shard_writer_writes(limit, tmp_path):
    tensors = example_tensors()
    for name in ("parts", "one", "other"):
        (tmp_path / name).mkdir()
    items = list(tensors.items())
    parts = [write_part(tmp_path / "parts" / f"{i}", dict(items[i : i + 2])) for i in (0, 2, 4)]
    assemble(parts, tmp_path / "one", limit)
    writer = ShardWriter(tmp_path / "other", limit)
    writer.add(tensors)
    writer.finish()
    assert checksums(tmp_path / "one") == checksums(tmp_path / "other")
    assert list((tmp_path / "parts").iterdir()) == []


def test_a_part_must_hold_what_was_written(tmp_path):
    part = write_part(tmp_path / "part", {"a": torch.ones(4)})
    assert damage(*part) is None
    with pytest.raises(FormatError, match="tensor b: dtype must be one of F64, .* found torch.complex64"):
        write_part(tmp_path / "bad", {"b": torch.ones(1, dtype=torch.complex64)})
    with pytest.raises(FormatError, match="tensor a of .*other was written already"):
        shards([part, Part(tmp_path / "other", part.pieces)], 1e9)
    other = write_part(tmp_path / "part", {"b": torch.ones(4)})
    assert "its header is not the one that was written" in damage(other.path, part.pieces)


def test_empty_tensors_alone(tmp_path):
    part = write_part(tmp_path / "part", {"a": torch.ones(0, 3)})
    assert damage(*part) is None


def test_a_checksum_of_chunks_is_that_of_all_bytes_in_order():
    data = bytes(CHUNK_BYTES) + b"1"
    assert digest(data) == digest(bytes(data))
    assert len({digest(data), digest(data[:-1]), digest(data[1:] + b"0"), digest(b"")}) == 4


def test_hidden_states_come_back_as_maps(tmp_path):
    """A change in place stays out of the file; the map outlives the name."""
    batches = [torch.randn(2, 3, 5).bfloat16(), torch.randn(1, 3, 5).bfloat16()]
    file = hidden.HiddenFile(tmp_path / "h")
    maps = [file.keep(batch) for batch in batches]
    described = hidden.described(batches)
    assert hidden.damage(tmp_path / "h", described) is None
    maps[0].zero_()
    reread = hidden.opened(tmp_path / "h", described)
    (tmp_path / "h").unlink()
    assert all(torch.equal(one, other) for one, other in zip(reread, batches, strict=True))
    assert maps[0].eq(0).all()


def test_a_journal_without_its_beginning(tmp_path):
    def opened(signature: Mapping[str, str]) -> Journal:
        return Journal(tmp_path, signature, 2, mapped=False)

    opened({"a": "1"}).add({}, {"t": torch.ones(2)}, {}, 0.0)
    many = {f"key {i}": "1" for i in range(7)}
    with pytest.raises(ConfigError, match="a was 1 and is absent; key 0 was absent and is 1; .*; and 3 more. Undo"):
        opened(many)
    (tmp_path / "run.json").unlink()
    with pytest.raises(FormatError, match=r"run.json is missing, but the run has finished blocks; start over"):
        opened({"a": "1"})
