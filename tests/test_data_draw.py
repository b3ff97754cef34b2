"""Large local text, of which a random part is tokenized. Oracles: the definition (the smallest of the same random
numbers, sorted), the binomial distribution, and text whose every character tells where it stood."""

import random
from itertools import accumulate, pairwise

import pytest
from test_data import Characters, calibration, lines, strings

from ptq.calibration import data as data_module
from ptq.calibration import draw as draw_module
from ptq.calibration.data import calibration_batches, token_hash
from ptq.calibration.draw import draw_part, stretches


@pytest.fixture
def small_limits(monkeypatch):
    """As if 2,000 characters, or 20 conversations, were much."""
    monkeypatch.setattr(data_module, "WHOLE_TEXT", 2000)
    monkeypatch.setattr(data_module, "WHOLE_ROWS", 20)
    monkeypatch.setattr(data_module, "SPARE", 2)
    monkeypatch.setattr(draw_module, "STRETCH", 100)


class Counting(Characters):
    """Counts what it tokenized. ``every``: so many characters make a token."""

    def __init__(self, every=1, **options):
        super().__init__(**options)
        self.every, self.seen = every, 0

    def __call__(self, text, add_special_tokens=True, verbose=True):
        self.seen += len(text)
        tokens = super().__call__(text, add_special_tokens)["input_ids"]
        return {"input_ids": tokens[:: self.every]}


@pytest.mark.parametrize("most", [1, 7, 50, 10_000])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_part_is_what_has_the_smallest_numbers(most, seed):
    sizes = [1 + (7 * index) % 11 for index in range(60)]
    numbers = random.Random(seed)
    order = sorted(range(60), key=[numbers.random() for _ in sizes].__getitem__)
    sums = list(accumulate(sizes[index] for index in order))
    expected = sorted(order[: 1 + sum(total < most for total in sums)])
    part, whole = draw_part(iter(range(60)), sizes.__getitem__, most, seed)
    assert (part, whole) == (expected, len(expected) == 60)


def test_every_unit_is_equally_likely():
    """400 draws of 5 of 20: each 100 times, standard deviation 8.7; 40 is more than four of them."""
    drawn = [unit for seed in range(400) for unit in draw_part(range(20), lambda unit: 1, 5, seed)[0]]
    assert len(drawn) == 2000
    assert all(abs(drawn.count(unit) - 100) < 40 for unit in range(20))


def test_documents_are_cut_into_stretches_and_never_joined(monkeypatch):
    monkeypatch.setattr(draw_module, "STRETCH", 4)
    assert list(stretches([["ab", "cdef"], ["gh"], []])) == ["abcd", "ef", "gh"]


def test_of_a_long_text_a_part_is_tokenized(write, small_limits):
    text = "".join(chr(1000 + index) for index in range(30_000))
    config = calibration(write("a.txt", text), samples=40, sequence_length=10)
    tokenizer = Counting(adds_bos=True)
    windows = strings(calibration_batches(config, tokenizer))
    assert 2000 <= tokenizer.seen < 2100, "not 30,000"
    assert len(windows) == 40
    starts = [ord(window.lstrip("\1")[0]) - 1000 for window in windows]
    assert starts == sorted(starts), "in the order of the text"
    # 40 windows of about 20 stretches of 300: none of a third of the text has chance (2/3)**20 = 3e-4
    assert {start // 10_000 for start in starts} == {0, 1, 2}
    for window in windows:  # what does not stand side by side in the text has a mark between
        for one, two in pairwise(window):
            assert "\1" in (one, two) or ord(two) == ord(one) + 1


def test_a_part_depends_on_the_seed_alone(write, small_limits):
    file = write("a.jsonl", lines(*({"text": chr(1000 + index) * 50} for index in range(500))))
    hashes = [
        token_hash(calibration_batches(calibration(file, samples=9, seed=seed), Characters())) for seed in (0, 0, 1)
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_text_up_to_the_limit_is_read_as_ever(write, small_limits, monkeypatch):
    """Oracle: the same text where the limit is far."""
    file = write("a.txt", "".join(chr(1000 + index) for index in range(2000)))
    config = calibration(file, samples=50, sequence_length=10)
    found = strings(calibration_batches(config, Characters()))
    monkeypatch.setattr(data_module, "WHOLE_TEXT", 1 << 22)
    assert found == strings(calibration_batches(config, Characters()))


def test_a_part_that_gives_too_few_tokens_grows(write, small_limits):
    """Tokens of 50 characters: 2,000 characters are 40 of them, where 200 are needed and the text has 600."""
    file = write("a.txt", "".join(chr(1000 + index) for index in range(30_000)))
    tokenizer = Counting(every=50, adds_bos=False, eos=None)
    assert len(strings(calibration_batches(calibration(file, samples=20, sequence_length=10), tokenizer))) == 20
    message = r"calibration needs 61 x 10 = 610 tokens, found 600; use more text"
    with pytest.raises(data_module.DataError, match=message):
        calibration_batches(calibration(file, samples=61, sequence_length=10), tokenizer)


def test_of_many_conversations_a_part_is_rendered(write, small_limits):
    rows = [{"text": [{"role": "user", "content": chr(1000 + index) * 20}]} for index in range(400)]
    config = calibration(write("a.jsonl", lines(*rows)), samples=8, sequence_length=30, chat_template=True)
    tokenizer = Counting(template="any")
    drawn = [ord(text[-1]) - 1000 for text in strings(calibration_batches(config, tokenizer))]
    assert tokenizer.seen == 20 * len("<user>" + 20 * "c")
    assert len(set(drawn)) == 8
    assert drawn == sorted(drawn)
    assert max(drawn) > 100, "not the first ones: 8 of the first quarter have chance 4**-8 = 2e-5"


def test_conversations_that_are_mostly_too_short(write, small_limits):
    """Five of 400 are long enough: a part of 20 holds none or one of them, all of them are found."""
    rows = [{"text": [{"role": "user", "content": "c" * (20 if index % 80 == 7 else 1)}]} for index in range(400)]
    file = write("a.jsonl", lines(*rows))
    config = calibration(file, samples=5, sequence_length=30, chat_template=True)
    assert len(strings(calibration_batches(config, Characters(template="any")))) == 5
    config = calibration(file, samples=6, sequence_length=30, chat_template=True)
    with pytest.raises(data_module.DataError, match="needs 6 rows of 16 tokens or more, found 5; use more rows"):
        calibration_batches(config, Characters(template="any"))
