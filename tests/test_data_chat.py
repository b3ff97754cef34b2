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
    with pytest.raises(
        DataError, match=r"chat_template: true needs rows, found a .txt file; use .jsonl, .json or .parquet"
    ):
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


EVERY_CODE = (
    "%a %A %b %B %c %C %d %D %e %f %F %g %G %h %H %I %j %k %l %m %M %n %p %P %r %R %S %t %T %u %U %V %w %W %x %X %y %Y "
    "%z %Z. %-d %-e %-g %-H %-I %-j %-k %-l %-m %-M %-S %-u %-U %-V %-w %-W %-y %-Y, %Y-%m-%d, %%d 100%% %%%d"
)


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


@pytest.mark.parametrize("of_each", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_tools_may_be_one_schema_or_texts_of_schemas(alone, of_each, write):
    tools = [{"name": "weather"}] if alone else [{"name": "weather"}, {"name": "time"}]
    column = [json.dumps(tool) for tool in tools] if of_each else tools
    tokenizer = tokenizer_with("{{ tools | tojson }}{{ messages[0].content }}")
    found = text_of(write, tokenizer, text=MESSAGES, tools=column[0] if alone else column)
    assert found == json.dumps(tools) + MESSAGES[0]["content"]


@pytest.mark.parametrize(
    "tools", ["weather", "None", ["search", "calc"], [{"name": "a"}, "calc"], 3, "3", {}, [{}], '{"a": 1}\n{"b": 2}']
)
def test_a_column_tools_that_holds_no_schemas_is_not_read(tools, write):
    tokenizer = tokenizer_with("{{ tools | default('none', true) }} {{ messages[0].content }}")
    assert text_of(write, tokenizer, text=MESSAGES, tools=tools) == "none how are you?"


def test_the_second_of_a_date_is_that_of_greenwich(write):
    """Oracle: GNU date: ``date -u -d 2024-07-26 +%s``."""
    assert text_of(write, tokenizer_with("{{ strftime_now('%s') }}"), text=MESSAGES) == "1721952000"


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


@pytest.mark.parametrize(
    ("content", "turn"),
    [
        (IN_PARTS, "Be brief."),
        (IN_PARTS.replace("p.text", "p.text | upper"), "BE BRIEF."),
        ("{{ m.content }}", "Be brief."),
    ],
)
def test_parts_in_a_template_that_wants_a_system_turn(content, turn, write):
    """Whether it takes parts is seen on the row: on a user's turn alone it fails. Oracle: the text put together."""
    start = "{% if messages[0].role != 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": PARTS},
    ]
    question = "how are you this fine morning, I wonder?"
    found = text_of(write, tokenizer_with(start + LINE + content + ";{% endfor %}"), text=messages)
    assert found == f"[system] {turn};[user] {question.upper() if turn.isupper() else question};"


def test_what_a_template_makes_of_a_texts_words_is_its_own_affair(write):
    """As Qwen3's, which drops what was thought in earlier turns. Oracle: the text put together by hand."""
    template = LINE + IN_PARTS.replace("p.text }", "p.text.split('</think>')[-1] }") + ";{% endfor %}"
    messages = [{"role": "assistant", "content": [{"type": "text", "text": "<think>hm</think>well"}]}]
    assert text_of(write, tokenizer_with(template), text=messages) == "[assistant] well;"


@pytest.mark.parametrize(
    "template",
    [
        LINE + IN_PARTS.replace("'text'", "'words'").replace("<{{ p.type }}>", "") + ";{% endfor %}",
        LINE + "{{ m.content and m.content[0] }};{% endfor %}",
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}",
    ],
    ids=["other-parts", "first", "a-turn-left-out"],
)
def test_parts_that_a_template_shows_in_no_way(template, write):
    messages = [{"role": "user", "content": PARTS}, MESSAGES[1], {"role": "assistant", "tool_calls": []}]
    with pytest.raises(DataError, match=r"line 1: a chat template that shows the text of every part is required; .*"
                       r"leaves some .* out, .* with one text in their place: leave the row out"):  # fmt: skip
        text_of(write, tokenizer_with(template), text=messages)


def test_a_template_that_fails_on_parts_and_on_their_text_names_the_row(write):
    with pytest.raises(DataError, match="line 1: the chat template refuses this conversation: not today; leave it out"):
        text_of(write, tokenizer_with("{{ raise_exception('not today') }}"), text=[{"role": "user", "content": PARTS}])


def test_parts_that_are_bare_text_and_printed_as_a_list(write):
    messages = [{"role": "user", "content": ["how are", " you?"]}]
    with pytest.raises(DataError, match=r"line 1: .* parts of type 'text'; found one of 'str': leave the row out"):
        text_of(write, tokenizer_with(LINE + "{{ m.content }};{% endfor %}"), text=messages)
