"""Calibration on conversations. Oracle: a template and a tokenizer (test_data) whose tokens can be written down."""

import json
from datetime import datetime

import pytest
from test_data import ROOT, Characters, calibration, lines, strings

from ptq.calibration.chat import render
from ptq.calibration.data import calibration_batches
from ptq.calibration.text import rows
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


def tokenizer_with(template):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/tiny-llama")
    tokenizer.chat_template = template
    return tokenizer


def text_of(write, tokenizer, **row):
    """What a row of a file becomes."""
    (found,) = rows(calibration(write("a.jsonl", lines(row))).dataset, 0)
    return render(found, tokenizer)


EVERY_CODE = "%a %A %b %B %d %H %I %j %m %M %p %S %y %Y, %Y-%m-%d"


@pytest.mark.parametrize("start", ["", "\n", "  "])
def test_the_date_of_a_template_is_the_same_on_every_day(start, write):
    """Oracles: the same template with the dates written out, and Python's strftime."""
    turns = "{% for m in messages %}{{ m.content }}{% endfor %}"
    asking = (
        "{% macro day() %}{{ strftime_now('%-d %B %Y') }}{% endmacro %}{% if strftime_now is defined %}"
        "{% set date = strftime_now('" + EVERY_CODE + "') %}{{ day() }}. {{ date }}{% endif %}"
    )
    written = "{% set date = '' %}26 July 2024. " + datetime(2024, 7, 26).strftime(EVERY_CODE)
    found, expected = (
        text_of(write, tokenizer_with(f"{start}{head}. {turns}"), text=MESSAGES) for head in (asking, written)
    )
    assert found == expected


@pytest.mark.parametrize("as_text", [False, True])
def test_a_template_sees_the_tools_of_a_row(as_text, write):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"city": "where to look"}}}]
    tokenizer = tokenizer_with("{% if tools %}{{ tools | tojson }}{% endif %}{{ messages[0].content }}")
    column = json.dumps(tools) if as_text else tools
    found = text_of(write, tokenizer, text=MESSAGES, tools=column)
    assert found == json.dumps(tools) + MESSAGES[0]["content"]
    for nothing in (None, [], "", " "):
        assert text_of(write, tokenizer, text=MESSAGES, tools=nothing) == MESSAGES[0]["content"]


@pytest.mark.parametrize(("tools", "kind"), [("weather", "str"), (["weather"], "list"), (3, "int"), ("3", "str")])
def test_tools_that_are_no_schemas_are_refused(tools, kind, write):
    with pytest.raises(
        DataError, match=f"line 1: the column tools must hold a list of JSON schemas .*, found {kind}; correct it, or"
    ):
        text_of(write, tokenizer_with("{{ messages }}"), text=MESSAGES, tools=tools)


LINE = "{% for m in messages %}[{{ m.role }}] "
IN_PARTS = (
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% else %}<{{ p.type }}>{% endif %}{% endfor %}"
)
PARTS = [{"type": "text", "text": "how are you"}, {"type": "text", "text": " this fine morning, I wonder?"}]


@pytest.mark.parametrize(
    "content",
    [
        "{{ m.content }}",
        "{{ m.content | trim }}",
        "{{ m.content | tojson if m.content is not string else m.content }}",
        "{{ '' + m.content }}",
        "{% if m.content is string %}{{ m.content }}{% endif %}",
        "{% if m.content is string %}{{ m.content }}{% else %}" + IN_PARTS + "{% endif %}",
        IN_PARTS,
    ],
    ids=["prints", "trims", "json", "fails", "leaves-out", "both", "parts-alone"],
)
def test_a_content_of_parts_is_the_text_of_them(content, write):
    """Oracle: the text put together by hand."""
    tokenizer = tokenizer_with(LINE + content + ";{% endfor %}")
    found = text_of(write, tokenizer, text=[{"role": "user", "content": PARTS}])
    assert found == "[user] how are you this fine morning, I wonder?;"


def test_parts_beside_a_content_that_is_text(write):
    tokenizer = tokenizer_with(LINE + "{{ m.content }};{% endfor %}")
    found = text_of(write, tokenizer, text=[{"role": "user", "content": PARTS}, MESSAGES[1]])
    assert found == "[user] how are you this fine morning, I wonder?;[assistant] well;"


@pytest.mark.parametrize(
    ("part", "kind"),
    [({"type": "image", "url": "a.png"}, "'image'"), ({"type": "text"}, "'text'"), ("hello", "'str'"), ({}, "None")],
)
def test_parts_that_are_not_text(part, kind, write):
    """A template that takes parts knows what to make of an image."""
    messages = [{"role": "user", "content": [*PARTS, part]}]
    with pytest.raises(DataError, match=f"line 1: .* parts of type 'text'; found one of {kind}: leave the row out"):
        text_of(write, tokenizer_with(LINE + "{{ m.content }};{% endfor %}"), text=messages)
    tokenizer = tokenizer_with(LINE + IN_PARTS + ";{% endfor %}")
    if kind == "'image'":
        expected = "[user] how are you this fine morning, I wonder?<image>;"
        assert text_of(write, tokenizer, text=messages) == expected
