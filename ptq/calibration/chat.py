"""A conversation as the text that the model's chat template makes of it."""

import json
import re
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ptq.calibration.text import Row, encodable
from ptq.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a template that asks for today's date is told, so that the same rows give the same tokens on every day. It is
# the one that Llama 3.1's falls back to.
TODAY = datetime(2024, 7, 26)
NUMBERS = "CdgGHIjklmMSuUVwWyY"  # codes of strftime that may have a "-" for no zeros in front
# Codes that are not known everywhere, or depend on the machine's language or time zone.
SPELLED = {
    "%c": "%a %b %e %H:%M:%S %Y", "%C": "20", "%D": "%m/%d/%y", "%e": "26", "%f": "000000", "%F": "%Y-%m-%d",
    "%g": "24", "%G": "2024", "%h": "%b", "%k": " 0", "%l": "12", "%n": "\n", "%P": "am", "%r": "%I:%M:%S %p",
    "%R": "%H:%M", "%s": "1721952000", "%t": "\t", "%T": "%H:%M:%S", "%u": "5", "%V": "30", "%x": "%m/%d/%y",
    "%X": "%H:%M:%S", "%z": "", "%Z": "",
}  # fmt: skip
PERCENT = "\ue000"  # stands for "%%" until every code is replaced


def render(row: Row, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text of one row: a list of messages, or a prompt; its column ``tools`` goes to the template, too.

    Raises:
        DataError: the row is none, or the template refuses it.
    """
    tools = _tools(row.tools)
    messages = _fitting(_messages(row), tools, tokenizer, row.place)
    try:
        text = _applied(messages, tools, tokenizer)
    except _failures() as error:
        raise DataError(f"{row.place}: the chat template refuses this conversation: {error}; leave it out") from error
    return encodable(text, row.place)


def _messages(row: Row) -> list[dict[str, Any]]:
    messages = [{"role": "user", "content": row.value}] if isinstance(row.value, str) else row.value
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError(
            f"{row.place}: a list of messages ({{role, content}}) or a prompt is required, found "
            f"{type(row.value).__name__}; name the column that holds conversations"
        )
    for message in messages:
        # A template renders what is not there as nothing, so other keys would calibrate on empty turns.
        if "role" not in message or not {"content", "tool_calls"} & message.keys():
            raise DataError(
                f"{row.place}: messages must have the keys role and content, found {', '.join(map(repr, message))}; "
                "rename them, as in {'from': 'human', 'value': ...} to {'role': 'user', 'content': ...}"
            )
    if not messages:
        raise DataError(f"{row.place}: at least one message is required, found an empty list; leave the row out")
    return messages


def _tools(column: Any) -> list[dict[str, Any]] | None:
    """The functions that the model may call, as JSON schemas: many datasets hold them as JSON text, one by one or all.

    A column of that name that holds something else is not for the template.
    """
    found = _read(column)
    tools = [_read(tool) for tool in found] if isinstance(found, list) else [found]
    return tools if all(isinstance(tool, dict) and tool for tool in tools) and tools else None


def _read(value: Any) -> Any:
    """What ``value`` is the JSON text of, or ``value`` itself."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _failures() -> tuple[type[Exception], ...]:
    """A template is a program of the model's: it may fail in any way on what it does not expect."""
    from jinja2 import TemplateError

    return TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError


def _applied(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, tokenizer: Any) -> str:
    given: dict[str, Any] = {"tools": tools} if tools else {}
    template = tokenizer.get_chat_template(**given)
    if "strftime_now" in template:
        given["chat_template"] = _dated(template)
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **given))


def _dated(template: str) -> str:
    """``template`` with a function for the date of its own: transformers passes no function on to a template.

    The line end after a block is dropped, so what the template starts with is still at the start of a line.
    """
    pairs = [("%%", PERCENT), *((code, _spelled(code)) for code in _codes()), (PERCENT, "%")]
    codes = "".join(f"|replace({code!r}, {text!r})" for code, text in pairs)
    return f"{{% macro strftime_now(format) %}}{{{{ format{codes} }}}}{{% endmacro %}}\n{template}"


def _codes() -> list[str]:
    return [*(f"%{letter}" for letter in "aAbBpdHIjmMSUwWyY"), *SPELLED, *(f"%-{letter}" for letter in "e" + NUMBERS)]


def _spelled(code: str) -> str:
    if "-" in code:  # not known everywhere
        return str(int(_spelled(code.replace("-", ""))))
    return TODAY.strftime(re.sub("%.", lambda part: SPELLED.get(part[0], part[0]), SPELLED.get(code, code)))


def _fitting(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, tokenizer: Any, place: str
) -> list[dict[str, Any]]:
    """``messages`` as the template renders them: with one text for the parts of a content where it takes no parts.

    Many templates print a list of parts, leave it out, or fail; and those that take nothing else leave a text out. So
    it is tried on these messages, with a word that is easy to find in place of each text.

    Raises:
        DataError: the template shows the texts in neither way.
    """
    if not any(isinstance(message.get("content"), list) for message in messages):
        return messages
    marked, words = _marked(messages)
    with suppress(*_failures()):
        if _shown(_applied(marked, tools, tokenizer), words, marked):
            return messages
    joined = [_joined(message, place) for message in messages]
    with suppress(*_failures()):  # on the messages themselves it fails, too, and that is what is said
        text = _applied([_joined(message, place) for message in marked], tools, tokenizer)
        if not _shown(text, words, marked):
            raise DataError(
                f"{place}: a chat template that shows the text of every part is required; this model's leaves some of "
                "this conversation out, with its parts as they are and with one text in their place: leave the row out"
            )
    return joined


def _marked(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """``messages`` with a word in place of each text, and the words: one for each part that should be a text."""
    words: list[str] = []

    def mark(part: Any) -> Any:
        if isinstance(part, dict) and part.get("type") != "text" and not isinstance(part.get("text"), str):
            return part  # an image, say
        words.append(f"zebra{len(words)}q")
        if isinstance(part, dict):
            return {**part, "text": words[-1]} if isinstance(part.get("text"), str) else part
        return words[-1] if isinstance(part, str) else part

    marked = [
        {**message, "content": [mark(part) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]
    return marked, words


def _shown(text: str, words: list[str], messages: list[dict[str, Any]]) -> bool:
    """Whether ``text`` has all the words, and no part as Python or JSON has it."""
    bare = "".join(text.split())
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    printed = [each for part in parts for each in (repr(part), json.dumps(part, default=str))]
    return all(word in text.casefold() for word in words) and not any("".join(p.split()) in bare for p in printed)


def _joined(message: dict[str, Any], place: str) -> dict[str, Any]:
    """``message`` with one text for the parts of its content, put together as the templates do that take parts."""
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    texts = []
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise DataError(
                f"{place}: this model's chat template takes content that is text, or parts of type 'text'; found one "
                f"of {kind!r}: leave the row out"
            )
        texts.append(part["text"])
    return {**message, "content": "".join(texts)}
