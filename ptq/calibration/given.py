"""Calibration data that a caller hands over in Python: sequences of token ids as they are, or texts."""

import copy
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ptq.calibration.data import calibration_batches, in_batches
from ptq.config import CalibrationConfig, DatasetConfig
from ptq.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WANTED = "calibration must be a list of token id sequences (int64 [T] or [B, T], lists of ints) or of strings"


class Given:
    """Either sequences of token ids, each a sample, or texts, which are drawn from as from rows of a file."""

    def __init__(self, data: Iterable[Any]) -> None:
        """Raises DataError for anything else; ids are compared with a vocabulary later."""
        self.texts: list[str] = []
        self.sequences: list[Tensor] = []
        if isinstance(data, str | bytes | Mapping) or not hasattr(data, "__iter__"):
            raise DataError(f"{WANTED}; found one {type(data).__name__}: put it into a list")
        for index, item in enumerate(data):
            if isinstance(item, str):
                self.texts.append(item)
            else:
                self.sequences += _sequences(item, index)
            if self.texts and self.sequences:
                raise DataError(f"{WANTED}, all of one kind; found both, the other kind first at item {index}")
        if not self.texts and not self.sequences:
            raise DataError(f"{WANTED}; found none: an iterator can be read once only, a list again")

    def settings(self, config: CalibrationConfig) -> CalibrationConfig:
        """What a run's configuration says of this data: no dataset; of sequences their number, and the longest."""
        config = replace(config, dataset=DatasetConfig())
        if self.texts:
            return config
        return replace(config, samples=len(self.sequences), sequence_length=max(map(len, self.sequences)))

    def batches(self, config: CalibrationConfig, tokenizer: "PreTrainedTokenizerBase") -> list[Tensor]:
        """As `ptq.calibration.data.calibration_batches`; raises DataError for ids that the model has no row for."""
        if self.texts:
            with tempfile.TemporaryDirectory(prefix="ptq-") as place:
                file = Path(place) / "calibration.jsonl"
                file.write_text("".join(json.dumps({"text": text}) + "\n" for text in self.texts), encoding="utf-8")
                source = DatasetConfig(files=(str(file),))  # the very way of a file's text, to the same tokens
                return calibration_batches(replace(config, dataset=source), tokenizer)
        rows = getattr(tokenizer, "embedding_rows", None)  # as load_tokenizer notes them
        largest = max(int(sequence.max()) for sequence in self.sequences)
        if rows is not None and largest >= rows:
            raise DataError(
                f"token ids of calibration must be below the model's vocabulary size of {rows}, found {largest}: "
                "tokenize with the model's own tokenizer"
            )
        return in_batches(self.sequences, config.batch_size)


def _sequences(item: Any, index: int) -> list[Tensor]:
    """The rows of one item, int64 ``[T]`` each."""
    if not isinstance(item, Tensor):
        if not isinstance(item, Sequence) or isinstance(item, bytes):
            advice = "put it into a list" if isinstance(item, int) else "make it a tensor or a list of ints"
            advice = "pass its input_ids" if isinstance(item, Mapping) else advice
            raise DataError(f"{WANTED}; item {index} is of type {type(item).__name__}: {advice}")
        try:
            item = torch.tensor(item) if len(item) else torch.empty(0, dtype=torch.int64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{WANTED}; item {index} holds something else ({error}): tokenize it first") from error
    if item.dtype != torch.int64 or item.dim() not in (1, 2):
        raise DataError(
            f"{WANTED}; item {index} is {str(item.dtype).removeprefix('torch.')} of shape {list(item.shape)}: convert "
            "it with .long(), and give it one or two dimensions"
        )
    if item.shape[-1] < 2 or not len(item):
        raise DataError(
            f"each sequence of calibration must have 2 tokens or more; item {index} has shape {list(item.shape)}: "
            "leave it out"
        )
    if int(item.min()) < 0:
        raise DataError(
            f"token ids of calibration must be 0 or more; item {index} has {int(item.min())}: leave out what stands "
            "for padding"
        )
    rows = item.detach().cpu()
    return [row.clone() for row in (rows if rows.dim() == 2 else rows[None])]


def copied(batch: Any) -> Any:
    """A deep copy in which what was one object is one object, and modules stay the very ones."""
    kept: dict[int, Any] = {}

    def keep(value: Any) -> None:
        if isinstance(value, Tensor):
            kept[id(value)] = value.detach().clone()  # deepcopy refuses tensors that autograd computed
        elif isinstance(value, nn.Module):
            kept[id(value)] = value
        elif isinstance(value, Mapping | tuple | list):
            for each in value.values() if isinstance(value, Mapping) else value:
                keep(each)

    keep(batch)
    try:
        return copy.deepcopy(batch, kept)
    except TypeError:  # a lock, a generator, an open file: there can be one only
        return batch
