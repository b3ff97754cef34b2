"""Calibration and evaluation tokens. Oracles: a tokenizer of one token a character, for which every expected token can
be written down; the tokens of a whole text at once; hashlib over hand-made bytes."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch

from ptq.calibration import text as text_module
from ptq.calibration.data import calibration_batches, evaluation_windows, token_hash
from ptq.calibration.text import pieces
from ptq.config import CalibrationConfig, DatasetConfig, EvaluationConfig
from ptq.errors import DataError

ROOT = Path(__file__).resolve().parent.parent
BOS, EOS = 1, 2


class Characters:
    """A tokenizer: each character is its code point. Records how long the texts were that it saw."""

    all_special_ids = (BOS, EOS)

    def __init__(self, adds_bos=True, eos=EOS, template=None):
        self.adds_bos, self.bos_token_id, self.eos_token_id, self.chat_template = adds_bos, BOS, eos, template
        self.longest = 0

    def __call__(self, text, add_special_tokens=True, verbose=True):
        self.longest = max(self.longest, len(text))
        start = [BOS] if self.adds_bos and add_special_tokens else []
        return {"input_ids": start + [ord(character) for character in text]}

    def get_chat_template(self):
        return self.chat_template

    def apply_chat_template(self, messages, tokenize):
        assert not tokenize
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


def calibration(*files, **changes):
    settings = {"samples": 2, "sequence_length": 4, "batch_size": 2, **changes}
    column = settings.pop("column", "text")
    return CalibrationConfig(dataset=DatasetConfig(files=tuple(map(str, files)), column=column), **settings)


def evaluation(*files, **changes):
    return EvaluationConfig(files=tuple(map(str, files)), **changes)


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def strings(batches):
    return ["".join(map(chr, row)) for batch in batches for row in batch.tolist()]


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (Characters(adds_bos=True), "\1abc\1defgh"),
        (Characters(adds_bos=False), "abc\2defgh\2"),
        (Characters(adds_bos=False, eos=None), "abcdefgh"),
    ],
)
def test_documents_are_packed_with_the_tokenizers_own_mark_between_them(write, tokenizer, expected):
    file = write("a.jsonl", lines({"text": "abc"}, {"text": ""}, {"text": "defgh"}))
    batches = calibration_batches(calibration(file), tokenizer)
    assert [batch.shape for batch in batches] == [(2, 4)]
    assert batches[0].dtype == torch.int64
    assert "".join(strings(batches)) == expected[:8], "two windows are all there are, in order"


@pytest.mark.parametrize(
    ("single", "named", "start", "end"),
    [
        ("<|bos|> $A", ("bos", "eos"), [0], []),
        ("<|bos|> $A", (), [0], []),
        ("<|bos|> $A", ("eos",), [0], []),
        ("<|bos|> <|eos|> $A", ("eos",), [0, 1], []),
        ("$A", ("bos", "eos"), [], [1]),
        ("$A <|eos|>", ("eos",), [], [1]),
        ("$A <|eos|>", (), [], []),
    ],
    ids=["bos", "nothing-named", "eos-named", "two-tokens", "bos-unused", "only-an-end", "end-not-named"],
)
def test_a_text_starts_as_the_tokenizer_starts_it(write, single, named, start, end):
    """Oracle: the template of the tokenizer, written by hand. What it ends with counts only where it names it eos."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    built = Tokenizer.from_file(str(ROOT / "examples/tiny-llama/tokenizer.json"))
    built.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<|bos|>", 0), ("<|eos|>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, **{f"{name}_token": f"<|{name}|>" for name in named})
    text = "One of the two. " * 8
    inside = tokenizer(text, add_special_tokens=False)["input_ids"]
    length = len(start + inside + end)
    file = write("a.txt", text)
    (batch,) = calibration_batches(calibration(file, samples=1, sequence_length=length), tokenizer)
    assert batch[0].tolist() == start + inside + end
    length -= len(end)
    (window,) = evaluation_windows(evaluation(file, window=length, stride=length, tokens=length), tokenizer)
    assert window.tokens.tolist() == start + inside


@pytest.mark.parametrize("name", ["A.TXT", "A.Jsonl", "A.JSONL"])
def test_endings_in_capitals(write, name):
    """Oracle: the same file with its ending in small letters."""
    content = "abcdefgh" if name.endswith("TXT") else lines({"text": "abcdefgh"})
    found, expected = (
        strings(calibration_batches(calibration(write(each, content)), Characters())) for each in (name, name.lower())
    )
    assert found == expected


def test_several_files_of_several_kinds(write):
    files = [write("a.txt", "ab\ncd"), write("b.jsonl", lines({"body": "efg"}))]
    batches = calibration_batches(calibration(*files, column="body", sequence_length=5), Characters())
    assert strings(batches) == ["\1ab\nc", "d\1efg"]


def test_windows_are_drawn_from_the_whole_text_without_overlap(write):
    text = "".join(chr(1000 + index) for index in range(4000))
    file = write("a.txt", text)
    config = calibration(file, samples=100, sequence_length=10, batch_size=32)
    batches = calibration_batches(config, Characters(adds_bos=False))
    assert [len(batch) for batch in batches] == [32, 32, 32, 4]
    starts = [row[0].item() - 1000 for batch in batches for row in batch]
    assert all(torch.equal(row, row[0] + torch.arange(10)) for batch in batches for row in batch)
    assert all(start % 10 == 0 for start in starts)
    assert starts == sorted(set(starts))
    # 100 of 400 windows: a tenth of the text holds 40 of them; none of its 40 is drawn with chance 0.75**40 = 1e-5.
    assert {start // 400 for start in starts} == set(range(10))
    again = calibration_batches(config, Characters(adds_bos=False))
    other = calibration_batches(calibration(file, samples=100, sequence_length=10, seed=1), Characters(adds_bos=False))
    assert token_hash(again) == token_hash(batches)
    assert token_hash(other) != token_hash(batches)


def test_every_window_is_equally_likely(write):
    """Oracle: the binomial distribution. 400 draws of 1 of 4: 100 each, standard deviation 8.7; 35 is four of them."""
    file = write("a.txt", "abcdefg")
    drawn = [
        strings(calibration_batches(calibration(file, samples=1, sequence_length=2, seed=seed), Characters()))[0]
        for seed in range(400)
    ]
    assert all(abs(drawn.count(window) - 100) < 35 for window in ("\1a", "bc", "de", "fg"))


def test_a_real_tokenizer_sees_the_text_as_if_it_were_one_string(write):
    """Oracle: the tokenizer on the whole text; pieces end between paragraphs, where BPE merges nothing."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/tiny-llama")
    text = (ROOT / "examples/text/eval-novel.txt").read_text(encoding="utf-8")[:60000]
    expected = tokenizer(text, verbose=False)["input_ids"]
    windows = len(expected) // 100
    config = calibration(write("a.txt", text), samples=windows, sequence_length=100)
    batches = calibration_batches(config, tokenizer)
    assert torch.cat(batches).flatten().tolist() == expected[: windows * 100]


def test_a_long_text_is_tokenized_in_pieces(write, monkeypatch):
    monkeypatch.setattr(text_module, "PIECE", 1000)
    text = "".join(f"line {index}\n" for index in range(2000))
    tokenizer = Characters(adds_bos=False, eos=None)
    config = calibration(write("a.txt", text), samples=len(text) // 10, sequence_length=10)
    assert "".join(strings(calibration_batches(config, tokenizer))) == text[: len(text) // 10 * 10]
    assert tokenizer.longest <= 1000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("aa\n\nb\nc dddd", ["aa\n\n", "b\nc dddd"]),
        ("aaa\nb c\nddd", ["aaa\nb c\n", "ddd"]),
        ("aaa bbb ccc", ["aaa bbb", " ccc"]),
        ("aaaaaaaaaaa", ["aaaaaaaa", "aaa"]),
        ("\n\naaaaaaaaa", ["\n\n", "aaaaaaaa", "a"]),
        ("aaaaaaaa", ["aaaaaaaa"]),
        ("", []),
    ],
)
def test_pieces_end_where_words_do(monkeypatch, text, expected):
    monkeypatch.setattr(text_module, "PIECE", 8)
    assert list(pieces([text])) == expected
    assert "".join(pieces(text)) == text, "one chunk a character"


def test_bytes_of_a_character_may_stand_in_two_reads(write, monkeypatch):
    monkeypatch.setattr(text_module, "PIECE", 4)
    text = "aé€𝄞é€𝄞"
    file = write("a.txt", "\ufeff" + text.replace("a", "\r\n"))
    config = calibration(file, samples=1, sequence_length=7)
    assert strings(calibration_batches(config, Characters(adds_bos=False))) == [text.replace("a", "\n")]


def test_parquet_is_read_through_datasets(write, tmp_path):
    import datasets

    rows = {"body": ["abc", "defgh"], "other": [1, 2]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    batches = calibration_batches(calibration(tmp_path / "a.parquet", column="body"), Characters())
    assert strings(batches) == ["\1abc", "\1def"]
    datasets.Dataset.from_dict({"body": ["of another"]}).to_parquet(tmp_path / "b1.parquet")
    (tmp_path / "a.parquet").rename(tmp_path / "b[1].parquet")  # the name of one file, not a pattern for the other
    batches = calibration_batches(calibration(tmp_path / "b[1].parquet", column="body"), Characters())
    assert strings(batches) == ["\1abc", "\1def"]
    (tmp_path / "b1.parquet").rename(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet, row 1: the column 'text' is required, found body"):
        calibration_batches(calibration(tmp_path / "a.parquet"), Characters())


@pytest.fixture
def hub(monkeypatch):
    """Replaces the hub by 50 rows in memory; records what was asked for."""
    import datasets

    asked = {}

    def load_dataset(path, name=None, split=None, streaming=False):
        asked.update(path=path, name=name, split=split, streaming=streaming)
        rows = datasets.Dataset.from_dict({"text": [chr(100 + index) * 3 for index in range(50)]})
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_datasets_are_shuffled_by_the_seed(hub, streaming):
    source = DatasetConfig(name="some/text", config="en", streaming=streaming)

    def draw(seed):
        config = CalibrationConfig(dataset=source, samples=5, sequence_length=4, seed=seed)
        return strings(calibration_batches(config, Characters()))

    first = draw(0)
    assert hub == {"path": "some/text", "name": "en", "split": "train", "streaming": streaming}
    assert first == draw(0) != draw(1)
    assert first != sorted(first), "not just the beginning"
    assert all(row == "\1" + row[1] * 3 for row in first)


def test_rows_of_a_dataset_are_scored_as_paragraphs_in_order(hub):
    config = EvaluationConfig(dataset=DatasetConfig(name="some/text", split="test"), tokens=11, window=11, stride=11)
    (window,) = evaluation_windows(config, Characters())
    assert strings([window.tokens[None]]) == ["\1ddd\n\neee\n\n"]


@pytest.mark.parametrize("error", [ConnectionError("no route\nmore"), ValueError("no split"), TimeoutError()])
def test_an_unreachable_hub_is_one_sentence(monkeypatch, error):
    import datasets

    def load_dataset(**options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    reason = (str(error) or "TimeoutError").splitlines()[0]
    with pytest.raises(DataError) as caught:
        calibration_batches(CalibrationConfig(dataset=DatasetConfig(name="some/text")), Characters())
    assert str(caught.value) == (
        f"the dataset some/text: it must be readable, found: {reason}; "
        "check its name and the network, or use local files"
    )


def test_without_the_datasets_package(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    file = write("a.txt", "abcdefgh")
    assert len(calibration_batches(calibration(file), Characters())) == 1
    with pytest.raises(DataError, match="b.parquet: the package datasets is required, found none; pip install dat"):
        calibration_batches(calibration(write("b.parquet", "")), Characters())


def test_tokens_that_the_model_cannot_embed(write):
    tokenizer = Characters()
    file = write("a.txt", "abcdefgh")
    tokenizer.embedding_rows = ord("h") + 1
    assert len(calibration_batches(calibration(file), tokenizer)) == 1
    tokenizer.embedding_rows = ord("h")
    message = r"must be below the model's vocabulary size of 104, found 104: the tokenizer is another model's"
    with pytest.raises(DataError, match=message):
        calibration_batches(calibration(file), tokenizer)
    with pytest.raises(DataError, match=message):
        list(evaluation_windows(evaluation(file, window=4, stride=4), tokenizer))
    tokenizer.embedding_rows = BOS  # what it starts a text with counts, too
    with pytest.raises(DataError, match=r"vocabulary size of 1, found 1: the tokenizer"):
        calibration_batches(calibration(write("b.txt", "\0" * 8)), tokenizer)


def test_blank_documents_teach_nothing_and_are_left_out(write):
    """Rows of blanks count as empty ones do; blanks before and inside a document are its own."""
    file = write(
        "a.jsonl", lines({"text": "\n \n"}, {"text": " ab"}, {"text": "\t"}, {"text": "c\n\n\n"}, {"text": ""})
    )
    assert strings(calibration_batches(calibration(file), Characters())) == ["\1 ab", "\1c\n\n"]
    with pytest.raises(DataError, match="calibration needs 2 x 4 = 8 tokens, found 0; use more text"):
        calibration_batches(calibration(write("a.txt", "\n" * 100)), Characters())


def test_the_hash_is_over_shapes_and_little_endian_tokens():
    batches = [torch.tensor([[1, 2]]), torch.tensor([[-1], [1 << 40]])]
    expected = hashlib.sha256(
        b"(1, 2)" + bytes([1, *[0] * 7, 2, *[0] * 7]) + b"(2, 1)" + bytes([*[255] * 8, *[0] * 5, 1, 0, 0])
    ).hexdigest()
    assert token_hash(batches) == expected
    assert token_hash([batches[0].T.contiguous()]) != token_hash([batches[0]])
