"""A conversation as the text that the model's chat template makes of it."""

import json
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
CODES = ("%-d", "%-m", "%a", "%A", "%b", "%B", "%d", "%H", "%I", "%j", "%m", "%M", "%p", "%S", "%y", "%Y")


def render(row: Row, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text of one row: a list of messages, or a prompt; its column ``tools`` goes to the template, too.

    Raises:
        DataError: the row is none, or the template refuses it.
    """
    tools = _tools(row)
    messages = _messages(row)
    if any(isinstance(message.get("content"), list) for message in messages) and not _takes_parts(tokenizer):
        messages = [_joined(message, row.place) for message in messages]
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


def _tools(row: Row) -> list[dict[str, Any]] | None:
    """The functions that the model may call, as JSON schemas; many datasets hold the list as JSON text."""
    tools = row.tools
    if isinstance(tools, str):
        with suppress(ValueError):  # refused below
            tools = json.loads(tools) if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(
            f"{row.place}: the column tools must hold a list of JSON schemas for the chat template, found "
            f"{type(row.tools).__name__}; correct it, or give the column another name"
        )
    return tools


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
    codes = "".join(f"|replace('{code}', '{_spelled(code)}')" for code in CODES)
    return f"{{% macro strftime_now(format) %}}{{{{ format{codes} }}}}{{% endmacro %}}\n{template}"


def _spelled(code: str) -> str:
    plain = TODAY.strftime(code.replace("-", ""))
    return plain.lstrip("0") if "-" in code else plain  # "%-d" is not known everywhere


def _takes_parts(tokenizer: Any) -> bool:
    """Whether the template renders a content that is a list of parts: many print it, or leave it out."""
    part = {"type": "text", "text": "Zebra"}
    try:
        text = _applied([{"role": "user", "content": [part]}], None, tokenizer)
    except _failures():
        return False
    return "Zebra" in text and repr(part) not in text and json.dumps(part) not in text


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
