"""Which files calibration and evaluation text may come from, and what is said of those that cannot be used.

Oracles: the same rows as one object a line; what ``datasets`` takes for rows of a .json file; gzip.
"""

import gzip
import json
import os

import datasets
import pytest
from test_data import Characters, calibration, lines, strings

from ptq.calibration import text as text_module
from ptq.calibration.data import calibration_batches
from ptq.errors import DataError


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize(("name", "content"), [
    ("a.txt", "abcdefg"),
    ("a.JSONL", lines({"text": "abc"}, {"text": "defg"})),
    ("a.json", lines({"text": "abc"}, {"text": "defg"})),
    ("a.json", json.dumps([{"text": "abc"}, {"text": "defg"}])),
    ("a.json", "\ufeff\n " + json.dumps([{"text": "abc"}, {"text": "defg"}], indent=1)),
])  # fmt: skip
def test_json_and_packed_files_are_read_as_their_rows(write, name, content, packed):
    data = content.encode()
    file = write(name + ".gz" * packed, gzip.compress(data) if packed else data)
    if name == "a.txt":
        assert strings(calibration_batches(calibration(file), Characters())) == ["\1abc", "defg"]
        return
    assert [row.text() for row in text_module.rows(calibration(file).dataset, None)] == ["abc", "defg"]
    if name == "a.json" and "\ufeff" not in content:  # which it does not take
        loaded = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(file.parent))
        assert loaded["text"][:] == ["abc", "defg"]


FILES = {
    "surrogate": (
        "a.jsonl",
        b'{"text": "ab\\ud800 c"}',
        "line 1: text that UTF-8 can hold is required, found the lone surrogate U+D800 at character 2; correct the row",
    ),
    "suffix": (
        "a.doc",
        b"",
        "a .txt, .jsonl, .json (or any of these with .gz) or .parquet file is required, found '.doc'; ",
    ),
    "packed suffix": ("a.parquet.gz", b"", "or .parquet file is required, found '.gz'; convert it"),
    "no gzip": (
        "a.txt.gz",
        b"abc",
        "a.txt.gz: a whole file of gzip is required, found: Not a gzipped file (b'ab'); fetch",
    ),
    "cut gzip": (
        "a.jsonl.gz",
        gzip.compress(b"abc" * 99)[:-9],
        "required, found: Compressed file ended before the end",
    ),
    "bad gzip": (
        "a.json.gz",
        gzip.compress(b"")[:10] + b"\xff" * 20,
        "a whole file of gzip is required, found: Error -3",
    ),
    "packed bytes": ("a.txt.gz", gzip.compress(b"abc\xff"), "UTF-8 text is required, found byte 0xff at offset 3"),
    "list syntax": ("a.json", b'[{"text": "a"},\n', "a.json: a JSON list of objects is required, found: Exp"),
    "list bytes": ("a.json", b'[{"text": "\xfe"}]', "found byte 0xfe at offset 11"),
    "list of others": ("a.json", b'[{"text": "a"}, 1]', "a.json, row 2: a JSON object is required, found int; correct"),
    "one object": ("a.json", b'{\n"text": "a"}', "a.json, line 1: a JSON object is required, found: Exp"),
    "text bytes": ("a.txt", b"abc" * 3 + b"\xff", "UTF-8 text is required, found byte 0xff at offset 9; convert"),
    "cut character": ("a.txt", b"abcdef\xe2\x82", "found byte 0xe2 at offset 6"),
    "between reads": ("a.txt", b"abc\xe2\x82(abc", "found byte 0xe2 at offset 3"),
    "json bytes": ("a.jsonl", b'{"text": "a"}\n{"text": "\xfe"}\n', "found byte 0xfe at offset 24"),
    "json syntax": ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2: a JSON object is required, found: Exp"),
    "json number": (
        "a.jsonl",
        b'{"text": "a", "n": ' + b"1" * 5000 + b"}\n",
        "a.jsonl, line 1: a JSON object is required, found: Exc",
    ),
    "json depth": ("a.jsonl", b"[" * 200_000, "a.jsonl, line 1: a JSON object is required, found: maximum recursion"),
    "json array": ("a.jsonl", b"[1]\n", "a.jsonl, line 1: a JSON object is required, found list; correct it"),
    "column": (
        "a.jsonl",
        b'{"a": 1, "b": 2}',
        "line 1: the column 'text' is required, found a, b; name one of these as its column",
    ),
    "type": ("a.jsonl", b'{"text": 3}', "line 1: the column must hold text, found int; name the column that holds"),
    "short": ("a.txt", b"abcdef", "calibration needs 2 x 4 = 8 tokens, found 7; use more text, fewer samples or a"),
    "parquet": ("a.parquet", b"no parquet", "; is the file whole, and parquet?"),
}


@pytest.mark.parametrize(("name", "content", "message"), FILES.values(), ids=FILES)
def test_files_that_cannot_be_used(write, monkeypatch, name, content, message):
    monkeypatch.setattr(text_module, "PIECE", 4)
    with pytest.raises(DataError) as caught:
        calibration_batches(calibration(write(name, content)), Characters())
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["no.txt", "no.jsonl", "no.parquet"])
def test_files_that_are_not_there(tmp_path, name):
    with pytest.raises(DataError, match=f"{tmp_path}/{name}: a readable text file is required, found: No such file"):
        calibration_batches(calibration(tmp_path / name), Characters())


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"a.txt: a regular file of text is required, found a pipe or a device; name a"):
        calibration_batches(calibration(tmp_path / "a.txt"), Characters())


def test_patterns_are_not_expanded(write):
    """A name with such a character in it may be there."""
    kept = write("a.txt", "abcdefgh")
    with pytest.raises(DataError, match="found: No such file or directory: patterns are not expanded, name each file"):
        calibration_batches(calibration(kept.with_name("*.txt")), Characters())
    assert calibration_batches(calibration(write("[1].txt", "abcdefgh")), Characters())
