"""Calibration and evaluation tokens, without padding, from text of any length.

Text is tokenized in pieces, so memory does not grow with it. Where one document ends and the next begins stand the
tokens the tokenizer itself starts a text with (bos, with most), or else its eos.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from itertools import chain, groupby, islice
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from ptq.affixes import around
from ptq.calibration.chat import render
from ptq.calibration.draw import draw_part, stretches
from ptq.calibration.text import Row, documents, parts, pieces, rows, running_text
from ptq.config import CalibrationConfig, EvaluationConfig
from ptq.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

SHORTEST_CHAT = 16  # tokens; a shorter conversation is mostly template
WHOLE_TEXT = 1 << 22  # characters, and ...
WHOLE_ROWS = 10_000  # conversations: local text up to this size is tokenized whole
SPARE = 16  # of a larger one a random part: so many characters a token that is needed, so many conversations a sample


class Window(NamedTuple):
    """A stretch of text to score: the model sees ``tokens``, and the targets from ``first_target`` on count."""

    tokens: Tensor  # int64 [window]
    first_target: int  # 1 or more: what comes before was scored in the window before, or has no context


def calibration_batches(config: CalibrationConfig, tokenizer: "PreTrainedTokenizerBase") -> list[Tensor]:
    """``config.samples`` sequences as int64 ``[batch, length]`` tensors on the CPU; batches hold one length each.

    Local text: windows that do not overlap, drawn at random from all of it, in the order of the text; of a text beyond
    4 million characters (or 16 a token, where that is more) from documents, or stretches of 65,536 characters, that
    are drawn before they are tokenized. Hub datasets: the first ones after shuffling. With ``chat_template`` a sample
    is one row, cut at ``sequence_length`` tokens; rows below 16 tokens are left out. The same configuration gives the
    same tokens, on any day: a template that asks for the date is told 26 July 2024. Raises DataError.
    """
    if config.chat_template and not tokenizer.chat_template:
        raise DataError(
            "calibration.chat_template is true, but the tokenizer has no chat template; use the tokenizer of an "
            "instruction-tuned model, or set it to false and name a column of plain text"
        )
    templates = tokenizer.chat_template
    if config.chat_template and isinstance(templates, dict) and "default" not in templates:
        raise DataError(
            "calibration.chat_template is true, which renders with the tokenizer's chat template called default; it "
            f"has {', '.join(sorted(map(repr, templates)))}: save the one that fits as chat_template.jinja beside "
            "tokenizer.json"
        )
    sequences = _conversations(config, tokenizer) if config.chat_template else _packed(config, tokenizer)
    return in_batches(sequences, config.batch_size)


def in_batches(sequences: Iterable[Tensor], batch_size: int) -> list[Tensor]:
    """Sequences ``[length]`` as ``[batch, length]`` tensors of one length each, the longest first."""
    # The sort is stable: sequences of one length stay in their order.
    ordered = sorted(sequences, key=len, reverse=True)
    batches = []
    for _, group in groupby(ordered, key=len):
        same = list(group)
        batches += [torch.stack(same[start : start + batch_size]) for start in range(0, len(same), batch_size)]
    return batches


def token_hash(batches: Iterable[Tensor]) -> str:
    """SHA-256, in hexadecimal, over each batch's shape and tokens (little-endian int64)."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(repr(tuple(batch.shape)).encode())
        digest.update(batch.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def evaluation_windows(config: EvaluationConfig, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Window]:
    """Windows of ``config.window`` tokens, ``config.stride`` apart, over at most ``config.tokens`` tokens of text.

    The first window of a file scores all its tokens but the first, later ones their last ``stride``. No window spans
    two files; the files share ``config.tokens`` evenly, and what a short one leaves goes to those after it. Rows of a
    dataset are joined by blank lines. Raises DataError.
    """
    sources = parts(config.source)
    remaining = config.tokens
    for index, source in enumerate(sources):
        share = remaining // (len(sources) - index)
        before, _ = _marks(tokenizer)
        text = running_text(source, SPARE * config.tokens)  # of a short evaluation one piece
        counted = _Counted(chain([before], (_tokens(piece, tokenizer) for piece in text)))
        most = 1 + (share - config.window) // config.stride
        count = 0
        for tokens in islice(_sliding(counted, config.window, config.stride), most):
            yield Window(tokens, max(1, config.window - config.stride) if count else 1)
            count += 1
        if count == 0:
            where = source.name or source.files[0]
            if counted.total == len(before):
                found = "found none" if source.name or os.stat(where).st_size else "the file is empty"
                raise DataError(f"{where}: text is required, {found}; use other text")
            raise DataError(
                f"{where}: a window of {config.window} tokens is required, "
                f"found {counted.total} tokens; use more text or a shorter window"
            )
        remaining -= config.window + (count - 1) * config.stride


def require_embeddable(token: int, rows: int) -> None:
    """Raise DataError for a token that a model of ``rows`` embeddings has no row for."""
    if token >= rows:
        raise DataError(
            f"token ids must be below the model's vocabulary size of {rows}, found {token}: the tokenizer is "
            "another model's; copy the model's own tokenizer.json and tokenizer_config.json beside its config.json"
        )


class _Counted:
    """Lists of tokens as they come, and how many tokens there were so far."""

    def __init__(self, stream: Iterable[list[int]]) -> None:
        self.total = 0
        self._stream = stream

    def __iter__(self) -> Iterator[list[int]]:
        for tokens in self._stream:
            self.total += len(tokens)
            yield tokens


def _tokens(piece: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    # verbose=False: no warning that the text is longer than the model's context, which it is never shown at once.
    return _embeddable(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"], tokenizer)


def _embeddable(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    rows = getattr(tokenizer, "embedding_rows", None)  # as load_tokenizer notes them
    if rows is not None:
        require_embeddable(max(ids, default=0), rows)
    return ids


def _marks(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Tokens before and after each document."""
    before, _ = around(tokenizer, tokenizer.all_special_ids)
    if before:
        return _embeddable(before, tokenizer), []
    return [], [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _document_tokens(texts: Iterable[Iterator[str]], tokenizer: "PreTrainedTokenizerBase") -> Iterator[list[int]]:
    before, after = _marks(tokenizer)
    for document in texts:
        first = next((piece for piece in document if not piece.isspace()), None)
        if first is None:  # a row that is empty or all blanks, from which there is nothing to learn
            continue
        yield before
        for piece in chain([first], document):
            yield _tokens(piece, tokenizer)
        yield after


def _texts(config: CalibrationConfig, most: int) -> tuple[Iterator[Iterator[str]], bool]:
    """The documents to draw from, of local text random ones of about ``most`` characters; and whether those are all."""
    if config.dataset.name is None:
        part, whole = draw_part(stretches(documents(config.dataset, config.seed)), len, most, config.seed)
        if not whole:
            return (iter([text]) for text in part), False
    return documents(config.dataset, config.seed), True


def _sliding(stream: Iterable[list[int]], window: int, stride: int) -> Iterator[Tensor]:
    """int64 ``[window]`` tensors, ``stride`` tokens apart; a last one that would be shorter is left out."""
    buffer: list[int] = []
    for tokens in stream:
        buffer += tokens
        start = 0
        while start + window <= len(buffer):
            yield torch.tensor(buffer[start : start + window])
            start += stride
        del buffer[:start]


def _packed(config: CalibrationConfig, tokenizer: "PreTrainedTokenizerBase") -> list[Tensor]:
    """``samples`` windows of exactly ``sequence_length`` tokens."""
    needed = config.samples * config.sequence_length
    most, whole = max(WHOLE_TEXT, SPARE * needed), False
    while not whole:
        texts, whole = _texts(config, most)
        counted = _Counted(_document_tokens(texts, tokenizer))
        kept = _draw(_sliding(counted, config.sequence_length, config.sequence_length), config)
        if len(kept) == config.samples:
            return kept
        most *= SPARE  # tokens of more than 16 characters: long runs of blanks, say
    required = f"{config.samples} x {config.sequence_length} = {needed} tokens"
    raise DataError(
        f"calibration needs {required}, found {counted.total}; use more text, fewer samples or a shorter "
        "sequence_length"
    )


def _conversations(config: CalibrationConfig, tokenizer: "PreTrainedTokenizerBase") -> list[Tensor]:
    """``samples`` rows rendered with the chat template."""

    def sequences(conversations: Iterable[Row]) -> Iterator[Tensor]:
        for row in conversations:
            text = render(row, tokenizer)
            tokens = chain.from_iterable(_tokens(piece, tokenizer) for piece in pieces([text]))
            sequence = list(islice(tokens, config.sequence_length))
            if len(sequence) >= SHORTEST_CHAT:
                yield torch.tensor(sequence)

    most, whole = max(WHOLE_ROWS, SPARE * config.samples), False
    while not whole:
        conversations: Iterable[Row] = rows(config.dataset, config.seed)
        if config.dataset.name is None:
            conversations, whole = draw_part(conversations, lambda row: 1, most, config.seed)
        else:
            whole = True
        kept = _draw(sequences(conversations), config)
        if len(kept) == config.samples:
            return kept
        most *= SPARE
    raise DataError(
        f"calibration needs {config.samples} rows of {SHORTEST_CHAT} tokens or more, found {len(kept)}; "
        "use more rows or fewer samples"
    )


def _draw(sequences: Iterator[T], config: CalibrationConfig) -> list[T]:
    """``samples`` of ``sequences``, fewer when there are not so many.

    A hub dataset was shuffled already, so its first ones do. Of local text each sequence is equally likely, which takes
    one pass and holds ``samples`` at a time (reservoir sampling, Vitter 1985, algorithm R).
    """
    kept = list(enumerate(islice(sequences, config.samples)))
    if config.dataset.name is None:
        generator = torch.Generator().manual_seed(config.seed)
        for index, sequence in enumerate(sequences, start=len(kept)):
            slot = int(torch.randint(index + 1, (), generator=generator))
            if slot < config.samples:
                kept[slot] = (index, sequence)
    return [sequence for _, sequence in sorted(kept, key=lambda pair: pair[0])]
