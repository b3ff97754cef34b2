"""Windows of text that are scored. Oracles: a loop over positions of the whole text; a tokenizer of one token a
character, for which every window can be written down."""

import pytest
from test_data import Characters, evaluation, strings

from ptq.calibration import text as text_module
from ptq.calibration.data import evaluation_windows
from ptq.errors import DataError


@pytest.mark.parametrize(("window", "stride"), [(4, 4), (4, 1), (5, 3), (2, 2)])
@pytest.mark.parametrize("size", [5, 6, 19, 20, 50])
def test_windows_score_each_token_once(write, monkeypatch, window, stride, size):
    """Oracle: a loop over positions of the whole text."""
    monkeypatch.setattr(text_module, "PIECE", 7)
    text = "\1" + "".join(chr(300 + index) for index in range(size))
    config = evaluation(write("a.txt", text[1:]), tokens=20, window=window, stride=stride)
    scored = []
    for index, (tokens, first_target) in enumerate(evaluation_windows(config, Characters())):
        start = index * stride
        assert strings([tokens[None]]) == [text[start : start + window]]
        scored += range(start + first_target, start + window)
    last = start + window
    assert last <= min(20, len(text)) < last + stride, "as many windows as fit"
    unseen = set(range(stride, last, stride)) if window == stride else set()  # first of a window: nothing before it
    assert scored == [position for position in range(1, last) if position not in unseen]


def test_files_share_the_tokens_and_no_window_spans_two(write):
    files = [write("a.txt", "a" * 5), write("b.txt", "b" * 50), write("c.txt", "c" * 50)]
    windows = list(evaluation_windows(evaluation(*files, tokens=26, window=3, stride=3), Characters(adds_bos=False)))
    # 26 // 3 = 8 tokens for a, which has one window of 3; (26 - 3) // 2 = 11 for b: 9; 14 are left for c: 12
    assert strings([window.tokens[None] for window in windows]) == ["aaa"] + ["bbb"] * 3 + ["ccc"] * 4


def test_a_short_evaluation_tokenizes_little_of_a_long_text(write):
    tokenizer = Characters(adds_bos=False)
    file = write("a.txt", "".join(f"line {index}\n" for index in range(2000)))
    windows = list(evaluation_windows(evaluation(file, tokens=20, window=10, stride=10), tokenizer))
    assert strings([window.tokens[None] for window in windows]) == ["line 0\nlin", "e 1\nline 2"]
    assert 20 <= tokenizer.longest <= 320


def test_text_shorter_than_a_window(write):
    config = evaluation(write("a.txt", "abc"), window=5, stride=5)
    with pytest.raises(DataError, match=r"a.txt: a window of 5 tokens is required, found 4 tokens; use more text or a"):
        list(evaluation_windows(config, Characters()))


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize(("name", "text", "found"), [
    ("a.txt", "", "the file is empty"), ("a.jsonl", "\n", "found none"),
])  # fmt: skip
def test_a_file_without_text_to_evaluate_on(write, name, text, found, adds_bos):
    with pytest.raises(DataError, match=f"{name}: text is required, {found}; use other text"):
        list(evaluation_windows(evaluation(write(name, text), window=5, stride=5), Characters(adds_bos=adds_bos)))
