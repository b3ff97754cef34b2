"""JSON files that carry a checksum of their content, so that damage is found when they are read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptq.errors import FormatError
from ptq.formats.digest import digest
from ptq.formats.staging import atomic_write_text, read_json


def seal(path: Path, content: Mapping[str, Any]) -> str:
    """Write ``content``, whole or not at all; returns its checksum. Raises PtqError when the disk is full."""
    text = json.dumps(content)
    checksum = digest(text.encode())
    atomic_write_text(path, f'{{"checksum": "{checksum}", "content": {text}}}\n')
    return checksum


def unseal(path: Path) -> tuple[dict[str, Any], str]:
    """Content and checksum of a file that `seal` wrote. Raises FormatError when it is missing or damaged."""
    document = read_json(path)
    content, checksum = document.get("content"), document.get("checksum")
    if not isinstance(content, dict) or digest(json.dumps(content).encode()) != checksum:
        raise FormatError(f"{path} is damaged: its content does not have the checksum it was written with")
    return content, str(checksum)
