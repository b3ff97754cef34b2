"""Calibration on conversations. Oracle: a template and a tokenizer (test_data) whose tokens can be written down."""

import pytest
from test_data import ROOT, Characters, calibration, lines, strings

from ptq.calibration.data import calibration_batches
from ptq.errors import DataError

MESSAGES = [{"role": "user", "content": "how are you?"}, {"role": "assistant", "content": "well"}]


def test_conversations_are_rendered_cut_and_grouped_by_length(write):
    rows = [MESSAGES, "a prompt of its own", [{"role": "user", "content": "short"}], MESSAGES, "x" * 100]
    file = write("a.jsonl", lines(*({"chat": row} for row in rows)))
    config = calibration(file, column="chat", samples=4, sequence_length=30, batch_size=8, chat_template=True)
    batches = calibration_batches(config, Characters(template="yes"))
    rendered = "<user>how are you?<assistant>well"[:30]
    assert [strings([batch]) for batch in batches] == [
        [rendered, rendered, "<user>" + "x" * 24],
        ["<user>a prompt of its own"],
    ], "'<user>short' has 11 tokens, fewer than 16"


def test_conversations_need_what_they_need(write):
    file = write("a.jsonl", lines({"text": MESSAGES}, {"text": "hi"}))
    config = calibration(file, sequence_length=30, chat_template=True)
    with pytest.raises(DataError, match=r"chat_template is true, but the tokenizer has no chat template; use"):
        calibration_batches(config, Characters())
    named = Characters(template={"tool_use": "yes", "rag": "yes"})
    with pytest.raises(DataError, match=r"template called default; it has 'rag', 'tool_use': save the one that fits"):
        calibration_batches(config, named)
    with pytest.raises(DataError, match=r"needs 2 rows of 16 tokens or more, found 1; use more rows or fewer samples"):
        calibration_batches(config, Characters(template="yes"))
    file = write("b.jsonl", lines({"text": []}))
    with pytest.raises(DataError, match=r"b.jsonl, line 1: at least one message is required, found an empty list"):
        calibration_batches(calibration(file, chat_template=True), Characters(template="yes"))
    for keys in ({"from": "human", "value": "hi"}, {"role": "user"}, {"content": "hi"}):
        file = write("b.jsonl", lines({"text": MESSAGES}, {"text": [MESSAGES[0], keys]}))
        with pytest.raises(
            DataError, match=f"line 2: messages must have the keys role and content, found '{next(iter(keys))}'"
        ):
            calibration_batches(calibration(file, chat_template=True), Characters(template="yes"))
    for value, kind in ((3, "int"), (["a"], "list")):
        file = write("b.jsonl", lines({"text": value}))
        with pytest.raises(DataError, match=f"line 1: a list of messages .* or a prompt is required, found {kind}"):
            calibration_batches(calibration(file, chat_template=True), Characters(template="yes"))
    with pytest.raises(DataError, match=r"chat_template: true needs rows, found a .txt file; use .jsonl or .parquet"):
        calibration_batches(calibration(write("c.txt", "a"), chat_template=True), Characters(template="yes"))


def test_a_template_that_refuses_names_the_row(write):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/tiny-llama")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    )
    good = write("a.jsonl", lines({"text": MESSAGES}))
    config = calibration(good, samples=1, sequence_length=64, chat_template=True)
    (batch,) = calibration_batches(config, tokenizer)
    assert tokenizer.decode(batch[0]) == "[user] how are you?\n[assistant] well\n"
    bad = write("b.jsonl", "\n" + lines({"text": [{"role": "tool", "content": "x"}]}))
    with pytest.raises(DataError, match=r"b.jsonl, line 2: the chat template refuses this conversation: no tools"):
        calibration_batches(calibration(bad, chat_template=True), tokenizer)


@pytest.mark.parametrize("template", ["{{ messages + 1 }}", "{{ 1 // 0 }}", "{{ '%d' % 'a' }}", "{{ {}.a.b }}"])
def test_a_template_that_fails_names_the_row(template, write):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/tiny-llama")
    tokenizer.chat_template = template
    file = write("a.jsonl", lines({"text": MESSAGES}))
    with pytest.raises(DataError, match=r"a.jsonl, line 1: the chat template refuses this conversation: .*; leave it"):
        calibration_batches(calibration(file, chat_template=True), tokenizer)


def test_half_of_a_surrogate_pair_in_a_conversation_names_the_row(write):
    file = write("a.jsonl", lines({"text": [{"role": "user", "content": "\ud800"}]}))
    with pytest.raises(DataError, match=r"a.jsonl, line 1: text that UTF-8 can hold is required, .* U\+D800"):
        calibration_batches(calibration(file, chat_template=True), Characters(template="yes"))
