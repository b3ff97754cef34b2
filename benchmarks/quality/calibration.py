"""The calibration tokens: those that ptq draws for a configuration, handed to every peer as they are."""

import json
from pathlib import Path
from typing import NamedTuple

import torch

from ptq.calibration.data import calibration_batches, token_hash
from ptq.config import RunConfig, load_config
from ptq.models.loading import load_tokenizer

CONFIG = "demo.yaml"
SAMPLES, LENGTH, BATCH = 64, 512, 8


class Ids(NamedTuple):
    """A JSON file of token ids, one row a sequence, and the hash ptq's report must show for them."""

    file: Path
    hash: str


def settings(seed: int) -> list[str]:
    """The calibration as ``--set`` takes it."""
    return [
        "calibration.dataset.files=[examples/text/calibration.txt]",
        f"calibration.samples={SAMPLES}",
        f"calibration.sequence_length={LENGTH}",
        f"calibration.batch_size={BATCH}",
        f"calibration.seed={seed}",
    ]


def write_ids(parent: Path, seed: int, file: Path) -> Ids:
    """Draw the tokens as ptq does and write them to ``file``."""
    config: RunConfig = load_config(CONFIG, [f"model={parent}", *settings(seed)])
    batches = calibration_batches(config.calibration, load_tokenizer(parent, False))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(torch.cat(batches).tolist()))
    return Ids(file, token_hash(batches))
