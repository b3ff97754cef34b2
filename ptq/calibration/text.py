"""Text of any length, in pieces: local ``.txt``, ``.jsonl``, ``.json`` and ``.parquet`` files and hub datasets.

All but parquet is read here, without the ``datasets`` package, and may be packed by gzip. Nothing holds more than a
document's row or a piece of about a million characters at once, but for a ``.json`` file that is one list.
"""

import codecs
import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ptq.config import DatasetConfig
from ptq.errors import DataError

PIECE = 1 << 20  # characters tokenized at once; a longer piece is no faster
SHUFFLE_BUFFER = 10_000  # rows of a streamed dataset that are mixed


class Row(NamedTuple):
    """One value of the configured column, where it stood (for errors), and what its row has as ``tools``."""

    value: object
    place: str
    tools: object = None

    def text(self) -> str:
        """The value, which must be text. Raises DataError."""
        if not isinstance(self.value, str):
            raise DataError(
                f"{self.place}: the column must hold text, found {type(self.value).__name__}; "
                "name the column that holds text, or set calibration.chat_template: true for conversations"
            )
        return encodable(self.value, self.place)


def encodable(text: str, place: str) -> str:
    """The text itself. Raises DataError for half of a surrogate pair: JSON can spell one, no tokenizer can read it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: text that UTF-8 can hold is required, found the lone surrogate U+{ord(text[error.start]):04X} "
            f"at character {error.start}; correct the row"
        ) from error
    return text


def documents(source: DatasetConfig, seed: int) -> Iterator[Iterator[str]]:
    """The documents of ``source`` as pieces of text: a ``.txt`` file is one document, elsewhere each row is one.

    Files are read in order. A hub dataset is shuffled by ``seed``, when streamed within a buffer of rows. Raises
    DataError.
    """
    for part in parts(source):
        if _is_plain(part):
            yield pieces(_decoded(Path(part.files[0])))
        else:
            for row in rows(part, seed):
                yield pieces([row.text()])


def running_text(source: DatasetConfig, size: int) -> Iterator[str]:
    """All of ``source`` in order as one text in pieces of at most ``size`` characters; rows are joined by blank lines.

    This is how perplexities of wikitext are published, whose rows are paragraphs.
    """

    def joined() -> Iterator[str]:
        for index, row in enumerate(rows(source, None)):
            yield "\n\n" + row.text() if index else row.text()

    return pieces(_decoded(Path(source.files[0])) if _is_plain(source) else joined(), size)


def parts(source: DatasetConfig) -> list[DatasetConfig]:
    """``source`` itself when it is a hub dataset, else one source a file."""
    if source.name is not None:
        return [source]
    return [DatasetConfig(files=(file,), column=source.column) for file in source.files]


def rows(source: DatasetConfig, seed: int | None) -> Iterator[Row]:
    """Values of ``source.column``, row by row; ``seed`` shuffles a hub dataset (None: in order). Raises DataError."""
    if source.name is not None:
        yield from _hub_rows(source, seed)
    for name in source.files:
        path = Path(name)
        suffix = _suffix(path)
        if suffix == ".jsonl":
            yield from _json_rows(path, source.column)
        elif suffix == ".json":
            yield from (_list_rows if _is_list(path) else _json_rows)(path, source.column)
        elif suffix == ".parquet":
            yield from _parquet_rows(path, source.column)
        elif suffix == ".txt":
            raise DataError(f"{path}: chat_template: true needs rows, found a .txt file; use .jsonl, .json or .parquet")
        else:
            _open(path).close()  # a file that is not there has no other fault
            raise DataError(
                f"{path}: a .txt, .jsonl, .json (or any of these with .gz) or .parquet file is required, found "
                f"{suffix!r}; convert it"
            )


def pieces(chunks: Iterable[str], size: int | None = None) -> Iterator[str]:
    """The same text in pieces of at most ``size`` and ``PIECE`` characters, cut where a tokenizer hardly notices."""
    size = PIECE if size is None else min(size, PIECE)
    buffer = ""
    for chunk in chunks:
        buffer += chunk
        start = 0
        while len(buffer) - start > size:
            cut = _boundary(buffer, start, size)
            yield buffer[start:cut]
            start = cut
        buffer = buffer[start:]
    if buffer:
        yield buffer


def _boundary(text: str, start: int, size: int) -> int:
    """Just after the last paragraph, else line, of ``size`` characters from ``start``; else before the last space."""
    for mark, offset in (("\n\n", 2), ("\n", 1), (" ", 0)):
        cut = text.rfind(mark, start, start + size)
        if cut > start:
            return cut + offset
    return start + size


def _is_plain(source: DatasetConfig) -> bool:
    return source.name is None and _suffix(Path(source.files[0])) == ".txt"


def _suffix(path: Path) -> str:
    """What a file's name says of its content; without ``.gz`` where that may be."""
    inner = Path(path.stem).suffix.lower()
    return inner if path.suffix.lower() == ".gz" and inner in (".txt", ".jsonl", ".json") else path.suffix.lower()


@contextmanager
def _unpacked(path: Path) -> Iterator[io.BufferedIOBase]:
    """The bytes of a file, where its name ends in ``.gz`` those that gzip packed. Raises DataError, also while read."""
    with _open(path) as file:
        if path.suffix.lower() != ".gz":
            yield file
            return
        try:
            with gzip.GzipFile(fileobj=file) as packed:
                yield packed
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(
                f"{path}: a whole file of gzip is required, found: {error}; fetch or pack it again"
            ) from error


def _open(path: Path) -> io.BufferedReader:
    try:
        other = path.exists() and not (path.is_file() or path.is_dir())
        if not other:
            return path.open("rb")
    except OSError as error:
        advice = ": patterns are not expanded, name each file" if any(sign in path.name for sign in "*?[") else ""
        raise DataError(
            f"{path.absolute()}: a readable text file is required, found: {error.strerror}{advice}"
        ) from error
    # Of a pipe nothing may ever come, and what comes, comes once.
    raise DataError(
        f"{path.absolute()}: a regular file of text is required, found a pipe or a device; name a file, or write it to "
        "one first"
    )


def _undecodable(path: Path, start: int, error: UnicodeDecodeError) -> DataError:
    """``start``: offset in the file of the bytes that were being decoded."""
    offset = start + error.start
    byte = error.object[error.start]
    return DataError(f"{path}: UTF-8 text is required, found byte 0x{byte:02x} at offset {offset}; convert the file")


def _decoded(path: Path) -> Iterator[str]:
    """A text file chunk by chunk, line ends as ``\\n``."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    position = 0
    with _unpacked(path) as file:
        while True:
            data = file.read(PIECE)
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                # The decoder keeps the first bytes of a character that the chunk before cut in two.
                raise _undecodable(path, position + len(data) - len(error.object), error) from error
            yield text.removeprefix("\ufeff") if position == 0 else text
            position += len(data)
            if not data:
                return


def _json_rows(path: Path, column: str) -> Iterator[Row]:
    position = 0
    with _unpacked(path) as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}, line {number}"
            try:
                text = line.decode("utf-8").removeprefix("\ufeff")
            except UnicodeDecodeError as error:
                raise _undecodable(path, position, error) from error
            position += len(line)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:  # a number of more digits than Python reads is a ValueError
                raise DataError(f"{place}: a JSON object is required, found: {error}; correct the line") from error
            yield _row(row, column, place)


def _is_list(path: Path) -> bool:
    """Whether JSON begins as a list; what begins otherwise is taken for one object a line, as ``datasets`` does."""
    with _unpacked(path) as file:
        return file.read(PIECE).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _list_rows(path: Path, column: str) -> Iterator[Row]:
    with _unpacked(path) as file:
        data = file.read()
    try:
        found = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _undecodable(path, 0, error) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: a JSON list of objects is required, found: {error}; correct the file") from error
    for number, row in enumerate(found, start=1):
        yield _row(row, column, f"{path}, row {number}")


def _row(row: Any, column: str, place: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{place}: a JSON object is required, found {type(row).__name__}; correct it")
    if column not in row:
        columns = ", ".join(row)
        raise DataError(f"{place}: the column {column!r} is required, found {columns}; name one of these as its column")
    return Row(row[column], place, row.get("tools"))


def _parquet_rows(path: Path, column: str) -> Iterator[Row]:
    _open(path).close()  # datasets' own error for a missing file is about patterns
    options = {"path": "parquet", "data_files": glob.escape(str(path)), "split": "train", "streaming": True}
    yield from _dataset_rows(str(path), column, None, "is the file whole, and parquet?", **options)


def _hub_rows(source: DatasetConfig, seed: int | None) -> Iterator[Row]:
    place = f"the dataset {source.name}"
    options = {"path": source.name, "name": source.config, "split": source.split, "streaming": source.streaming}
    yield from _dataset_rows(
        place, source.column, seed, "check its name and the network, or use local files", **options
    )


def _dataset_rows(place: str, column: str, seed: int | None, advice: str, **options: Any) -> Iterator[Row]:
    """Rows by way of the ``datasets`` package; ``options`` are those of ``datasets.load_dataset``.

    ``advice``: what to do where they cannot be read.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{place}: the package datasets is required, found none; pip install datasets") from error
    try:
        dataset = datasets.load_dataset(**options)
        if seed is not None:
            dataset = dataset.shuffle(seed, **({"buffer_size": SHUFFLE_BUFFER} if options["streaming"] else {}))
        for number, row in enumerate(dataset, start=1):
            yield _row(row, column, f"{place}, row {number}")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{place}: it must be readable, found: {reason}; {advice}") from error
